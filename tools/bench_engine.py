#!/usr/bin/env python
"""What the engine costs beside a bare loop with the same passes: python tools/bench_engine.py [overrides]

Four starts of real processes on CPUs: one process and DDP, each with the engine and a bare PyTorch loop (torch's own
DDP); ZeRO-2 and ZeRO-3, each with the engine, DeepSpeed called by hand, and the bare loop under torch's DDP. The ways
of a start live side by side in the same processes and step in turn, there and back, on the same random pictures with
the same draws: a drift of the machine falls on all alike. A step is as long as it takes the slowest rank. The figures
are medians, over the rounds, of times and of ratios within a round. No shards are read and nothing is logged; for the
whole training step with its data see ``mfm-profile step``.

After the steps each way saves all it has, in turns too: for how long training stands still. The engine copies, and
writes in a thread; torch.save and DeepSpeed's save_checkpoint write before they return.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mfm_dist.batch import UDABatch
from mfm_dist.build import build_train_module, classes_without_data
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.checkpoint.writer import CheckpointWriter
from mfm_dist.config.loader import changed_keys, load_config, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.launch import Launch
from mfm_dist.distributed.start import start_engine
from mfm_dist.errors import EXIT_DONE, ConfigError, tell_user_errors
from mfm_dist.optim import build_optimizer
from mfm_dist.run.signals import end_process
from mfm_dist.schedules import ema_decay_at, mfm_weight
from mfm_dist.storage import write_atomically

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is searched, not the one above it
from mfm_dist.config.arguments import add_run_arguments, config_arguments, whole
from mfm_dist.profiling.records import write_record
from mfm_dist.profiling.step import cpu_name, median_and_quartiles, random_batch
from mfm_dist.profiling.throughput import QUICKSTART
from tools.ranks import run_ranks
from tools.raw_loops import Loop, bare_loop, deepspeed_loop

STARTS = {"single": ("cpu_single", 1), "ddp": ("cpu_ddp", 2), "zero2": ("cpu_zero2", 2), "zero3": ("cpu_zero3", 2)}
"""Launch file and number of processes."""
PROMISE = 1.03
"""At most this much of a bare loop's step without DeepSpeed, and of a raw DeepSpeed loop's with it."""
SAVES = 7
"""Timed checkpoints of each way."""
SETTLE_SECONDS = 1.0
"""Before each save; the engine's thread still writes after its own."""
RATIOS = (("engine", "bare"), ("engine", "raw DeepSpeed"), ("raw DeepSpeed", "bare"))


def engine_loop(config: RunConfig, engine: Engine) -> Loop:
    """Ask the engine for what the trainer does in one step, and for a checkpoint."""
    module = build_train_module(config, classes_without_data(config))
    engine.prepare(module, build_optimizer(module, config.optim))
    weight = mfm_weight(0, config.mfm)

    def step(batches: Sequence[UDABatch]) -> None:
        engine.set_learning_rates(1.0)
        for batch in batches:
            engine.forward_backward(batch.to(engine.device), weight)
        engine.step()
        engine.update_teacher(ema_decay_at(engine.applied, config.self_training.ema_decay))

    writers: dict[Path, CheckpointWriter] = {}

    def save(folder: Path, number: int) -> None:
        if folder not in writers:
            writers[folder] = CheckpointWriter(folder, engine, config, data_fingerprints={}, written=lambda _: None)
        writers[folder].save(module, Progress(step=number))

    return Loop(step, save)


Rounds = list[dict[str, float]]
"""Seconds of each way, of the slowest rank, by round."""


def time_ways(config: RunConfig, *, steps: int, warmup: int) -> dict[str, Rounds] | None:
    """Measure, in a rank, how long steps and saves take. Rank 0 returns it, the others None."""
    engine = start_engine(config)
    ways: dict[str, Loop] = {"engine": engine_loop(config, engine)}
    if Launch.from_environment().zero_stage is not None:
        ways["raw DeepSpeed"] = deepspeed_loop(config, engine.device)
    ways["bare"] = bare_loop(config, engine.device, engine.world_size)

    def step(number: int) -> dict[str, Callable[[], None]]:
        first = number * config.blocks_per_step + engine.rank * engine.accumulation
        batches = [random_batch(config, first + index) for index in range(engine.accumulation)]
        return {name: partial(way.step, batches) for name, way in ways.items()}

    def save(number: int) -> dict[str, Callable[[], None]]:
        return {name: partial(way.save, folder, number) for name, way in ways.items()}

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:
        folder = Path(engine.gather_objects(own)[0])
        found = {
            "steps": take_turns(engine, step, rounds=steps, warmup=warmup),
            "saves": take_turns(engine, save, rounds=SAVES, warmup=1, pause=SETTLE_SECONDS),
        }
        time.sleep(SETTLE_SECONDS)
        engine.barrier()  # the folder is rank 0's
    engine.close()
    return found if engine.is_main else None


