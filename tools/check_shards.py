#!/usr/bin/env python
"""Verifies shards byte by byte and sample by sample: python tools/check_shards.py data/scenes [...]

Takes folders of shards, or folders that hold several of them. Exit codes: 0 all is well, 2 wrong arguments,
3 something is damaged.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.index import build_index
from mfm_dist.data.manifest import MANIFEST_FILE, UNFINISHED_FILE, ShardRecord
from mfm_dist.data.reader import SampleError, ShardReader
from mfm_dist.data.shards import sha256_of
from mfm_dist.errors import EXIT_DATA, EXIT_DONE, ConfigError, DataError, UserError


@dataclass
class Report:
    """What was found in one folder."""

    folder: Path
    shards: int = 0
    samples: int = 0
    problems: list[str] = field(default_factory=list)


def check_folder(folder: Path) -> Report:
    """Verifies the manifest, every tar, every index and every sample of one folder."""
    report = Report(folder)
    try:
        reader = ShardReader(folder)
    except DataError as error:
        report.problems += str(error).split("\n")
        return report
    for shard, record in enumerate(reader.index.manifest.shards):
        report.shards += 1
        report.samples += record.samples
        report.problems += _check_tar(folder / record.file, record, reader.index.rows[shard])
        report.problems += _check_samples(reader, shard, record)
    return report


def _check_tar(tar: Path, record: ShardRecord, rows: np.ndarray) -> list[str]:
    problems = []
    if sha256_of(tar) != record.sha256:
        problems.append(f"{tar}: its SHA-256 is not the one in {MANIFEST_FILE}")
    try:
        if not np.array_equal(build_index(tar), rows):
            problems.append(f"{tar}: its index differs from its contents")
    except DataError as error:
        problems.append(str(error))
    return problems


def _check_samples(reader: ShardReader, shard: int, record: ShardRecord) -> list[str]:
    """Decodes the samples of one shard and counts what the manifest counts."""
    problems = []
    sizes: Counter[str] = Counter()
    pixels = np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
    first = int(reader.index.starts[shard])
    for number in range(first, first + record.samples):
        labelled = bool(reader.index.rows[shard][number - first]["label"]["offset"] >= 0)
        try:
            sample = reader.read(number, with_label=labelled)
        except SampleError as error:
            problems.append(str(error))
            continue
        sizes["x".join(map(str, sample.image.shape[1:]))] += 1
        pixels += _histogram(sample.label)
    if not problems:
        names = reader.index.manifest.class_names
        counts = {**dict(zip(names, pixels.tolist(), strict=False)), "ignore": int(pixels[IGNORE_INDEX])}
        if record.pixel_counts != (counts if pixels.any() else {}) or record.image_sizes != dict(sizes):
            problems.append(f"{reader.index.folder / record.file}: {MANIFEST_FILE} counts other pixels or sizes")
    return problems


def _histogram(label: Tensor | None) -> np.ndarray:
    """int64 [256]: pixels by train id."""
    values = np.empty(0, dtype=np.uint8) if label is None else label.numpy().ravel()
    return np.bincount(values, minlength=IGNORE_INDEX + 1)


def find_folders(given: list[Path]) -> list[Path]:
    """The shard folders among ``given`` and directly below them. Raises ConfigError where there are none."""
    found: list[Path] = []
    problems = []
    for root in given:
        inside = [path for path in (root, *sorted(root.glob("*"))) if _is_shard_folder(path)]
        found += inside
        if not inside:
            problems.append(f"{root} is no shard folder and holds none (a shard folder has a {MANIFEST_FILE})")
    if problems:
        raise ConfigError(problems)
    return found


def _is_shard_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in (MANIFEST_FILE, UNFINISHED_FILE))


def print_table(reports: list[Report]) -> None:
    width = max(len(str(report.folder)) for report in reports)
    print(f"{'folder':{width}}  shards  samples  problems")
    for report in reports:
        problems = len(report.problems) or "none"
        print(f"{report.folder!s:{width}}  {report.shards:6}  {report.samples:7}  {problems:>8}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="check_shards.py", description="Verifies shards and every sample in them.")
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="shard folders, or folders of them")
    args = parser.parse_args(argv)
    try:
        reports = [check_folder(folder) for folder in find_folders(args.folders)]
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print_table(reports)
    for problem in (problem for report in reports for problem in report.problems):
        print(problem, file=sys.stderr)
    return EXIT_DATA if any(report.problems for report in reports) else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
