"""What slurm/train_mfm.sh does not decide in shell: one job of a batch system, over all its attempts and lives.

    prepare   in the first life: the code and the resolved configuration into RUN/jobs/JOB/, whose path it prints
    plan      before each attempt: what shares the global batch evenly; prints nodes and processes a node
    answered  after each attempt: exit code 0 if the training said how it ended, 1 if a node may be lost
    verdict   then: prints done, again, stop, or requeue and the nodes to stay away from;
              its exit code is the job's

A *life* is the time from one start of the job by Slurm to the next, an *attempt* one start of the training. The folder
of a job holds code/, config.yaml, node-N.log (what was printed on each node), attempts.jsonl and summary.log. Attempts
are on record from their start: one that takes the first node, and so its verdict, with it counts as failed. Needs no
torch, so it answers at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mfm_dist.config.loader import dump_config, load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import EXIT_DONE, EXIT_HUNG, EXIT_MISMATCH, EXIT_STOPPED, EXIT_STORAGE, UserError
from mfm_dist.run.folder import OUTCOME
from mfm_dist.storage import write_atomically

SAME_STEP_FAILURES = 3
"""Failures in a row without a new checkpoint after which a job gives up."""
SAME_STEP_ATTEMPTS = 10
"""The same for attempts of any kind: stopped by a signal every time, before the first step of its own."""
PREFLIGHT = "preflight.json"
"""As ``mfm_dist.cluster.preflight`` writes it, which needs torch."""
SNAPSHOT = ("mfm_dist", "configs", "slurm", "setup.py", "constraints.txt")
FAILURE = re.compile(r"^(\[rank\d+\]: *)?([\w.]*(Error|Exception)\b.*|hung: .*|.*exitcode *: -?\d.*)$")
"""Lines of a log that say why a process ended: Python's last line of a traceback, the watchdog's, torchrun's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the four; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mfm_dist.cluster.job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare")
    command.add_argument("--job", required=True, help="its number")
    command.add_argument("--restart", action="store_true", help="not its first life")
    command.add_argument("--array-task", type=int, help="train with this seed, in a run folder of its own")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command = commands.add_parser("plan")
    command.add_argument("--nodes", type=int, required=True, help="allocated")
    command.add_argument("--processes", type=int, required=True, help="on each of them")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("answered")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("verdict")
    command.add_argument("--signalled", action="store_true", help="the end of the job was announced")
    command.add_argument("--cancelled", action="store_true", help="the job is being ended from outside")
    command.add_argument("--lost", default="", help="nodes that do not answer any more, separated by commas")
    command.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "prepare":
            of = {"job": arguments.job, "seed": arguments.array_task, "restart": arguments.restart}
            print(prepare(arguments.config, arguments.overrides, **of))
        elif arguments.command == "plan":
            planned = plan(arguments.folder, nodes=arguments.nodes, processes=arguments.processes)
            if planned is None:
                return 1
            print(*planned)
        elif arguments.command == "answered":
            return 0 if has_outcome(arguments.folder) else 1
        else:
            word, code = next_action(
                arguments.folder,
                signalled=arguments.signalled,
                cancelled=arguments.cancelled,
                lost=[node for node in arguments.lost.split(",") if node],
            )
            print(word)
            return code
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:  # what cannot be noted cannot be counted, and the training could not save either
        print(f"{error}: free some space, then submit the same command again", file=sys.stderr)
        return EXIT_STORAGE
    return 0


def prepare(config_file: Path, overrides: Sequence[str], *, job: str, seed: int | None, restart: bool) -> Path:
    """The job's folder, with the code and the configuration as they were when it started for the first time.

    Numbers of jobs come again, on another cluster or after years: a first life puts a folder aside that has its number.

    Raises:
        ConfigError: with everything that is wrong about the configuration.
    """
    config = load_config(config_file, overrides)
    if seed is not None:
        config.seed = seed
        config.run.folder = config.run.folder / f"seed_{seed}"
    folder = config.run.folder / "jobs" / job
    if folder.exists() and not restart:
        folder.rename(folder.with_name(f"{job}.until-{time.strftime('%Y%m%d-%H%M%S')}"))
    if not (folder / "config.yaml").exists():
        for name in SNAPSHOT:
            source, target = Path(name), folder / "code" / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            elif source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", dump_config(config))
    return folder


