"""Verify shards byte by byte and sample by sample: mfm-shards check data/scenes [...]

Takes folders of shards, or folders that hold several of them, changes nothing, and names the command that remakes what
is damaged. Exit codes: 0 all is well, 2 wrong arguments, 3 something is damaged.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mfm_dist.config.arguments import whole
from mfm_dist.data.index import open_manifest
from mfm_dist.data.manifest import MANIFEST_FILE, UNFINISHED_FILE, Manifest, remake_hint
from mfm_dist.data.shard_records import ShardRecord
from mfm_dist.errors import EXIT_DATA, EXIT_DONE, ConfigError, DataError, tell_user_errors
from mfm_dist.shards.packing import worker_pool
from mfm_dist.shards.verify import ShardCheck, check_manifest, check_shard

COLUMNS = ("shards", "samples", "left out", "bad samples", "other problems")


@dataclass
class Report:
    """What was found in one folder."""

    folder: Path
    manifest: Manifest | None = None
    checks: list[ShardCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Of the folder as a whole."""

    def lines(self) -> Iterator[str]:
        """Name every problem."""
        yield from self.problems
        for check in self.checks:
            yield from check.problems
            yield from (f"{self.folder / check.file}, sample {key!r}: {why}" for key, why in check.bad.items())

    def advice(self) -> Iterator[str]:
        """Say what to do about damaged shards."""
        damaged = [check.file for check in self.checks if check.problems or check.bad]
        if self.manifest is not None and damaged:
            yield (
                f"{self.folder}: delete {', '.join(damaged)} in it, then remake what is missing (the rest is kept): "
                f"{remake_hint(self.folder, self.manifest)}. Without what it is made of, train on it as it is: "
                "samples that cannot be used are passed over, named and counted (data.bad_sample_limit)"
            )

    def row(self) -> tuple[str, ...]:
        """Make its line of the table."""
        bad = sum(len(check.bad) for check in self.checks)
        others = len(self.problems) + sum(len(check.problems) for check in self.checks)
        if self.manifest is None:
            return (str(self.folder), "?", "?", "?", "?", str(others))
        counts = (len(self.manifest.shards), self.manifest.samples, len(self.manifest.left_out))
        return (str(self.folder), *map(str, counts), *(str(count or "none") for count in (bad, others)))


def check_folders(folders: Iterable[Path], workers: int) -> list[Report]:
    """Verify manifests, tars, indexes, class statistics and samples, the shards of all folders side by side."""
    reports = [_open(folder) for folder in folders]
    jobs = [
        (report, record, report.manifest.class_names)
        for report in reports
        if report.manifest is not None
        for record in report.manifest.shards
    ]
    with worker_pool(workers, "checking") as pool:
        running = [pool.submit(_check, report.folder, record, names) for report, record, names in jobs]
        bar = tqdm(total=len(jobs), unit="shard", disable=not sys.stderr.isatty())  # after the fork: it has a thread
        for (report, _, _), future in zip(jobs, running, strict=True):
            report.checks.append(future.result())
            bar.update()
        bar.close()
    return reports


def _open(folder: Path) -> Report:
    try:
        manifest = open_manifest(folder)
    except DataError as error:
        return Report(folder, problems=str(error).split("\n"))
    return Report(folder, manifest, problems=check_manifest(folder, manifest))


def _check(folder: Path, record: ShardRecord, class_names: tuple[str, ...]) -> ShardCheck:
    """Check one shard, the unit of work of one process."""
    try:
        return check_shard(folder, record, class_names)
    except OSError as error:
        return ShardCheck(record.file, problems=[f"{folder / record.file} cannot be read ({error})"])


def find_folders(given: list[Path]) -> list[Path]:
    """Find the shard folders among ``given`` and directly below them. Raises ConfigError where there are none."""
    found: list[Path] = []
    problems = []
    for root in given:
        inside = [path for path in (root, *sorted(root.glob("*"))) if _is_shard_folder(path)]
        found += inside
        if not inside:
            problems.append(f"{root} is no shard folder and holds none (a shard folder has a {MANIFEST_FILE})")
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(found))


def _is_shard_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in (MANIFEST_FILE, UNFINISHED_FILE))


def print_table(reports: list[Report]) -> None:
    """Print a line for each folder."""
    rows = [("folder", *COLUMNS), *(report.row() for report in reports)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))
        print(f"{first:{widths[0]}}", *cells, sep="  ")


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="mfm-shards check", description="Verify shards and every sample in them.")
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="shard folders, or folders of them")
    parser.add_argument("--workers", type=whole(1), default=len(os.sched_getaffinity(0)), help="processes (one a core)")
    args = parser.parse_args(argv)
    reports = check_folders(find_folders(args.folders), args.workers)
    print_table(reports)
    problems = [line for report in reports for line in report.lines()]
    for line in (*problems, *(line for report in reports for line in report.advice())):
        print(line, file=sys.stderr)
    return EXIT_DATA if problems else EXIT_DONE
