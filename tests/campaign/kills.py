#!/usr/bin/env python
"""Ranks killed with SIGKILL at random moments; the same command must then end with the bits of an undisturbed run.

python -m tests.campaign.kills [--stages 2 3] [--kills 20] [--work FOLDER] [--record FILE]

Each kill has a run of its own, of two processes below ``accelerate launch``: it starts, one rank or both are killed,
everything below the launcher has to be gone, the same command is given again, and what it saves at the end is compared
with the undisturbed run of that stage: every tensor of the last checkpoint (student, teacher, Rebuilder, optimiser,
each rank's buffers) by its bits, and every logged number. One line of the record a kill, then one with the sum.
A campaign that was interrupted goes on after the last kill on record.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mfm_dist.shards.scene_shards import write_scenes
from mfm_dist.storage import JsonLines
from tests.helpers.processes import family, is_running, wait_until
from tests.helpers.runs import SCENE_SIZE, Start, final_tensors, metrics_of, tiny_overrides

RECORD = Path("docs/benchmarks/campaign_kills.jsonl")
STEPS = 40
SETTINGS = [f"train.steps={STEPS}", "checkpoint.every=5", "eval.every=20", "data.workers=1",
            "self_training.pseudo_threshold=0"]  # fmt: skip
"""Beside ``tiny_overrides``. A random teacher is sure of nothing: above a threshold of 0 the Rebuilder would rest."""
START_UP = 12.0
"""Seconds after which a start has begun to train on two busy cores, about."""
STEP = 0.5
"""Seconds of a step there, about."""
WRITE = 0.02
"""Seconds of the write of a checkpoint, about."""
PATIENCE = 900.0
"""Seconds given to any start; a busy machine is slow under ZeRO-3."""


def ranks_below(launcher: int) -> dict[int, int]:
    """Process by rank, of those that a launcher has started by now."""
    found = {}
    for process in family(launcher)[1:]:
        try:
            environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        rank = [entry.removeprefix(b"RANK=") for entry in environment if entry.startswith(b"RANK=")]
        if rank and parent == launcher:  # loader workers have the variable too
            found[int(rank[0])] = process
    return found


def last_step(run: Path) -> int:
    return max((int(line["step"]) for line in JsonLines(run / "metrics.jsonl")), default=0)


@contextmanager
def started(run: Path, scenes: Path, stage: int) -> Iterator[Start]:
    """One start of the command, of which nothing is left at the end."""
    life = Start(run, [*tiny_overrides(scenes, run), *SETTINGS], launch=f"cpu_zero{stage}")
    try:
        yield life
    finally:
        for process in family(life.launcher.pid):
            if is_running(process):
                os.kill(process, signal.SIGKILL)
        life.launcher.wait()


def finishes(run: Path, scenes: Path, stage: int) -> str | None:
    """Run the command to its end; what it printed if that was not as it should be."""
    with started(run, scenes, stage) as life:
        code = life.launcher.wait(timeout=PATIENCE)
        output = life.output()
    return None if code == 0 and "RESULT" in output else output


def kill_somewhere(life: Start, draw: random.Random) -> dict[str, Any] | None:
    """Kill one rank or both at a random moment, and wait until nothing is left; None if the run was faster.

    A quarter of the moments lie in the start-up, a quarter in the write of a checkpoint, the rest anywhere.
    """
    kind = draw.choice(["start", "write", "step", "step"])
    aim = 0 if kind == "start" else draw.randrange(1, STEPS + 1)
    delay = draw.uniform(0, {"start": START_UP, "write": WRITE, "step": STEP}[kind])
    victims = draw.choice([(0,), (1,), (0, 1)])

    def ended() -> bool:
        return life.launcher.poll() is not None

    wait_until(lambda: len(ranks_below(life.launcher.pid)) == 2, seconds=PATIENCE, what="both ranks")
    if aim:
        wait_until(lambda: last_step(life.run) >= aim or ended(), seconds=PATIENCE, what=f"step {aim}")
    if kind == "write":
        unfinished = (life.run / "checkpoints").glob
        wait_until(lambda: any(unfinished(".step_*.tmp")) or ended(), seconds=PATIENCE, what="a checkpoint written")
    time.sleep(delay)
    everyone, ranks = family(life.launcher.pid), ranks_below(life.launcher.pid)
    if len(ranks) < 2:
        return None
    for rank in victims:
        os.kill(ranks[rank], signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: not any(map(is_running, everyone)), seconds=60, what="everyone gone")
    assert life.launcher.wait() != 0
    checkpoints = sorted(path.name for path in (life.run / "checkpoints").glob("step_*"))
    return {
        "kind": kind,
        "killed_ranks": list(victims),
        "aimed_at_step": aim,
        "delay_seconds": round(delay, 3),
        "last_step_logged": last_step(life.run),
        "newest_checkpoint": int(checkpoints[-1].removeprefix("step_")) if checkpoints else None,
        "unfinished_checkpoint": any((life.run / "checkpoints").glob(".step_*")),
        "seconds_until_all_gone": round(time.monotonic() - killed, 2),
    }


def different(run: Path, undisturbed: Path, step: int = STEPS) -> list[str]:
    """Names of the tensors that are not the same bits, and of anything else that is not equal."""
    ours, theirs = (final_tensors(folder, step) for folder in (run, undisturbed))
    names = [name for name in sorted({*ours, *theirs}) if name not in ours or name not in theirs]
    names += [name for name in theirs if name in ours and not ours[name].equal(theirs[name])]
    return names if metrics_of(run) == metrics_of(undisturbed) else [*names, "metrics.jsonl"]


def undisturbed_run(work: Path, stage: int) -> Path:
    """The run that nobody disturbs, made once."""
    run = work / f"undisturbed_zero{stage}"
    if not (run / "eval" / f"step_{STEPS:08d}.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        problem = finishes(run, work / "scenes", stage)
        assert problem is None, problem
    return run


def one_kill(work: Path, *, stage: int, number: int) -> dict[str, Any]:
    """One line of the record."""
    undisturbed = undisturbed_run(work, stage)
    for attempt in range(10):  # a kill that comes after the end of its run is drawn again
        run = work / f"zero{stage}_{number:02d}"
        shutil.rmtree(run, ignore_errors=True)
        with started(run, work / "scenes", stage) as life:
            moment = kill_somewhere(life, random.Random(f"kills {stage} {number} {attempt}"))
        if moment is not None:
            break
    else:
        raise AssertionError("ten kills in a row came too late")
    problem = finishes(run, work / "scenes", stage)
    names = different(run, undisturbed) if problem is None else [f"did not end well: {problem[-500:]}"]
    record = {
        "stage": stage, "kill": number, **moment, "tensors": len(final_tensors(undisturbed, STEPS)),
        "identical": not names, "different": names[:5], "date": datetime.now(timezone.utc).isoformat("T", "seconds"),
    }  # fmt: skip
    if not names:
        shutil.rmtree(run)
    return record


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last line of the record."""
    by_stage = {}
    for stage in sorted({record["stage"] for record in records}):
        of_stage = [record for record in records if record["stage"] == stage]
        by_stage[f"zero{stage}"] = {
            "kills": len(of_stage),
            "identical": sum(record["identical"] for record in of_stage),
            "before_step_1": sum(record["last_step_logged"] == 0 for record in of_stage),
            "during_a_write": sum(record["unfinished_checkpoint"] for record in of_stage),
            "longest_until_all_gone": max(record["seconds_until_all_gone"] for record in of_stage),
        }
    return {
        "summary": by_stage,
        "processes": 2,
        "steps": STEPS,
        "settings": SETTINGS,
        "packages": {name: version(name) for name in ("torch", "accelerate", "deepspeed")},
        "date": datetime.now(timezone.utc).isoformat("T", "seconds"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 0 if every kill ended with the same bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], metavar="N", help="ZeRO stages (%(default)s)")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="at each stage (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/campaign/kills"), help="scenes and runs (%(default)s)")
    parser.add_argument("--record", type=Path, default=RECORD, help="appended to (%(default)s)")
    arguments = parser.parse_args(argv)
    work = arguments.work.resolve()
    scenes = work / "scenes"
    write_scenes(scenes, train=12, val=5, size=SCENE_SIZE, seed=0, shard_size=5, workers=1, report=lambda _: None)
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    record = JsonLines(arguments.record)
    done = {(line["stage"], line["kill"]) for line in record if "kill" in line}
    for number in range(arguments.kills):
        for stage in arguments.stages:
            if (stage, number) not in done:
                record.append(one_kill(work, stage=stage, number=number))
                print(json.dumps(list(record)[-1]), flush=True)
    kills = [line for line in record if "kill" in line]
    record.append(summary(kills))
    print(json.dumps(list(record)[-1]))
    return 0 if all(line["identical"] for line in kills) else 1


if __name__ == "__main__":
    sys.exit(main())
