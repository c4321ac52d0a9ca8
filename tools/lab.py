#!/usr/bin/env python
"""The lab: questions, each a plan of runs written down and committed before the first of them starts.

  tools/lab.py plan E0                       the runs, which are on record, how many core-hours the others take
  tools/lab.py run E0 --workers 2 --nice     train what is not on record; the same command goes on
  tools/lab.py run E0 --task $SLURM_ARRAY_TASK_ID --tasks 10      every tenth run, as a task of a Slurm array
  tools/lab.py collect E0 [--json] [--figure FILE]                differences of arms, paired by seed

PLAN is a name in configs/lab/plans or a file. A run is an arm of the plan on a bed, for one seed; its figure is the
mean target mIoU at 80, 90 and 100 % of its steps. Every finished run, failed ones too, is appended at once to
RECORDS/lab_BED.jsonl, with what its probe and its instruments say of the Rebuilder. Runs of one bed and seed with the
same settings are the same run, whichever plan asked for it. What ran on a GPU and what did not are kept apart: with
--gpu every command knows the one, without it the other. Nothing runs from a clone with uncommitted changes, for a
record names its commit. Interrupted runs go on from their folder if they could save, and begin again if not. Exit
codes: 0 done, 1 runs failed, 2 wrong arguments or plan, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

import mfm_dist
from mfm_dist.build import render_scenes
from mfm_dist.errors import EXIT_DONE, ConfigError, tell_user_errors
from mfm_dist.inference.probe import why_no_probe
from mfm_dist.run.folder import OUTCOME

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is searched, not the one above it
from mfm_dist.config.arguments import whole
from mfm_dist.storage import JsonLines
from tools.lab_results import collect, draw, show_results
from tools.lab_runs import BEDS, OUTCOMES, PLANS, SCORED_AT, Plan, Records, Run, read_plan

SOURCES = ("mfm_dist", "tools", "configs", "setup.py", "constraints.txt")
"""What a run depends on; a change of these that is not committed keeps the lab from running."""
PROBE = Path("tools/probe_rebuilder.py")
SECONDS_A_STEP = {"stride8": (0.12, 0.20), "aligned": (0.12, 0.20), "stride32": (0.27, 0.70)}
"""DACS without and with MFM, ten evaluations shared out: CPU time of short runs on one core (AMD EPYC), stride 8 for
aligned too. An estimate for beds that have no record yet."""
INSTRUMENTS = ("mfm/", "rebuilder/")
"""How names begin of what a run logs about its Rebuilder (docs/stability.md)."""
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def clean_commit(clone: Path, plan: Path) -> str:
    """Return the commit that runs from this clone are of.

    Raises:
        ConfigError: the plan, or what runs depend on, is not committed; this is no clone; or ``mfm_dist`` is another's.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(clone), *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ConfigError(f"the lab runs plans that are committed, in their clone: {done.stderr.strip()}")
        return done.stdout.strip()

    git("ls-files", "--error-unmatch", str(plan.absolute()))
    if changed := git("status", "--porcelain", "--", *SOURCES, str(plan.absolute())):
        raise ConfigError(f"uncommitted changes, with which no record could be made again; commit them:\n{changed}")
    used = Path(mfm_dist.__file__).resolve().parent.parent
    if used != clone.resolve():
        raise ConfigError(f"mfm_dist is that of {used}, not of this clone: start with PYTHONPATH={clone.resolve()}")
    return git("rev-parse", "HEAD")


