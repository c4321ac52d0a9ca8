"""Shared by the tools that train over several seeds: one run, kept once it is finished; means and intervals."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfm_dist.config.arguments import config_arguments
from mfm_dist.config.loader import changed_keys, load_config, to_tree
from mfm_dist.profiling.records import write_record
from mfm_dist.report.paired import paired_difference
from mfm_dist.run.folder import OUTCOME

MOST_SEEDS = 10


def is_finished(run: Path) -> bool:
    """Tell whether the run in this folder has trained to its end."""
    outcome = run / OUTCOME
    return outcome.exists() and json.loads(outcome.read_text())["code"] == 0


def all_scores(run: Path) -> list[dict[str, Any]]:
    """Read what the evaluations of a run wrote, by step. Raises RuntimeError: there is none."""
    written = sorted((run / "eval").glob("step_*.json"))
    if not written:
        raise RuntimeError(f"{run} has no evaluation")
    return [json.loads(path.read_text()) for path in written]


def last_scores(run: Path) -> dict[str, Any]:
    """Read what the last evaluation of a run wrote. Raises RuntimeError: there is none."""
    return all_scores(run)[-1]


def refuse_other_settings(files: Sequence[Path], run: Path, overrides: Sequence[str]) -> None:
    """Raise RuntimeError if a run in this folder was begun with other settings."""
    if (run / "config.yaml").exists():
        before = to_tree(load_config(run / "config.yaml"))
        if different := changed_keys(before, load_config(files, overrides)):
            raise RuntimeError(f"{run} was trained with other settings ({'; '.join(different)}): use another --folder")


def train(files: Sequence[Path], run: Path, overrides: Sequence[str], *, launch: Path | None = None) -> dict[str, Any]:
    """Run, or finish, one training and return the scores at its end.

    Args:
        files: its configuration; later files win over earlier ones.
        run: its folder, which wins over ``run.folder``.
        launch: a file of configs/accelerate to launch it with; None: one process without a launcher.

    Raises:
        RuntimeError: if training fails, its output stands in ``train.log`` of the run folder; or if the folder holds a
            run with other settings.
    """
    refuse_other_settings(files, run, overrides)
    if not is_finished(run):
        launcher = [] if launch is None else ["-m", "accelerate.commands.accelerate_cli", "launch"]
        launcher += [] if launch is None else ["--config_file", str(launch)]
        command = [sys.executable, *launcher, "-m", "mfm_dist.train", *config_arguments(files)]
        run.mkdir(parents=True, exist_ok=True)
        with (run / "train.log").open("a") as log:
            said = [*command, f"run.folder={run}", *overrides]
            code = subprocess.run(said, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code != 0:
            raise RuntimeError(f"{run} ended with exit code {code}: see {run / 'train.log'}")
    return last_scores(run)


def interval(values: Sequence[float]) -> float | None:
    """Return the half width of the 95 % interval of the mean; None for a single value."""
    return paired_difference(values).half_width


def mean_of(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and half width of its 95 % interval."""
    return {"mean": statistics.fmean(values), "interval_95": interval(values)}


def shown(result: dict[str, Any], form: str) -> str:
    """Write a mean with its interval, where there is one."""
    half_width = result["interval_95"]
    return format(result["mean"], form) + (f" ± {half_width:.2f}" if half_width is not None else " (one seed)")


def save_record(path: Path, command: Sequence[str], results: Any) -> None:
    """Write figures beside what they were made with, as JSON."""
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    write_record(path, command, ("torch", "timm", "numpy"), machine=machine, results=results)
