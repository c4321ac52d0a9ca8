#!/usr/bin/env python
"""Slurm jobs disturbed at random moments: each has to end finished, with the bits of a job that nobody disturbed.

python -m tests.campaign.slurm_rounds [--rounds 20] [--first 0] [--only KIND] [--work FOLDER] [--record FILE]

A signal, time limit or requeue may cost one step, a kill what came after the last whole checkpoint.

Every round is one job of slurm/train_mfm.sh on a private cluster of two nodes (tests/slurm/cluster.py), ZeRO-2 or
ZeRO-3. It is disturbed once or twice (KINDS below), left to itself, and compared with the undisturbed job of its stage.
One JSON line of the record a round; rounds on record are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal as signals
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mfm_dist.shards.scene_shards import write_scenes
from mfm_dist.storage import JsonLines
from tests.helpers.processes import family, kill
from tests.helpers.runs import REPOSITORY, SCENE_SIZE, final_tensors, metrics_of, tiny_overrides
from tests.slurm.cluster import ENDED, Cluster, missing, steps_of

RECORD = Path("docs/benchmarks/slurm_rounds.json")
STEPS = 100
INTERVAL = 10
SETTINGS = [f"train.steps={STEPS}", f"checkpoint.every={INTERVAL}", "eval.every=50", "eval.overlays=0",
            "self_training.pseudo_threshold=0", "watchdog.seconds=60"]  # fmt: skip
"""Beside ``tiny_overrides``."""
WRITING = 5
"""Steps that may pass while a checkpoint is written beside them; a kill then goes back to the one before."""
SAVED = ("signal", "time limit", "requeue")
"""Disturbances that leave time to save."""
PATIENCE = 600.0
"""Seconds for a job to end, with everything that happens to it."""


class Round:
    """One job and what happens to it."""

    def __init__(self, cluster: Cluster, clone: Path, work: Path, number: int, kind: str) -> None:
        self.cluster, self.clone, self.kind = cluster, clone, kind
        self.draw = random.Random(f"slurm {number} {kind}")
        self.stage = 2 + (number + number // len(KINDS)) % 2
        self.scenes, self.run = work / "scenes", work / f"{number:02d} {kind}"
        self.preflight = "1" if kind == "scratch" else self.draw.choice("01")
        self.disk = work / "disk"
        if kind == "scratch" and self.draw.choice([True, False]):
            self.run, self.preflight = self.disk / "run", "0"
        self.options: list[str] = []
        self.overrides: list[str] = []
        self.told: list[str] = []
        self.lost_steps: list[int] = []
        self.job = 0
        shutil.rmtree(self.run, ignore_errors=True)

    def submit(self) -> None:
        defaults = str(REPOSITORY / "tests" / "defaults.yaml")
        settings = [*tiny_overrides(self.scenes, self.run), *SETTINGS, *self.overrides]
        options = ["--nodes=2", f"--output={self.run}.out", *self.options]
        self.job = self.cluster.submit(
            *options, "slurm/train_mfm.sh", defaults, *settings,
            cwd=self.clone, MFM_ZERO_STAGE=str(self.stage), MFM_PREFLIGHT=self.preflight,
        )  # fmt: skip
        self.folder = self.run / "jobs" / str(self.job)

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {PATIENCE:g} s: {what}")
            time.sleep(0.1)

    def state(self) -> dict[str, str]:
        return self.cluster.job(self.job)

    def output(self) -> list[str]:
        return Path(f"{self.run}.out").read_text().splitlines()

    def step(self) -> int:
        return max((int(line["step"]) for line in JsonLines(self.run / "metrics.jsonl")), default=0)

    def attempts(self) -> list[dict[str, Any]]:
        """Those that are over."""
        return [line for line in JsonLines(self.folder / "attempts.jsonl") if line["kind"] != "begun"]

    def somewhere(self, beyond: int = 0) -> int:
        """Wait for a random step, and a random part of it."""
        aim = self.draw.randrange(beyond + 1, STEPS - 15)
        self.wait_for(lambda: self.step() >= aim or self.state()["JobState"] in ENDED, f"step {aim}")
        time.sleep(self.draw.uniform(0, 0.3))
        return aim

    def disturb(self, what: str, act: Callable[[], object]) -> None:
        """Do it, and note what it cost once the attempt is over."""
        attempts, restarts, seen = len(self.attempts()), self.state()["Restarts"], self.step()
        begun = len(self.begun())
        self.told.append(f"{what} at step {seen}")
        act()

        def over() -> bool:
            nonlocal seen
            ended = len(self.attempts()) > attempts or self.state()["Restarts"] != restarts
            if not ended:
                seen = max(seen, self.step())
            return ended

        self.wait_for(over, f"the attempt has ended after {what}")
        self.wait_for(lambda: len(self.begun()) > begun or self.state()["JobState"] in ENDED, "the next attempt")
        if len(self.begun()) > begun:
            self.lost_steps.append(max(seen - self.begun()[-1], 0))

    def begun(self) -> list[int]:
        """The step that each attempt began from."""
        return [int(line.rpartition("; from step ")[2]) for line in self.summary() if "; from step " in line]

    def summary(self) -> list[str]:
        path = self.folder / "summary.log"
        return path.read_text().splitlines() if path.exists() else []

    def finish(self) -> str:
        self.wait_for(lambda: self.state().get("JobState") in ENDED, "the job has ended")
        return self.state()["JobState"]


def signal(job: Round) -> None:
    """Twice: to the script, as Slurm announces the end; or to the ranks."""
    beyond = 0
    for _ in range(2):
        beyond = job.somewhere(beyond)
        if beyond > STEPS - 30:
            beyond = STEPS - 30
        how = job.draw.choice([["--batch", "--signal=USR1"], ["--signal=USR1"], ["--signal=TERM"]])
        job.disturb(f"scancel {' '.join(how)}", lambda how=how: job.cluster.run("scancel", *how, str(job.job)))


def time_limit(job: Round) -> None:
    """Slurm warns 30 s ahead, or up to a minute earlier."""
    job.somewhere()
    hours, minutes, seconds = map(int, job.state()["RunTime"].split(":"))

    def limit(minutes: int) -> None:
        job.cluster.run("scontrol", "update", f"JobId={job.job}", f"TimeLimit={minutes}", check=False)

    job.disturb("time limit drawn nearer", lambda: limit(60 * hours + minutes + 1 + (seconds > 30)))
    limit(60)  # a busy machine may need longer to start than what was left


def requeue(job: Round) -> None:
    """As an administrator, or preemption by requeue, does."""
    job.somewhere()
    job.disturb("scontrol requeue", lambda: job.cluster.run("scontrol", "requeue", str(job.job)))


def node(job: Round) -> None:
    """A power cut of one node; the job may go on with the other."""
    job.somewhere()
    victim = job.draw.choice(job.cluster.nodes)
    job.disturb(f"{victim} killed", lambda: job.cluster.kill_node(victim))
    job.wait_for(lambda: job.state()["JobState"] in {"RUNNING", *ENDED}, "the restart")
    job.finish()
    job.cluster.start_node(victim)


def rank(job: Round) -> None:
    """SIGKILL of a rank, e.g. by the kernel for want of memory."""
    job.somewhere()
    victim = job.draw.choice(job.cluster.nodes)
    processes = [p for step in steps_of(victim, job.cluster.folder) for p in family(step)]
    ranks = [process for process in processes if _is_rank(process)]
    job.disturb(f"a rank on {victim} killed", lambda: kill(ranks[-1]))


def scratch(job: Round) -> None:
    """The scratch disk of the nodes is full, or that of the run folder gets full. It is told once, the job ends, and
    when there is room again the same command goes on."""
    if job.run.parent == job.disk:
        job.somewhere()
    _fill(job.disk)
    job.told.append(f"{'run folder' if job.run.parent == job.disk else 'scratch'} full at step {job.step()}")
    state = job.finish()
    reasons = [line for line in job.output() if "cannot be written" in line or "No space left" in line]
    job.told.append(f"{state}: {reasons[-1] if reasons else 'without a reason'}")
    assert reasons, job.output()
    (job.disk / "full").unlink()
    job.submit()


KINDS: dict[str, Callable[[Round], None]] = {
    "signal": signal,
    "time limit": time_limit,
    "requeue": requeue,
    "node": node,
    "rank": rank,
    "scratch": scratch,
}


def one_round(cluster: Cluster, clone: Path, work: Path, number: int, kind: str) -> dict[str, Any]:
    """One line of the record."""
    began = time.monotonic()
    job = Round(cluster, clone, work, number, kind)
    reference = undisturbed(cluster, clone, work, job.stage)
    if kind == "time limit":
        job.options = ["--time=60", "--signal=B:USR1@30"]
    if kind == "node":
        job.options = ["--nodes=1-2"]
    if kind == "scratch" and job.run.parent != job.disk:
        job.overrides = [f"data.scratch={job.disk}"]
    _wait_idle(cluster)
    problem, state = None, "?"
    try:
        job.submit()
        KINDS[kind](job)
        state = job.finish()
    except (TimeoutError, AssertionError) as error:
        problem = str(error)
        cluster.run("scancel", str(job.job), check=False)
    compared = compare(job.run, reference) if state == "COMPLETED" else {}
    fewer = any("1 node(s)" in line for line in job.summary())
    record = {
        "round": number, "kind": kind, "zero": job.stage, "preflight": job.preflight == "1", "disturbed": job.told,
        "state": state, "lost_steps": job.lost_steps, "on_fewer_nodes": fewer, **compared,
        "problem": problem, "attempts": [attempt["reason"] for attempt in job.attempts()],
        "seconds": round(time.monotonic() - began), "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }  # fmt: skip
    record["good"] = is_good(record)
    if record["good"]:
        shutil.rmtree(job.run)
    return record


def is_good(record: Mapping[str, Any]) -> bool:
    """Whether a round ended as it should: finished, with the right bits, and no more steps lost than its kind may."""
    if record["state"] != "COMPLETED" or record["problem"] is not None:
        return False
    same = record["identical"] or (record["on_fewer_nodes"] and record["largest_difference"] < 1e-4)
    may_lose = 1 if record["kind"] in SAVED else INTERVAL + WRITING
    return bool(same) and all(lost <= may_lose for lost in record["lost_steps"])


def undisturbed(cluster: Cluster, clone: Path, work: Path, stage: int) -> Path:
    """The job that nobody disturbs, run once a stage."""
    run = work / f"undisturbed_zero{stage}"
    if not (run / "eval" / f"step_{STEPS:08d}.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        settings = [*tiny_overrides(work / "scenes", run), *SETTINGS]
        defaults = str(REPOSITORY / "tests" / "defaults.yaml")
        number = cluster.submit(
            "--nodes=2", f"--output={run}.out", "slurm/train_mfm.sh", defaults, *settings,
            cwd=clone, MFM_ZERO_STAGE=str(stage), MFM_PREFLIGHT="0",
        )  # fmt: skip
        state = cluster.wait(number, seconds=PATIENCE)
        assert state == "COMPLETED", Path(f"{run}.out").read_text()
    return run


def compare(run: Path, reference: Path) -> dict[str, Any]:
    """Two finished runs: every tensor of the last checkpoint and every logged number."""
    ours, theirs = final_tensors(run, STEPS), final_tensors(reference, STEPS)
    shared = ours.keys() & theirs.keys()
    identical = ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in shared)
    # BatchNorm's statistics are averages over the ranks: not the same at another number of them.
    students = [
        name for name in shared if name.startswith("student/") and "running_" not in name and "num_b" not in name
    ]
    return {
        "identical": identical and metrics_of(run) == metrics_of(reference),
        "largest_difference": max(float((ours[name] - theirs[name]).abs().max()) for name in students),
    }


def _is_rank(process: int) -> bool:
    """Python that torchrun started, rather than a launcher or one of its loader processes."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
        return b"RANK=" in Path(f"/proc/{process}/environ").read_bytes() and b"accelerate" not in command
    except OSError:
        return False


