"""Means over seeds, and differences paired by seed: python -m mfm_dist.report.seeds SWEEP [SWEEP ...]

A sweep is a folder with a run for each seed (``seed_0``, ``seed_1``, ...), as slurm/sweep.sh makes it. The score is the
mIoU of the last evaluation; ± are 95 % intervals by Student's t. Differences are to the first sweep, over the seeds
that both have. What is unfinished is named and left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mfm_dist.errors import EXIT_DONE, ConfigError, CorruptFileError, tell_user_errors
from mfm_dist.report.paired import PairedDifference, paired_difference
from mfm_dist.run.folder import OUTCOME, RunFolder
from mfm_dist.storage import read_json

SEED_FOLDER = re.compile(r"seed_(\d+)")


def read_scores(sweep: Path) -> tuple[dict[int, float], list[Path]]:
    """Return the last mIoU, in percent, of each finished run of a sweep by its seed, and the runs that have none.

    Raises:
        ConfigError: there is no run in this folder.
    """
    scores: dict[int, float] = {}
    unfinished: list[Path] = []
    for run in sorted(sweep.glob("seed_*")):
        if match := SEED_FOLDER.fullmatch(run.name):
            try:
                outcome = read_json(run / OUTCOME)
                assert outcome["code"] == EXIT_DONE
                last = RunFolder(run, writes=False).evaluation(int(outcome["step"]))
                scores[int(match[1])] = float(read_json(last)["miou"])
            except (OSError, ValueError, KeyError, TypeError, AssertionError, CorruptFileError):
                unfinished.append(run)
    if not scores and not unfinished:
        raise ConfigError(f"{sweep} has no run of a seed, such as {sweep / 'seed_0'}")
    return scores, unfinished


def lines_of(sweeps: Mapping[Path, Mapping[int, float]]) -> Iterator[str]:
    """Write a table in Markdown, one row a sweep. The first is what the others are compared with."""
    first, base = next(iter(sweeps.items()))
    yield f"| sweep | target mIoU, % (mean ± 95 %) | minus {first}, paired | p | by seed |"
    yield "|---|---|---|---|---|"
    for sweep, scores in sweeps.items():
        both = sorted(scores.keys() & base.keys())
        difference, p = "", ""
        if sweep != first and both:
            paired = paired_difference([scores[seed] - base[seed] for seed in both])
            difference = f"{_shown(paired, '+.2f')}, {len(both)} seeds"
            p = "" if paired.p is None else f"{paired.p:.3f}"
        mean = _shown(paired_difference(list(scores.values())), ".2f") if scores else "none finished"
        by_seed = ", ".join(f"{seed}: {score:.2f}" for seed, score in sorted(scores.items()))
        yield f"| {sweep} | {mean} | {difference} | {p} | {by_seed} |"


def _shown(found: PairedDifference, form: str) -> str:
    return format(found.mean, form) + ("" if found.half_width is None else f" ± {found.half_width:.2f}")


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m mfm_dist.report.seeds", description=__doc__)
    parser.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP", help="the first is compared with the others")
    arguments = parser.parse_args(argv)
    found = {sweep: read_scores(sweep) for sweep in dict.fromkeys(arguments.sweeps)}
    print("\n".join(lines_of({sweep: scores for sweep, (scores, _) in found.items()})))
    for run in (run for _, unfinished in found.values() for run in unfinished):
        print(f"not finished, left out: {run}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