def machine() -> dict[str, Any]:
    """Describe this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "torch": version("torch")}


class Lab:
    """Trains runs, several at a time, and puts each on record."""

    def __init__(self, plan: Plan, arguments: argparse.Namespace, commit: str) -> None:
        self.plan, self.records = plan, Records(arguments.records, gpu=arguments.gpu)
        self.runs, self.keep = arguments.runs, arguments.keep
        self.prefix = ["nice", "-n", "19"] if arguments.nice else []
        self.slots = asyncio.Semaphore(arguments.workers)
        self.commit, self.machine = commit, machine()

    async def perform(self, run: Run) -> bool:
        """Train one run, probe it, put it on record; tell whether it needs no second try."""
        async with self.slots:
            folder, begun = run.folder(self.runs), time.monotonic()
            resumed = (folder / "checkpoints" / "latest").exists()
            bed = str(BEDS / f"{run.bed}.yaml")
            said = [*run.overrides, f"seed={run.seed}", f"run.folder={folder}"]
            folder.mkdir(parents=True, exist_ok=True)
            code = await self._execute(["-m", "mfm_dist.train", "--config", bed, *said], folder / "train")
            record = {
                "question": self.plan.name, "bed": run.bed, "arm": run.arm, "overrides": list(run.overrides),
                "settings": run.settings, "seed": run.seed, "commit": self.commit, "machine": self.machine,
                **device_of(folder),
                **scores_of(run, folder), "instruments": instruments_of(run, folder), "probe": None,
                "events": dict(Counter(line["event"] for line in JsonLines(folder / "events.jsonl"))),
                "seconds": round(time.monotonic() - begun, 1), "resumed": resumed, "code": code,
                "reason": reason_of(folder, code),
            }  # fmt: skip
            if code == EXIT_DONE and not why_no_probe(run.config):
                record["probe"] = await self._probe(folder)
            self.records.append(record)
            if code in OUTCOMES and not self.keep:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            figure = "no figure" if record["figure"] is None else f"{record['figure']:.2f} %"
            print(
                f"{run.bed} {run.arm} seed {run.seed}: {figure}, {record['reason']}, {record['seconds']:.0f} s",
                flush=True,
            )
            return code in OUTCOMES

    async def _probe(self, folder: Path) -> dict[str, Any]:
        """Return what the probe of a finished run says, or why it said nothing."""
        code = await self._execute([str(PROBE), "--run", str(folder), "--json"], folder / "probe")
        try:
            found: dict[str, Any] = json.loads((folder / "probe.out").read_text())
        except ValueError:
            return {"failed": f"exit code {code}: {last_line(folder / 'probe.err')}"}
        return found

    async def _execute(self, words: Sequence[str], log: Path) -> int:
        """Run Python on one thread and return its exit code; where the lab is interrupted, have it save and end.

        What it prints goes to ``log`` with the endings .out and .err.
        """
        hidden = {} if self.records.gpu else {"CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **hidden}
        command = [*self.prefix, sys.executable, *words]
        with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
            # A session of its own: Ctrl-C reaches it once, through the lab.
            process = await asyncio.create_subprocess_exec(
                *command, stdout=out, stderr=err, env=environment, start_new_session=True
            )
        try:
            return await process.wait()
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
            raise

    async def perform_all(self, runs: Sequence[Run]) -> bool:
        """Perform runs; a signal ends those that are on their way, which are not put on record."""
        work = asyncio.gather(*(self.perform(run) for run in runs))
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, work.cancel)
        return all(await work)


def device_of(folder: Path) -> dict[str, Any]:
    """Return what a run trained on, as it says itself; None where it did not come so far."""
    path = folder / "environment.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    return {"device": said.get("device"), "gpus": said.get("gpus")}


def scores_of(run: Run, folder: Path) -> dict[str, Any]:
    """Return the target mIoU by step, the figure, None where one of its evaluations is missing, and the last IoUs."""
    found = [json.loads(path.read_text()) for path in sorted((folder / "eval").glob("step_*.json"))]
    by_step = {scores["step"]: scores["miou"] for scores in found if scores["miou"] is not None}
    scored = [by_step[step] for step in run.scored_steps if by_step.get(step) is not None]
    figure = statistics.fmean(scored) if len(scored) == len(SCORED_AT) else None
    evaluations = {str(step): miou for step, miou in by_step.items()}
    return {"evaluations": evaluations, "figure": figure, "iou": found[-1]["iou"] if found else None}


def instruments_of(run: Run, folder: Path) -> dict[str, dict[str, float]]:
    """Return what a run logged of MFM and the Rebuilder: the mean of its lines, and of those of its last fifth."""
    lines, last = JsonLines(folder / "metrics.jsonl"), SCORED_AT[0] * run.config.train.steps
    kept = [
        {name: line[name] for name in line if name.startswith(INSTRUMENTS)} | {"step": line["step"]} for line in lines
    ]
    found: dict[str, dict[str, float]] = {}
    for name in sorted(set().union(*kept) - {"step"}):
        values = {line["step"]: line[name] for line in kept if line.get(name) is not None}
        if not values:  # none of them was finite
            continue
        late = [value for step, value in values.items() if step > last]
        found[name] = {"mean": statistics.fmean(values.values())}
        if late:
            found[name]["late"] = statistics.fmean(late)
    return found


def reason_of(folder: Path, code: int) -> str:
    """Say how a run ended: what it wrote itself, else the last line of its output."""
    outcome = json.loads((folder / OUTCOME).read_text()) if (folder / OUTCOME).exists() else {}
    if outcome.get("code") == code:
        return str(outcome["reason"])
    return f"exit code {code}: {last_line(folder / 'train.err')}"


def last_line(path: Path) -> str:
    """Return the last line of what a process printed."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def show_plan(plan: Plan, records: Records) -> str:
    """Return what a plan asks for, what of it is on record, and how long the rest takes."""
    lines, known, rest = records.lines(plan.runs), records.of(plan.runs), 0.0
    shown = [plan.question, "", f"{'bed':<10} {'arm':<24} {'on record':>9} {'s a run':>8}"]
    for bed, arm in product(plan.beds, plan.arms):
        runs = [run for run in plan.runs if (run.bed, run.arm) == (bed, arm)]
        done, config = sum(run in known for run in runs), runs[0].config
        alike = [line for line in lines if line["bed"] == bed and line["figure"] is not None and not line["resumed"]]
        same = [line for line in alike if tuple(line["overrides"]) == runs[0].overrides]
        measured = [line["seconds"] / max(map(int, line["evaluations"])) for line in same or alike]
        a_step = SECONDS_A_STEP.get(bed, max(SECONDS_A_STEP.values()))[config.mfm.enabled]
        seconds = config.train.steps * (statistics.median(measured) if measured else a_step)
        rest += seconds * (len(runs) - done)
        guess = "" if same else "  (of this bed's other runs)" if alike else "  (of short runs)"
        shown.append(f"{bed:<10} {arm:<24} {done:>4} of {len(runs):<2} {seconds:>7.0f}{guess}")
    return "\n".join(
        [*shown, "", f"{len(known)} of {len(plan.runs)} on record; the rest: {rest / 3600:.1f} core-hours"]
    )


