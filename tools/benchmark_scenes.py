#!/usr/bin/env python
"""Train variants of a configuration over several seeds and compare them: python tools/benchmark_scenes.py --seeds 5

Every run is one process of ``mfm_dist.train``; ``--jobs`` of them run side by side. Finished runs are kept, so the same
command goes on after an interruption. Differences are paired by seed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is searched, not the one above it
from mfm_dist.config.arguments import add_run_arguments
from mfm_dist.config.loader import load_config
from mfm_dist.errors import ConfigError, tell_user_errors
from tools.seeds import MOST_SEEDS, mean_of, save_record, shown, train

VARIED = Path("configs/scenes/dacs.yaml")
"""The run that is varied where no other is named."""
MFM = {
    "mfm": ["mfm.enabled=true"],
    "mfm_hidden": ["mfm.enabled=true", "mfm.loss_on=hidden"],
    "mfm_ramp": ["mfm.enabled=true", "mfm.ramp_from=100", "mfm.ramp_to=200"],
    "mfm_stable": ["mfm.enabled=true", "rebuilder.variant=stable"],
    "mfm_hidden_ramp": ["mfm.enabled=true", "mfm.loss_on=hidden", "mfm.ramp_from=100", "mfm.ramp_to=200"],
}
"""Forms of the MFM term on top of a configuration: the paper's, two changes of it, apart and together, and the stable
variant of the Rebuilder."""
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


def summary(miou: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return mean and interval of each variant, and of its difference to every other, paired by seed."""
    return {
        name: {
            "miou": values,
            **mean_of(values),
            "minus": {
                other: mean_of([a - b for a, b in zip(values, theirs, strict=True)])
                for other, theirs in miou.items()
                if other != name
            },
        }
        for name, values in miou.items()
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return Markdown, one row a variant."""
    base = next(iter(results))
    lines = [f"| variant | target mIoU, % (mean ± 95 %) | minus {base}, paired | by seed |", "|---|---|---|---|"]
    for name, result in results.items():
        difference = result["minus"].get(base)
        paired = shown(difference, "+.2f") if difference else ""
        seeds = ", ".join(f"{value:.2f}" for value in result["miou"])
        lines.append(f"| {name} | {shown(result, '.2f')} | {paired} | {seeds} |")
    return "\n".join(lines)


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, str(VARIED))
    parser.add_argument(
        "--seeds", type=int, default=5, choices=range(1, MOST_SEEDS + 1), metavar="N", help="seeds 0 to N-1"
    )
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
    arguments = parser.parse_intermixed_args(argv)
    files = arguments.config or [VARIED]
    if load_config(files, arguments.overrides).data.validation is None:
        raise ConfigError("data.validation=null: nothing to compare variants by; name a labelled set of the target")
    # Seed by seed, so that what an interruption leaves is paired.
    runs = list(product(range(arguments.seeds), arguments.variants))

    def run_one(run: tuple[int, str]) -> float:
        seed, variant = run
        folder = arguments.folder / variant / f"seed_{seed}"
        overrides = [*VARIANTS[variant], *arguments.overrides, f"seed={seed}"]
        miou: float = train(files, folder, overrides)["miou"]
        print(f"{variant}, seed {seed}: {miou:.2f}", flush=True)
        return miou

    with ThreadPoolExecutor(arguments.jobs) as pool:
        values = list(pool.map(run_one, runs))
    miou: dict[str, list[float]] = {name: [] for name in arguments.variants}
    for (_, variant), value in zip(runs, values, strict=True):
        miou[variant].append(value)
    results = summary(miou)
    print(table(results))
    if arguments.json:
        save_record(arguments.json, ["tools/benchmark_scenes.py", *(argv or sys.argv[1:])], results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
