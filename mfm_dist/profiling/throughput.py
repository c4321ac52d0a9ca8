"""Measure the training step on this machine: mfm-profile step [--steps N] [overrides]; ``data``: the data pipeline.

Four ways to take the same step run in turn, there and back in each round: our engine and a bare PyTorch loop, each with
and without the MFM term. The figures are medians over the rounds, so a disturbance hits all four alike. One process,
the GPU where there is one. Real shards are read; data.render_scenes=true makes some at any scenes.size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_dist.config.arguments import Command, add_run_arguments, whole
from mfm_dist.config.loader import changed_keys, load_config, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import EXIT_DONE, tell_user_errors
from mfm_dist.profiling.data import data_table, measure_data
from mfm_dist.profiling.records import write_record
from mfm_dist.profiling.step import PARTS, measure

QUICKSTART = Path("configs/quickstart.yaml")


def table(found: Mapping[str, Any]) -> str:
    """Return Markdown, one column with MFM and one without."""
    both = (found["without"], found["with"])

    def row(name: str, values: Sequence[float], form: str) -> str:
        first, second = values
        ratio = f"{second / first:.2f}" if first > 0 else ""
        return f"| {name} | {first:{form}} | {second:{form}} | {ratio} |"

    return "\n".join(
        [
            "| median of the rounds | without MFM | with MFM | with / without |",
            "|---|---|---|---|",
            row("images/s, source and target", [one["images_per_second"] for one in both], ".2f"),
            row("step, ms", [1000 * one["step_seconds"]["median"] for one in both], ".1f"),
            *(row(f"  {part}, ms", [1000 * one["part_seconds"][part] for one in both], ".1f") for part in PARTS),
            row("bare PyTorch step, ms", [1000 * one["bare_step_seconds"]["median"] for one in both], ".1f"),
            row("engine / bare, data wait apart", [one["engine_over_bare"]["median"] for one in both], ".3f"),
            row("peak memory that torch allocates, GiB", [one["memory_gib"] for one in both], ".2f"),
        ]
    )


@tell_user_errors
def profile_step(argv: Sequence[str]) -> int:
    """Run the ``step`` command."""
    parser = argparse.ArgumentParser(
        prog="mfm-profile step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser, str(QUICKSTART))
    parser.add_argument("--steps", type=whole(1), default=20, metavar="N", help="timed rounds (%(default)s)")
    parser.add_argument("--warmup", type=whole(0), default=3, metavar="N", help="rounds before them (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here, every single time too")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config or QUICKSTART, arguments.overrides)
    found = measure(config, steps=arguments.steps, warmup=arguments.warmup)
    print(f"{found['device']}, {found['threads']} torch threads, load {found['load_average'][0]:.1f}, ", end="")
    print(f"{arguments.steps} rounds after {arguments.warmup}; {found['images_per_step']} images a step")
    print(table(found))
    if arguments.json:
        command = ["-m", "mfm_dist.profiling", "step", *argv]
        changed = changed_keys(to_tree(RunConfig()), config)
        write_record(arguments.json, command, ("torch", "timm", "numpy", "accelerate"), settings=changed, **found)
    return EXIT_DONE


@tell_user_errors
def profile_data(argv: Sequence[str]) -> int:
    """Run the ``data`` command."""
    parser = argparse.ArgumentParser(
        prog="mfm-profile data",
        description="Measure the data pipeline: images/s by workers, split by its parts, beside the bare decoder and "
        "plain webdataset on the same tars.",
    )
    add_run_arguments(parser, str(QUICKSTART))
    parser.add_argument("--rounds", type=whole(1), default=9, metavar="N", help="turns of each way (%(default)s)")
    parser.add_argument("--blocks", type=whole(1), default=24, metavar="N", help="blocks a turn (%(default)s)")
    parser.add_argument("--workers", type=whole(0), nargs="*", default=[1, 2], metavar="N", help="(1 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here, every single time too")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config or QUICKSTART, arguments.overrides)
    found = measure_data(config, workers=arguments.workers, rounds=arguments.rounds, blocks=arguments.blocks)
    print(f"{found['device']}, load {found['load_average'][0]:.1f}, {arguments.rounds} rounds, {found['image_sizes']}")
    print(data_table(found))
    if arguments.json:
        command = ["-m", "mfm_dist.profiling", "data", *argv]
        changed = changed_keys(to_tree(RunConfig()), config)
        write_record(
            arguments.json, command, ("torch", "torchvision", "numpy", "webdataset"), settings=changed, **found
        )
    return EXIT_DONE


COMMANDS: dict[str, Command] = {"step": profile_step, "data": profile_data}
"""What there is to measure, by its first argument; ``step`` where none is named."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    command = given.pop(0) if given and given[0] in COMMANDS else "step"
    return COMMANDS[command](given)