def run(plan: Plan, arguments: argparse.Namespace, commit: str) -> int:
    """Carry out the ``run`` command and return its exit code."""
    if arguments.gpu and not torch.cuda.is_available():
        raise ConfigError("--gpu, but torch finds no GPU here")
    if arguments.task >= arguments.tasks:
        raise ConfigError(f"--task {arguments.task} is none of 0 to {arguments.tasks - 1}, which --tasks asks for")
    lab = Lab(plan, arguments, commit)
    mine = plan.runs[arguments.task :: arguments.tasks]
    wanted = [one for one in mine if one not in lab.records.of(mine)]
    for config in {one.config.data.root: one.config for one in wanted}.values():
        render_scenes(config)
    print(f"{len(mine) - len(wanted)} of {len(mine)} runs on record; {len(wanted)} to go", flush=True)
    try:
        return EXIT_DONE if asyncio.run(lab.perform_all(wanted)) else EXIT_FAILED
    except asyncio.CancelledError:
        print("interrupted; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of three sub-commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {"plan": "what there is to do", "run": "train", "collect": "what came out"}
    plan, train, results = (commands.add_parser(name, help=text) for name, text in helps.items())
    for command in (plan, train, results):
        command.add_argument("plan", metavar="PLAN", help=f"a name in {PLANS}, or a file")
        command.add_argument("--records", type=Path, default=Path("docs/benchmarks"), help="folder (%(default)s)")
        command.add_argument("--gpu", action="store_true", help="runs on a GPU, which have records of their own")
    train.add_argument("--workers", type=whole(1), default=1, help="runs side by side, one thread each (1)")
    train.add_argument("--nice", action="store_true", help="at the lowest priority")
    train.add_argument("--task", type=whole(0), default=0, help="number of this task, from 0")
    train.add_argument("--tasks", type=whole(1), default=1, help="tasks that share the runs (1)")
    train.add_argument("--runs", type=Path, default=Path("runs/lab"), help="scratch folder (%(default)s)")
    train.add_argument("--keep", action="store_true", help="keep the checkpoints of runs that are on record")
    results.add_argument("--json", action="store_true", help="as JSON")
    results.add_argument("--figure", type=Path, metavar="FILE", help="draw the contrasts, .png, .svg or .pdf")
    return parser


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    plan = read_plan(arguments.plan)
    records = Records(arguments.records, gpu=arguments.gpu)
    if arguments.command == "run":
        return run(plan, arguments, clean_commit(Path.cwd(), plan.path))
    if arguments.command == "plan":
        print(show_plan(plan, records))
        return EXIT_DONE
    results = collect(plan, records)
    print(json.dumps(results, indent=1) if arguments.json else show_results(results))
    if arguments.figure:
        draw(results, arguments.figure)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
