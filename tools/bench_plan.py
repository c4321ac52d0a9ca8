#!/usr/bin/env python
"""Whether a plan's step time is right, on this machine's CPU: python tools/bench_plan.py [--config FILE] [overrides]

For one process, and for two under DDP and ZeRO-2: the step as a plan for CPUs says it, with the network timed in
the same run and the link measured by the same processes, beside the step as the engine takes it. One
torch thread each. The fastest of several counts, on both sides; on a machine that others use this says little.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mfm_dist.build import build_train_module, classes_without_data
from mfm_dist.config.loader import changed_keys, load_config, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.start import start_engine
from mfm_dist.errors import EXIT_DONE, tell_user_errors
from mfm_dist.optim import build_optimizer, state_sizes
from mfm_dist.run.signals import end_process
from mfm_dist.schedules import ema_decay_at
from mfm_dist.storage import write_atomically

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is searched, not the one above it
from mfm_dist.config.arguments import add_run_arguments, config_arguments, whole
from mfm_dist.profiling.counting import build_without_storage
from mfm_dist.profiling.plan import Cluster, Work, calibrate, step_of
from mfm_dist.profiling.records import write_record
from mfm_dist.profiling.step import cpu_name, random_batch
from tools.ranks import run_ranks

DEFAULT = ["model.backbone=mit_b0", "data.crop=256x256", "mfm.enabled=true", "train.micro_batch=1"]
"""Without --config."""
STARTS = {"single": ("cpu_single", 1, "0"), "ddp": ("cpu_ddp", 2, "0"), "zero2": ("cpu_zero2", 2, "2")}
"""Launch file, processes and stage of the plan."""
PROMISE = 0.2
"""Of the measured step, by which the plan may be off."""
PROBE = 4 << 20
"""Elements that are all-reduced to measure the link: 16 MiB."""


def time_steps(config: RunConfig, steps: int) -> dict[str, float] | None:
    """Measure, in a rank, the fastest step of the slowest rank, and the link in GB/s. Rank 0 returns it."""
    engine = start_engine(config)
    module = build_train_module(config, classes_without_data(config))
    engine.prepare(module, build_optimizer(module, config.optim))
    seconds, links = [], []
    for number in range(1 + steps):
        batches = [random_batch(config, 100 * number + i) for i in range(engine.accumulation)]
        engine.barrier()
        began = time.perf_counter()
        for batch in batches:
            engine.forward_backward(batch, config.mfm.loss_weight)
        engine.step()
        engine.update_teacher(ema_decay_at(engine.applied, 0.99))
        seconds.append(time.perf_counter() - began)
        values = torch.ones(PROBE)
        engine.barrier()
        began = time.perf_counter()
        engine.sum(values)
        share = 2 * (engine.world_size - 1) / engine.world_size
        links.append(share * values.nbytes / (time.perf_counter() - began) / 1e9)
    everyone = engine.gather_objects((seconds[1:], links[1:]))
    engine.close()
    if not engine.is_main:
        return None
    slowest = [max(of_ranks) for of_ranks in zip(*(own for own, _ in everyone), strict=True)]
    return {"seconds": min(slowest), "link_gb_s": max(everyone[0][1])}


def planned(config: RunConfig, start: str, link: float) -> dict[str, float]:
    """Return the plan's seconds of a step, by what they go to."""
    _, processes, stage = STARTS[start]
    block, update = calibrate(config, processes)
    work = Work(block_seconds=block, update_seconds=update, saved_bytes=0, cast_weight_bytes=0)
    there = Cluster(nodes=1, gpus=processes, gpu="cpu", gib=float("inf"), within=link or 1.0, across=link or 1.0)
    sizes = state_sizes(build_without_storage(config), config.optim)
    return step_of(config, sizes, work, there, stage, config.blocks_per_step // processes)[0]


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return Markdown, one line a start."""
    heads = ["start", "planned, ms", "compute", "exchange", "measured, ms", "planned / measured"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, one in results.items():
        plan = one["planned"]
        cells = [f"{1000 * seconds:.0f}" for seconds in (plan["total"], plan["compute"], plan["exchange"])]
        cells += [f"{1000 * one['measured']['seconds']:.0f}", f"{plan['total'] / one['measured']['seconds']:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, " ".join(DEFAULT))
    parser.add_argument("--starts", nargs="*", choices=STARTS, default=list(STARTS), help="which to measure (all)")
    parser.add_argument("--steps", type=whole(1), default=5, metavar="N", help="timed steps (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    base = DEFAULT if arguments.config is None else []
    results: dict[str, Any] = {}
    words = [*base, *arguments.overrides]
    config = load_config(arguments.config, words)
    if arguments.worker is not None:
        if (found := time_steps(config, arguments.steps)) is not None:
            write_atomically(arguments.worker, json.dumps(found))
        return EXIT_DONE
    for name in arguments.starts:
        launch, processes, _ = STARTS[name]
        batch = f"train.global_batch={config.train.micro_batch * processes}"
        passed_on = [*config_arguments(arguments.config or ()), *arguments.overrides, batch]
        passed_on += ["--steps", str(arguments.steps)]
        measured = run_ranks(Path(__file__), passed_on, launch=launch, processes=processes)
        plan = planned(load_config(arguments.config, [*words, batch]), name, measured["link_gb_s"])
        results[name] = {"planned": plan, "measured": measured}
        print(f"{name}: {plan['total'] / measured['seconds']:.3f}", flush=True)
    print(f"{cpu_name()}, load {os.getloadavg()[0]:.1f}; promised: within {PROMISE:.0%}")
    print(table(results))
    if arguments.json:
        write_record(
            arguments.json,
            ["tools/bench_plan.py", *(sys.argv[1:] if argv is None else argv)],
            ("torch", "deepspeed", "accelerate", "timm"),
            changed=changed_keys(to_tree(RunConfig()), config),
            device=cpu_name(),
            load_average=os.getloadavg(),
            results=results,
        )
    return EXIT_DONE


if __name__ == "__main__":
    end_process(main())