def plan(folder: Path, *, nodes: int, processes: int) -> tuple[int, int] | None:
    """How many nodes, and processes on each: the most that share the global batch evenly. Begins an attempt.

    Returns:
        None if that is of no use any more.
    """
    config = load_config(folder / "config.yaml")
    attempts, step = _attempts(folder), _saved_step(config)
    if attempts and attempts[-1]["kind"] == "begun":  # the node that was to give the verdict is gone
        attempts[-1], _ = _how_it_ended(config, folder.name, asked=False, lost=[])
        _write_attempts(folder, attempts)
        if _is_loop(attempts, step):
            say(folder, _diagnosis(folder, attempts, step))
            return None
    used, each = largest_world(config, nodes=nodes, processes=processes)
    batch = f"train.global_batch={config.train.global_batch}"
    idle = nodes * processes - used * each
    if idle:
        reason = _why_idle(config, nodes * processes)
        say(folder, f"of {nodes} node(s) x {processes} process(es), {idle} stay idle: {reason}")
    say(
        folder,
        f"attempt {len(attempts) + 1}: {used} node(s) x {each} process(es), {batch} = "
        f"{config.blocks_per_step} micro-batches of {config.train.micro_batch}, "
        f"{config.blocks_per_step // (used * each)} a process and step; from step {step}",
    )
    for report in (PREFLIGHT, OUTCOME):  # of the attempt before
        if _report(config, report, folder.name):
            (config.run.folder / report).unlink()
    for number in range(used):
        with (folder / f"node-{number}.log").open("a", encoding="utf-8") as log:
            log.write(f"=== attempt {len(attempts) + 1}, {time.strftime('%Y-%m-%d %H:%M:%S')} ===\n")
    begun = {"time": time.time(), "kind": "begun", "code": None, "reason": "begun", "step": step}
    _write_attempts(folder, [*attempts, begun])
    return used, each


def largest_world(config: RunConfig, *, nodes: int, processes: int) -> tuple[int, int]:
    """Of (nodes, processes a node), the pair with the most processes that the run fits, on the fewest nodes."""
    pairs = itertools.product(range(1, nodes + 1), range(1, processes + 1))
    return max(
        (pair for pair in pairs if not config.world_problems(pair[0] * pair[1])),
        key=lambda pair: (pair[0] * pair[1], pair[1]),
    )