def _fill(disk: Path) -> None:
    """Until nothing more goes on it, which a job may be writing to meanwhile."""
    with suppress(OSError), (disk / "full").open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass


def _wait_idle(cluster: Cluster) -> None:
    deadline = time.monotonic() + 120
    while cluster.idle() != cluster.nodes:
        if time.monotonic() > deadline:
            raise TimeoutError(f"idle nodes: {cluster.idle()}")
        time.sleep(0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rounds; 0 if every one on record was good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first (%(default)s)")
    parser.add_argument("--only", choices=KINDS, help="all rounds of this kind")
    parser.add_argument("--work", type=Path, default=Path("runs/campaign/slurm"), help="runs (%(default)s)")
    parser.add_argument("--record", type=Path, default=RECORD, help="appended to (%(default)s)")
    arguments = parser.parse_args(argv)
    if reason := missing():
        raise SystemExit(reason)
    work = arguments.work.resolve()
    write_scenes(
        work / "scenes", train=12, val=5, size=SCENE_SIZE, seed=0, shard_size=5, workers=1, report=lambda _: None
    )
    clone = work / "a clone"
    shutil.rmtree(clone, ignore_errors=True)
    for name in ("mfm_dist", "configs", "slurm"):
        shutil.copytree(REPOSITORY / name, clone / name, ignore=shutil.ignore_patterns("__pycache__", "site.env"))
    (clone / "slurm" / "site.env").write_text(f'MFM_PYTHON="{sys.executable}"\nMFM_PROCESSES_PER_NODE=1\n')
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    record = JsonLines(arguments.record)
    done = {line["round"] for line in record}
    disk = work / "disk"
    disk.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", disk], check=False).returncode == 0
    signals.signal(signals.SIGTERM, signals.default_int_handler)  # leave no cluster behind
    cluster = Cluster(2, node_timeout=100)  # so that the script has to notice a lost node before Slurm does
    try:
        for number in range(arguments.first, arguments.first + arguments.rounds):
            kind = arguments.only or list(KINDS)[number % len(KINDS)]
            if number in done:
                continue
            if kind == "scratch" and not mounted:
                print(f"round {number}: not run, a small disk of its own needs root")
                continue
            line = one_round(cluster, clone, work, number, kind)
            record.append(line)
            print(json.dumps(line), flush=True)
    finally:
        cluster.stop()
        if mounted:
            subprocess.run(["umount", disk], check=False)
    return 0 if all(line["good"] for line in record) else 1


if __name__ == "__main__":
    sys.exit(main())
