#!/usr/bin/env python
"""A tiny run of many steps: memory, descriptors, threads and CPU time a step have to stay what they are.

python -m tests.campaign.soak [--steps 20000] [--work FOLDER] [--record FILE]

One process trains, with checkpoints and evaluations on the way, and is looked at from outside (/proc) every 100 steps.
Beside it, on the same core and with it in turns of milliseconds, a bare loop trains a network and keeps nothing. The
processor's own speed changes by several percent in minutes, where a machine is shared; so a step is counted in
repetitions of that loop that the same CPU time would have bought meanwhile.
From step 2,000 on, means of blocks of 500 steps are fitted by a line. Its slope has an upper bound of 95 %, one-sided,
whose standard error allows for residuals that depend on the one before (AR(1)). The line of the record holds the bounds
and the blocks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from mfm_dist.shards.scene_shards import write_scenes
from mfm_dist.storage import JsonLines
from tests.campaign.kills import last_step
from tests.helpers.processes import family, kill
from tests.helpers.provenance import provenance
from tests.helpers.runs import REPOSITORY, Start, tiny_overrides

RECORD = REPOSITORY / "docs" / "benchmarks" / "soak.jsonl"
EVERY = 100
"""Steps between looks."""
BLOCK = 500
"""Steps of a block."""
FIRST = 2_000
"""Steps that are not counted: caches fill."""
SETTINGS = ["data.crop=32x32", "model.decoder=segformer", "model.decoder_options={width: 8}", "rebuilder.width=8",
            "rebuilder.grid=1", "train.micro_batch=2", "train.global_batch=2", "checkpoint.every=500",
            "eval.every=5000", "eval.overlays=0", f"log.every={EVERY}", "debug.check_gradients=false",
            "self_training.pseudo_threshold=0"]  # fmt: skip
LARGEST_GROWTH = {"memory_mib": 20.0, "cpu_percent": 1.0}
"""In 10,000 steps, by the upper bound."""
QUANTILE = 1.697
"""Student's t, 95 % one-sided, 30 degrees of freedom; there are 35 blocks."""


def look(process: int) -> dict[str, float]:
    """Return what the kernel says of a process: anonymous memory in MiB, descriptors, threads, CPU seconds."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line
    )
    stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return {
        "memory_mib": int(status["RssAnon"].split()[0]) / 1024,
        "descriptors": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(status["Threads"]),
        "cpu_seconds": (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"),
    }


def repeat(repetitions: Synchronized[int]) -> None:
    """Train a network on noise for ever, with nothing that could grow: what the trainer's CPU time is measured by."""
    os.nice(5)  # a quarter of the core
    torch.set_num_threads(1)
    network = timm.create_model("test_resnet", num_classes=7)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, foreach=False)
    images = torch.randn(2, 3, 32, 32)
    while True:
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()
        repetitions.value += 1


