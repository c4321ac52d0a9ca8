#!/usr/bin/env python
"""Memory and time of a training step under each setting of ``memory``: python tools/bench_memory.py [overrides]

The peak is that of one optimiser step, above what stands before it (weights, teacher, optimiser state): activations,
gradients and temporaries. On a GPU it is torch.cuda.max_memory_allocated; on a CPU the same quantity, summed from the
allocations and releases that torch's profiler lists. Not counted: what the process holds beside torch, and what the
allocator keeps for reuse. One process on random pictures: no shards are read. Times are medians over rounds in which
the settings take turns, measured without the profiler.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from mfm_dist.build import build_train_module, classes_without_data
from mfm_dist.config.arguments import add_run_arguments, whole
from mfm_dist.config.loader import changed_keys, load_config, to_tree
from mfm_dist.config.schema import MemorySection, RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.launch import Launch
from mfm_dist.distributed.start import start_engine
from mfm_dist.errors import EXIT_DONE, ConfigError, tell_user_errors
from mfm_dist.optim import build_optimizer
from mfm_dist.profiling.records import write_record
from mfm_dist.profiling.step import cpu_name, peak_gib, random_batch, synchronise

DEFAULT = ["model.backbone=mit_b0", "data.crop=256x256", "mfm.enabled=true"]
"""Without --config: MiT-B0 and the DAFormer head under DACS with MFM."""

SETTINGS = {
    "plain": MemorySection(),
    "lean": MemorySection(lean=True),
    "checkpoint_backbone": MemorySection(checkpoint_backbone=True),
    "both": MemorySection(lean=True, checkpoint_backbone=True),
}


def build_step(config: RunConfig) -> tuple[Engine, Callable[[], None], float]:
    """Build an engine, a step of it, and the bytes of weights, teacher and optimiser state after a first one."""
    engine = start_engine(config)
    module = build_train_module(config, classes_without_data(config))
    engine.prepare(module, build_optimizer(module, config.optim, fused=engine.fuses_optimizer))
    batches = [random_batch(config, number).to(engine.device) for number in range(engine.accumulation)]

    def step() -> None:
        for batch in batches:
            engine.forward_backward(batch, config.mfm.loss_weight)
        engine.step()

    step()  # makes the optimiser's state
    standing = [*module.parameters(), *module.buffers()]
    standing += [value for state in engine.optimizer.state.values() for value in state.values()]
    return engine, step, sum(tensor.nbytes for tensor in standing)


def measure(config: RunConfig, *, rounds: int) -> dict[str, Any]:
    """Measure all figures, under the names that the JSON file has.

    Raises:
        ConfigError: for several processes, or networks that cannot be built.
    """
    if Launch.from_environment().world_size > 1:
        raise ConfigError("bench_memory measures one process: start it with python, not with accelerate launch")
    steps: dict[str, Callable[[], None]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, memory in SETTINGS.items():
        changed = deepcopy(config)
        changed.memory = memory
        engine, steps[name], standing = build_step(changed)
        peak = peak_gib(steps[name], engine.device)
        found[name] = {"peak_mib": peak * 1024, "standing_mib": standing / 2**20, "seconds": []}
    device = engine.device
    for number in range(rounds):
        for name in list(steps) if number % 2 == 0 else reversed(steps):  # a drift of the machine falls on all alike
            synchronise(device)
            started = time.perf_counter()
            steps[name]()
            synchronise(device)
            found[name]["seconds"].append(time.perf_counter() - started)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "settings": found,
    }


def table(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Return Markdown, one line a setting; ratios are to the plain step."""
    lines = ["| memory | step's peak, MiB | of plain | step, ms | of plain |", "|---|---|---|---|---|"]
    seconds = {name: statistics.median(one["seconds"]) for name, one in settings.items()}
    for name, one in settings.items():
        of_peak = one["peak_mib"] / settings["plain"]["peak_mib"]
        of_time = seconds[name] / seconds["plain"]
        lines.append(f"| {name} | {one['peak_mib']:.1f} | {of_peak:.2f} | {1000 * seconds[name]:.0f} | {of_time:.2f} |")
    return "\n".join(lines)


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, " ".join(DEFAULT))
    parser.add_argument(
        "--rounds", type=whole(1), default=3, metavar="N", help="timed steps of each setting (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here")
    arguments = parser.parse_intermixed_args(argv)
    base = DEFAULT if arguments.config is None else []
    config = load_config(arguments.config, [*base, *arguments.overrides])
    found = measure(config, rounds=arguments.rounds)
    print(f"{found['device']}, {found['threads']} torch threads, load {found['load_average'][0]:.1f}; ", end="")
    print(f"weights, teacher and optimiser beside it {found['settings']['plain']['standing_mib']:.1f} MiB")
    print(table(found["settings"]))
    if arguments.json:
        command = ["tools/bench_memory.py", *(sys.argv[1:] if argv is None else argv)]
        changed = changed_keys(to_tree(RunConfig()), config)
        write_record(arguments.json, command, ("torch", "timm", "accelerate"), changed=changed, **found)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
