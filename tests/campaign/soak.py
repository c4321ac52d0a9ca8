#!/usr/bin/env python
"""A tiny run of many steps: memory, descriptors, threads and CPU time a step have to stay what they are.

python -m tests.campaign.soak [--steps 20000] [--work FOLDER] [--record FILE]

One process trains, with checkpoints and evaluations on the way, and is looked at from outside (/proc) every 100 steps.
From step 2,000 on, means of blocks of 500 steps are fitted by a line. Its slope has an upper bound of 95 %, one-sided,
whose standard error allows for residuals that depend on the one before (AR(1)). The line of the record holds the bounds
and the blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
"""Student's t, 95 % one-sided, 30 degrees of freedom; there are 36 blocks."""


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


def watch(life: Start, steps: int) -> list[dict[str, float]]:
    """Look at a run whenever it has logged, until it ends."""
    looks: list[dict[str, float]] = []
    while life.launcher.poll() is None:
        step = last_step(life.run)
        if step and step < steps and (not looks or step > looks[-1]["step"]):
            looks.append({"step": step, **look(life.launcher.pid)})
            JsonLines(life.run.with_suffix(".jsonl")).append(looks[-1])
        time.sleep(0.1)
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
        cpu = (inside[-1]["cpu_seconds"] - inside[0]["cpu_seconds"]) / (inside[-1]["step"] - inside[0]["step"])
        memory = float(np.mean([one["memory_mib"] for one in inside[1:]]))
        blocks.append({"step": inside[-1]["step"], "memory_mib": round(memory, 2), "cpu_ms": round(1000 * cpu, 3)})
    each = 10_000 / BLOCK
    memory, memory_bound = slope_bound(np.array([block["memory_mib"] for block in blocks]))
    times = np.array([block["cpu_ms"] for block in blocks])
    cpu, cpu_bound = slope_bound(times / times.mean())
    growth = {"memory_mib": memory * each, "cpu_percent": 100 * cpu * each}
    bounds = {"memory_mib": memory_bound * each, "cpu_percent": 100 * cpu_bound * each}
    above = [name for name, bound in bounds.items() if bound > LARGEST_GROWTH[name]]
    problems = [f"{name}: up to {bounds[name]:.2f} in 10,000 steps" for name in above]
    # The most in a block: while a checkpoint is written there is one more of each.
    most = {
        name: [int(max(one[name] for one in looks)) for looks in (counted[:per_block], counted[-per_block:])]
        for name in ("descriptors", "threads")
    }
    problems += [f"{name}: {early} at the beginning, {late} at the end" for name, (early, late) in most.items()
                 if early != late]  # fmt: skip
    return {"growth_in_10000_steps": growth, "upper_bounds": bounds, "most_in_first_and_last_block": most,
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
    life = Start(run, settings, launch=None)
    try:
        looks = watch(life, arguments.steps)
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