def take_turns(
    engine: Engine,
    work: Callable[[int], Mapping[str, Callable[[], None]]],
    *,
    rounds: int,
    warmup: int,
    pause: float = 0.0,
) -> Rounds:
    """Time what ``work`` gives for each round, there and back."""
    own: Rounds = []
    for number in range(warmup + rounds):
        ways = work(number)
        seconds: dict[str, float] = {}
        for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
            time.sleep(pause)
            engine.barrier()
            started = time.perf_counter()
            ways[name]()
            seconds[name] = time.perf_counter() - started
        own.append(seconds)
    ranks = engine.gather_objects(own[warmup:])
    return [{name: max(rank[index][name] for rank in ranks) for name in ranks[0][index]} for index in range(rounds)]


def summary(rounds: Sequence[Mapping[str, float]], saves: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return medians of one start: seconds of each way, and the ratios of ``RATIOS`` that it has."""
    ways = rounds[0]
    ratios = {f"{over} / {under}": [one[over] / one[under] for one in rounds]
              for over, under in RATIOS if over in ways and under in ways}  # fmt: skip
    return {
        "seconds": {name: statistics.median(one[name] for one in rounds) for name in ways},
        "ratios": {name: median_and_quartiles(values) for name, values in ratios.items()},
        "save_seconds": {name: statistics.median(one[name] for one in saves) for name in ways},
    }


def table(starts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return Markdown, one line a start."""
    ways, ratios = ("engine", "raw DeepSpeed", "bare"), [f"{over} / {under}" for over, under in RATIOS]
    heads = [*(f"{way}, ms" for way in ways), *ratios, *(f"{way} saves, ms" for way in ways)]
    lines = ["| start | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, one in starts.items():
        cells = [f"{1000 * one['seconds'][way]:.1f}" if way in one["seconds"] else "" for way in ways]
        for ratio in ratios:
            found = one["ratios"].get(ratio)
            cells.append("{median:.3f} ({quartile_low:.3f} to {quartile_high:.3f})".format(**found) if found else "")
        cells += [f"{1000 * one['save_seconds'][way]:.1f}" if way in one["save_seconds"] else "" for way in ways]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all figures, under the names that the JSON file has."""
    starts: dict[str, Any] = {}
    rounds: dict[str, Any] = {}
    files = [file.absolute() for file in arguments.config]
    passed_on = [*config_arguments(files), "--steps", str(arguments.steps)]
    passed_on += ["--warmup", str(arguments.warmup), *arguments.overrides]
    for name in arguments.starts:
        launch, processes = STARTS[name]
        rounds[name] = run_ranks(Path(__file__), passed_on, launch=launch, processes=processes)
        starts[name] = summary(rounds[name]["steps"], rounds[name]["saves"])
        print(f"{name}: {starts[name]['ratios']}", flush=True)
    return {"device": cpu_name(), "load_average": os.getloadavg(), "starts": starts, "rounds": rounds}


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, str(QUICKSTART))
    parser.add_argument("--starts", nargs="*", choices=STARTS, default=list(STARTS), help="which to measure (all)")
    parser.add_argument("--steps", type=whole(1), default=30, metavar="N", help="timed rounds (%(default)s)")
    parser.add_argument("--warmup", type=whole(0), default=3, metavar="N", help="rounds before them (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here, every single time too")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    arguments.config = arguments.config or [QUICKSTART]
    config = load_config(arguments.config, arguments.overrides)
    if config.train.precision == "bf16_weights":
        raise ConfigError("bench_engine: the raw loops keep their teacher in fp32, so train.precision=bf16_weights "
                          "has no twin here: use fp32 or bf16")  # fmt: skip
    if arguments.worker is not None:
        if (seconds := time_ways(config, steps=arguments.steps, warmup=arguments.warmup)) is not None:
            write_atomically(arguments.worker, json.dumps(seconds))
        return EXIT_DONE
    found = measure(arguments)
    print(f"{found['device']}, load {found['load_average'][0]:.1f}, {arguments.steps} rounds; medians, quartiles")
    print(table(found["starts"]))
    print(
        f"promised: engine / bare at most {PROMISE} without DeepSpeed, engine / raw DeepSpeed at most {PROMISE} with it"
    )
    if arguments.json:
        write_record(
            arguments.json,
            ["tools/bench_engine.py", *(sys.argv[1:] if argv is None else argv)],
            ("torch", "deepspeed", "accelerate", "timm"),
            changed=changed_keys(to_tree(RunConfig()), config),
            torch_threads=config.train.threads,
            **found,
        )
    return EXIT_DONE


if __name__ == "__main__":
    end_process(main())