@contextmanager
def reference() -> Iterator[tuple[int, Synchronized[int]]]:
    """Run ``repeat`` in a process of its own; give its number and what it counts."""
    spawned = multiprocessing.get_context("spawn")
    repetitions: Synchronized[int] = spawned.Value("q", 0)
    process = spawned.Process(target=repeat, args=(repetitions,), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        yield process.pid, repetitions
    finally:
        process.kill()
        process.join()


def watch(life: Start, steps: int, beside: tuple[int, Synchronized[int]]) -> list[dict[str, float]]:
    """Look at a run, and at what runs beside it, whenever it has logged, until it ends."""
    looks: list[dict[str, float]] = []
    while life.launcher.poll() is None:
        step = last_step(life.run)
        if step and step < steps and (not looks or step > looks[-1]["step"]):
            other = {"repetitions": beside[1].value, "reference_seconds": look(beside[0])["cpu_seconds"]}
            looks.append({"step": step, **look(life.launcher.pid), **other})
            JsonLines(life.run.with_suffix(".jsonl")).append(looks[-1])
        time.sleep(0.05)
    return looks


def slope_bound(values: np.ndarray) -> tuple[float, float]:
    """Return the slope of a line through values at 0, 1, 2 ..., and its upper bound of 95 %."""
    at = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(at @ values / (at @ at))
    residuals = values - values.mean() - slope * at
    error = np.sqrt(residuals @ residuals / (len(values) - 2) / (at @ at))
    related = max(0.0, float(residuals[1:] @ residuals[:-1] / max(residuals @ residuals, 1e-300)))
    return slope, slope + QUANTILE * float(error) * float(np.sqrt((1 + related) / (1 - related)))


def judged(looks: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return means by block, growth in 10,000 steps with its bound, and what is not as promised."""
    blocks: list[dict[str, float]] = []
    per_block, start = BLOCK // EVERY, [one["step"] for one in looks].index(FIRST)
    counted = looks[start:]
    for begin in range(0, len(counted) - per_block, per_block):
        inside = counted[begin : begin + per_block + 1]
        passed = {name: inside[-1][name] - inside[0][name] for name in inside[0]}
        a_step = passed["cpu_seconds"] / passed["step"]
        a_repetition = passed["reference_seconds"] / passed["repetitions"]
        memory = float(np.mean([one["memory_mib"] for one in inside[1:]]))
        blocks.append({
            "step": inside[-1]["step"], "memory_mib": round(memory, 2), "cpu_ms": round(1000 * a_step, 3),
            "reference_ms": round(1000 * a_repetition, 3), "repetitions_a_step": round(a_step / a_repetition, 4),
        })  # fmt: skip
    each = 10_000 / BLOCK
    memory, memory_bound = slope_bound(np.array([block["memory_mib"] for block in blocks]))
    times = np.array([block["repetitions_a_step"] for block in blocks])
    cpu, cpu_bound = slope_bound(times / times.mean())
    growth = {"memory_mib": memory * each, "cpu_percent": 100 * cpu * each}
    bounds = {"memory_mib": memory_bound * each, "cpu_percent": 100 * cpu_bound * each}
    above = [name for name, bound in bounds.items() if bound > LARGEST_GROWTH[name]]
    problems = [f"{name}: up to {bounds[name]:.2f} in 10,000 steps" for name in above]
    # The least in a block: a look may come while a checkpoint is written, which holds one more of each.
    least = {
        name: [int(min(one[name] for one in looks)) for looks in (counted[:per_block], counted[-per_block:])]
        for name in ("descriptors", "threads")
    }
    problems += [f"{name}: {early} at the beginning, {late} at the end" for name, (early, late) in least.items()
                 if early != late]  # fmt: skip
    return {"growth_in_10000_steps": growth, "upper_bounds": bounds, "least_in_first_and_last_block": least,
            "problems": problems, "blocks": blocks}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run it, append to the record, and return 1 if something grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="(%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/campaign/soak"), help="scenes and run (%(default)s)")
    parser.add_argument("--record", type=Path, default=RECORD, help="appended to (%(default)s)")
    arguments = parser.parse_args(argv)
    work = arguments.work.resolve()
    scenes, run = work / "scenes", work / f"run_{int(time.time())}"
    write_scenes(scenes, train=6, val=1, size=(32, 64), seed=0, shard_size=5, workers=1, report=lambda _: None)
    settings = [*tiny_overrides(scenes, run), *SETTINGS, f"train.steps={arguments.steps}"]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of what is started from here on
    with reference() as beside:
        life = Start(run, settings, launch=None)
        os.sched_setaffinity(0, cores)
        try:
            looks = watch(life, arguments.steps, beside)
        finally:
            for process in family(life.launcher.pid):
                kill(process)
    assert life.launcher.returncode == 0, life.log.read_text()[-3000:]
    line = {"steps": arguments.steps, "settings": SETTINGS, **judged(looks), **provenance(REPOSITORY)}
    JsonLines(arguments.record).append(line)
    print(json.dumps({name: value for name, value in line.items() if name != "blocks"}, indent=1))
    return int(bool(line["problems"]))


if __name__ == "__main__":
    sys.exit(main())