def _why_idle(config: RunConfig, processes: int) -> str:
    """What keeps the run from using that many, and what to change."""
    train, lanes = config.train, config.data.lanes
    if lanes % processes:
        return f"data.lanes={lanes} cannot be shared evenly by more; a multiple of {processes} would use all"
    share = processes * train.micro_batch
    all_used = -(-train.global_batch // share) * share
    return (
        f"train.global_batch={train.global_batch} cannot be shared evenly by more; "
        f"train.global_batch={all_used} would use all"
    )


def has_outcome(folder: Path) -> bool:
    """Whether the training said how it ended, and it was not for want of an answer from some rank."""
    outcome = _report(load_config(folder / "config.yaml"), OUTCOME, folder.name)
    return outcome.get("code") not in (None, EXIT_HUNG, EXIT_MISMATCH)


def next_action(folder: Path, *, signalled: bool, cancelled: bool, lost: Sequence[str]) -> tuple[str, int]:
    """What to do after an attempt, and the exit code for the case that it is to stop."""
    config = load_config(folder / "config.yaml")
    attempt, away = _how_it_ended(config, folder.name, asked=signalled or cancelled, lost=lost)
    attempts, step = [*_attempts(folder)[:-1], attempt], attempt["step"]
    _write_attempts(folder, attempts)
    say(folder, f"attempt {len(attempts)} {attempt['kind']}, saved up to step {step}: {attempt['reason']}")

    if attempt["kind"] == "ended":
        return ("done" if attempt["code"] == EXIT_DONE else "stop"), int(attempt["code"])
    if cancelled:
        say(folder, "ended from outside; if Slurm does not start it again by itself, the same command goes on")
        return "stop", EXIT_STOPPED
    if _is_loop(attempts, step):
        say(folder, _diagnosis(folder, attempts, step))
        return "stop", 1
    if attempt["kind"] == "stopped" or away or signalled:
        return f"requeue {','.join(dict.fromkeys(away))}".strip(), 0
    return "again", 0


def _how_it_ended(config: RunConfig, job: str, *, asked: bool, lost: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The line of attempts.jsonl for the attempt that is over, and the nodes to stay away from.

    Its kind is ``ended`` for good, ``stopped`` on request, or ``failed``.
    """
    outcome = _report(config, OUTCOME, job)
    code = outcome.get("code")
    reason = str(outcome.get("reason", "ended without a word (killed, or a bug)"))
    away = list(lost)
    kind = "stopped" if code == EXIT_STOPPED else "failed" if code in (EXIT_HUNG, EXIT_MISMATCH, None) else "ended"
    if code is None and asked:
        kind, reason = "stopped", "asked to stop before training began"
    preflight = _report(config, PREFLIGHT, job)
    if code is None and preflight.get("problems"):
        reason, nodes = "preflight: " + "; ".join(preflight["problems"]), preflight["nodes"]
        passes = nodes or lost or preflight["code"] == EXIT_HUNG
        kind, code, away = ("failed", None, away + nodes) if passes else ("ended", int(preflight["code"]), away)
    if lost:
        reason += f"; nodes that do not answer: {', '.join(lost)}"
    return {"time": time.time(), "kind": kind, "code": code, "reason": reason, "step": _saved_step(config)}, away


def _is_loop(attempts: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Whether the last attempts brought no checkpoint beyond ``step``, too often."""
    here = [attempt["kind"] for attempt in attempts if attempt["step"] == step]
    return here.count("failed") >= SAME_STEP_FAILURES or len(here) >= SAME_STEP_ATTEMPTS


def say(folder: Path, text: str) -> None:
    """A line for the job's summary and for whoever reads its output."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
    print(line, file=sys.stderr, flush=True)
    with (folder / "summary.log").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _diagnosis(folder: Path, attempts: Sequence[Mapping[str, Any]], step: int) -> str:
    """Why it is of no use to go on."""
    here = [attempt for attempt in attempts if attempt["step"] == step]
    lines = [
        f"GIVING UP: {len(here)} attempts in a row brought no checkpoint beyond step {step}. Started once more it "
        f"would do the same; mend the cause below, then submit the same command, which goes on from step {step}."
    ]
    lines += [f"  attempt: {attempt['reason']}" for attempt in here[-SAME_STEP_FAILURES:]]
    for log in sorted(folder.glob("node-*.log")):
        found = first_failure(log.read_text(encoding="utf-8", errors="replace"))
        lines.append(f"  {log.name}: {found or 'no error in it'}")
    return "\n".join([*lines, f"  all of it: {folder}"])


def first_failure(log: str) -> str | None:
    """The first line that names an error, in what a log holds of the last attempt; later ones follow from it."""
    last = log.rpartition("=== attempt ")[2]
    return next((line.strip()[:300] for line in last.splitlines() if FAILURE.match(line.strip())), None)


def _report(config: RunConfig, name: str, job: str) -> dict[str, Any]:
    """What this job said in a file of the run folder; empty if it could not, or if the file is of another job."""
    with suppress(OSError, ValueError):
        report = json.loads((config.run.folder / name).read_text(encoding="utf-8"))
        if isinstance(report, dict) and report.get("job") == job:
            return report
    return {}


def _saved_step(config: RunConfig) -> int:
    """Where the next start would go on; 0 where nothing is saved."""
    with suppress(OSError, ValueError):
        name = (config.run.folder / "checkpoints" / "latest").read_text(encoding="utf-8")
        return int(name.strip().removeprefix("step_"))
    return 0


def _attempts(folder: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        return [json.loads(line) for line in (folder / "attempts.jsonl").read_text(encoding="utf-8").splitlines()]
    return []


def _write_attempts(folder: Path, attempts: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(folder / "attempts.jsonl", "".join(json.dumps(attempt) + "\n" for attempt in attempts))


if __name__ == "__main__":
    sys.exit(main())
