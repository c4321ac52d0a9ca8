#!/usr/bin/env python
"""Train variants of a configuration over several seeds and compare them: python tools/benchmark_scenes.py --seeds 5

Every run is one process of ``mfm_dist.train``; ``--jobs`` of them run side by side. Finished runs are kept, so the same
command goes on after an interruption. Differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from mfm_dist.config.loader import changed_keys, load_config, to_tree
from mfm_dist.metrics import write_atomically

MFM = {
    "mfm": ["mfm.enabled=true"],
    "mfm_hidden": ["mfm.enabled=true", "mfm.loss_on=hidden"],
    "mfm_ramp": ["mfm.enabled=true", "mfm.ramp_from=100", "mfm.ramp_to=200"],
    "mfm_hidden_ramp": ["mfm.enabled=true", "mfm.loss_on=hidden", "mfm.ramp_from=100", "mfm.ramp_to=200"],
}
"""Forms of the MFM term on top of a configuration: the paper's, and the two changes of it, apart and together."""
LARGER = {
    "depth8": ["rebuilder.depth=8"],
    "width192": ["rebuilder.width=192"],
    "ratio80": ["mfm.mask_ratio=0.8"],
}
"""The paper's limit, by the paper's factors: 2 to 8 blocks, half as wide again (512 to 768), twice the mask ratio."""
VARIANTS: dict[str, list[str]] = {
    "source_only": ["method.name=source_only", "mfm.enabled=false"],
    "oracle": ["method.name=oracle", "mfm.enabled=false"],
    "base": [],
    **MFM,
    **{f"{form}_{size}": [*MFM[form], *more] for form in MFM for size, more in LARGER.items()},
}
"""Overrides of the configuration by name; ``base`` is the configuration itself."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for a two-sided 95 % interval of a mean, by number of seeds."""


def train(config: Path, folder: Path, variant: str, seed: int, overrides: Sequence[str]) -> float:
    """Run, or finish, one variant with one seed; its final mIoU in percent.

    Raises:
        RuntimeError: if training fails; its output stands in ``train.log`` of the run folder.
    """
    run = folder / variant / f"seed_{seed}"
    run.mkdir(parents=True, exist_ok=True)
    expected = load_config(config, [*VARIANTS[variant], *overrides, f"seed={seed}"])
    if (run / "config.yaml").exists():
        before = to_tree(load_config(run / "config.yaml"))
        if different := changed_keys(before, expected):
            raise RuntimeError(f"{run} was trained with other settings ({'; '.join(different)}): use another --folder")
    command = [sys.executable, "-m", "mfm_dist.train", "--config", str(config)]
    command += [f"run.folder={run}", f"seed={seed}", *VARIANTS[variant], *overrides]
    if not (run / "outcome.json").exists() or json.loads((run / "outcome.json").read_text())["code"] != 0:
        with (run / "train.log").open("a") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code != 0:
            raise RuntimeError(f"{variant}, seed {seed} ended with exit code {code}: see {run / 'train.log'}")
    last = max((run / "eval").glob("step_*.json"))
    miou: float = json.loads(last.read_text())["miou"]
    print(f"{variant}, seed {seed}: {miou:.2f}", flush=True)
    return miou


def interval(values: Sequence[float]) -> float | None:
    """Half width of the 95 % interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    return T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def summary(miou: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Mean and interval of each variant, and of its difference to every other, paired by seed."""
    return {
        name: {
            "miou": values,
            "mean": statistics.fmean(values),
            "interval_95": interval(values),
            "minus": {
                other: {
                    "mean": statistics.fmean(differences := [a - b for a, b in zip(values, theirs, strict=True)]),
                    "interval_95": interval(differences),
                }
                for other, theirs in miou.items()
                if other != name
            },
        }
        for name, values in miou.items()
    }


def shown(result: dict[str, Any], form: str) -> str:
    """A mean with its interval, where there is one."""
    half_width = result["interval_95"]
    return format(result["mean"], form) + (f" ± {half_width:.2f}" if half_width is not None else " (one seed)")


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, one row a variant."""
    base = next(iter(results))
    lines = [f"| variant | target mIoU, % (mean ± 95 %) | minus {base}, paired | by seed |", "|---|---|---|---|"]
    for name, result in results.items():
        difference = result["minus"].get(base)
        paired = shown(difference, "+.2f") if difference else ""
        seeds = ", ".join(f"{value:.2f}" for value in result["miou"])
        lines.append(f"| {name} | {shown(result, '.2f')} | {paired} | {seeds} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/scenes/dacs.yaml"), help="what is varied")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11), metavar="N", help="seeds 0 to N-1")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["base", "mfm"],
        choices=VARIANTS,
        metavar="NAME",
        help=f"of {', '.join(VARIANTS)}",
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_scenes"), help="where the runs go")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every run")
    arguments = parser.parse_intermixed_args(argv)
    # Seed by seed, so that what an interruption leaves is paired.
    runs = list(product(range(arguments.seeds), arguments.variants))

    def run_one(run: tuple[int, str]) -> float:
        seed, variant = run
        return train(arguments.config, arguments.folder, variant, seed, arguments.overrides)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        values = list(pool.map(run_one, runs))
    miou: dict[str, list[float]] = {name: [] for name in arguments.variants}
    for (_, variant), value in zip(runs, values, strict=True):
        miou[variant].append(value)
    results = summary(miou)
    print(table(results))
    if arguments.json:
        record = {
            "command": ["python", "tools/benchmark_scenes.py", *(argv or sys.argv[1:])],
            "date": date.today().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "packages": {name: version(name) for name in ("torch", "timm", "numpy")},
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
