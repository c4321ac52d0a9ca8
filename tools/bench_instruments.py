#!/usr/bin/env python
"""What a run's instruments cost: python tools/bench_instruments.py [--config FILE] [--json FILE] [overrides]

Steps of a real trainer with MFM, in one process and on real shards, in turns there and back: one that is logged, with
everything that is measured then (losses by place, gradients at the encoder's last map, largest attention logit, the
Rebuilder's update) and the record made of it, and one that is not. Pictures are fetched outside of the clock. What is
counted is the process's own time on the CPU, so that other work on the machine matters little; the share is of all
steps, of which every ``log.every``-th is logged.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfm_dist.build import open_readers, render_scenes
from mfm_dist.config.arguments import add_run_arguments, whole
from mfm_dist.config.loader import changed_keys, load_config, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import EXIT_DONE, ConfigError, tell_user_errors
from mfm_dist.profiling.records import write_record
from mfm_dist.profiling.step import Blocks, build_setting, cpu_name
from mfm_dist.profiling.throughput import QUICKSTART

PROMISE = 0.02
"""At most this share of the time of all steps."""


def measure(config: RunConfig, *, rounds: int, warmup: int) -> dict[str, Any]:
    """Measure both kinds of step, under the names that the JSON file has.

    Raises:
        UserError: for a run without MFM, which has no instruments, for shards that are missing or damaged, or networks
            that cannot be built.
    """
    if not config.mfm.enabled:
        raise ConfigError("bench_instruments: the instruments are MFM's: set mfm.enabled=true")
    every, config.log.every = config.log.every, 2  # of two steps the second is logged
    render_scenes(config)
    readers = open_readers(config)
    trainer, blocks = build_setting(config, readers).trainer, Blocks(config, readers)

    def seconds(round_number: int, *, logged: bool) -> float:
        batches = blocks.take(round_number)
        trainer.progress.step = int(logged)
        trainer.step_log.begin(trainer.progress.step)
        began = time.process_time()
        trainer.train_step(batches)
        trainer.settle(leave=0 if logged else 1)
        if logged:
            trainer.step_log.record(trainer.progress.step)
        return time.process_time() - began

    own: list[dict[str, float]] = []
    for number in range(warmup + rounds):
        kinds = {"plain": False, "logged": True}
        order = list(kinds)[:: 1 if number % 2 == 0 else -1]
        own.append({kind: seconds(number, logged=kinds[kind]) for kind in order})
    kept = own[warmup:]
    ratio = statistics.median(one["logged"] / one["plain"] for one in kept)
    return {
        "device": cpu_name(),
        "load_average": os.getloadavg(),
        "log_every": every,
        "cpu_seconds": {kind: statistics.median(one[kind] for one in kept) for kind in kept[0]},
        "logged_over_plain": ratio,
        "share_of_all_steps": (ratio - 1) / every,
        "rounds": kept,
    }


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, str(QUICKSTART))
    parser.add_argument("--rounds", type=whole(1), default=30, metavar="N", help="timed rounds (%(default)s)")
    parser.add_argument("--warmup", type=whole(0), default=3, metavar="N", help="rounds before them (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here, every single time too")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config or [QUICKSTART], arguments.overrides)
    settings = changed_keys(to_tree(RunConfig()), config)
    found = measure(config, rounds=arguments.rounds, warmup=arguments.warmup)
    times = ", ".join(f"{kind} {1000 * seconds:.1f} ms" for kind, seconds in found["cpu_seconds"].items())
    print(f"{found['device']}, load {found['load_average'][0]:.1f}, {arguments.rounds} rounds, CPU time: {times}")
    print(f"a logged step over a plain one: {found['logged_over_plain']:.3f}; ", end="")
    share = f"{100 * found['share_of_all_steps']:.2f} % of all steps"
    print(f"at log.every={found['log_every']} {share} (promised: {100 * PROMISE:.0f} %)")
    if arguments.json:
        command = ["tools/bench_instruments.py", *(sys.argv[1:] if argv is None else argv)]
        write_record(arguments.json, command, ("torch", "timm"), settings=settings, **found)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
