"""What slurm/train_mfm.sh does not decide in shell: one job of a batch system, over all its attempts and restarts.

    prepare      when the job starts for the first time: the code and the resolved configuration into RUN/jobs/JOB/,
                 whose path it prints; arguments that end in .yaml are configuration files, later ones win
    plan         before each attempt: what shares the global batch evenly; prints nodes and processes a node
    has_outcome  after each attempt: exit code 0 if the training said how it ended, 1 if a node may be lost
    next_action  then: prints done, again, stop, or requeue and the nodes to stay away from;
                 its exit code is the job's

An *attempt* is one start of the training, a *restart* a start of the job by Slurm after the first. The folder of a job
holds code/, config.yaml, node-N.log (what was printed on each node), attempts.jsonl and summary.log. Attempts are on
record from their start: one that takes the first node with it counts as failed. Needs no torch, so it answers at once.
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
from mfm_dist.config.shipped import PACKAGE, SHIPPED
from mfm_dist.errors import (
    EXIT_DONE,
    EXIT_ERROR,
    EXIT_HUNG,
    EXIT_MISMATCH,
    EXIT_STOPPED,
    EXIT_STORAGE,
    CorruptFileError,
    tell_user_errors,
)
from mfm_dist.run.folder import OUTCOME, REFUSED
from mfm_dist.storage import LARGEST_FILE, JsonLines, open_regular, read_json, read_text, write_atomically

QUICKSTART = Path("configs/quickstart.yaml")
ATTEMPTS = "attempts.jsonl"
SAME_STEP_FAILURES = 3
"""Failures in a row without a new checkpoint after which a job gives up."""
SAME_STEP_ATTEMPTS = 10
"""The same for attempts of any kind: stopped by a signal every time, before the first step of its own."""
PREFLIGHT = "preflight.json"
"""As ``mfm_dist.cluster.preflight`` writes it, which needs torch."""
SNAPSHOT = ("mfm_dist", "configs", "slurm", "setup.py", "constraints.txt")
TRY_AGAIN = (None, EXIT_ERROR, EXIT_HUNG, EXIT_MISMATCH)
"""Codes after which another attempt may do better; None where nothing was said."""
FAILURE = re.compile(r"^(\[rank\d+\]: *)?([\w.]*(Error|Exception)\b.*|hung: .*|.*exitcode *: -?\d.*)$")
"""Lines of a log that say why a process ended: Python's last line of a traceback, the watchdog's, torchrun's."""


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the four; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mfm_dist.cluster.job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare")
    command.add_argument("--job", required=True, help="its number")
    command.add_argument("--restart", action="store_true", help="Slurm has started it before")
    command.add_argument("--array-task", type=int, dest="seed", help="train with this seed, in a run folder of its own")
    command.add_argument("settings", nargs="*", metavar="FILE.yaml | section.key=value")
    command = commands.add_parser("plan")
    command.add_argument("--nodes", type=int, required=True, help="allocated")
    command.add_argument("--processes", type=int, required=True, help="on each of them")
    command.add_argument("folder", type=Path)
    commands.add_parser("has_outcome").add_argument("folder", type=Path)
    command = commands.add_parser("next_action")
    command.add_argument("--signalled", action="store_true", help="the end of the job was announced")
    command.add_argument("--cancelled", action="store_true", help="the job is being ended from outside")
    command.add_argument("--lost", type=_nodes, default=[], help="nodes that do not answer, separated by commas")
    command.add_argument("folder", type=Path)
    given = vars(parser.parse_args(argv))
    name = given.pop("command")
    try:
        if name == "has_outcome":
            return 0 if has_outcome(**given) else 1
        if name == "next_action":
            word, code = next_action(**given)
            print(word)
            return code
        printed = [prepare(**given)] if name == "prepare" else plan(**given)
    except OSError as error:  # what cannot be noted cannot be counted, and the training could not save either
        print(f"{error}: free some space, then submit the same command again", file=sys.stderr)
        return EXIT_STORAGE
    print(*printed or ())
    return 0 if printed else 1


def _nodes(text: str) -> list[str]:
    return [node for node in text.split(",") if node]


def prepare(settings: Sequence[str], *, job: str, seed: int | None, restart: bool) -> Path:
    """Make the job's folder, with the code and the configuration as they were when it started for the first time.

    Numbers of jobs come again, on another cluster or after years: a first start puts a folder of its number aside.

    Args:
        settings: configuration files, which end in .yaml or .yml, and ``section.key=value``.

    Raises:
        ConfigError: with everything that is wrong about the configuration.
    """
    files = [Path(text) for text in settings if "=" not in text and text.endswith((".yaml", ".yml"))]
    overrides = [text for text in settings if Path(text) not in files]
    config = load_config(files or [QUICKSTART], overrides)
    if seed is not None:
        config.seed = seed
        config.run.folder = config.run.folder / f"seed_{seed}"
    folder = config.run.folder / "jobs" / job
    if folder.exists() and not restart:
        folder.rename(folder.with_name(f"{job}.until-{time.strftime('%Y%m%d-%H%M%S')}"))
    if not (folder / "config.yaml").exists():
        _keep_code(folder / "code")
        write_atomically(folder / "config.yaml", dump_config(config))
    return folder


def _keep_code(code: Path) -> None:
    """Copy the package and what is shipped with it, and over it what the working folder has of the same names."""
    code.mkdir(parents=True, exist_ok=True)
    for name in SNAPSHOT:
        installed = PACKAGE if name == PACKAGE.name else SHIPPED / name
        for source in dict.fromkeys((installed.resolve(), Path(name).resolve())):  # in a clone they are one
            if source.is_dir():
                shutil.copytree(source, code / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            elif source.exists():
                shutil.copy2(source, code / name)


def plan(folder: Path, *, nodes: int, processes: int) -> tuple[int, int] | None:
    """Find how many nodes, and processes on each, are the most that share the global batch evenly. Begins an attempt.

    Returns:
        None if that is of no use any more.
    """
    config, attempts = load_config(folder / "config.yaml"), list(JsonLines(folder / ATTEMPTS))
    step = _saved_step(config)
    if attempts and attempts[-1]["kind"] == "begun":  # the node that was to say what comes next is gone
        attempts[-1], _ = _how_it_ended(config, folder.name, asked=False, lost=[])
        _write_attempts(folder, attempts)
        if _gives_up(folder, attempts, step):
            return None
    used, each = largest_world(config, nodes=nodes, processes=processes)
    if idle := nodes * processes - used * each:
        reason = _why_idle(config, nodes * processes)
        say(folder, f"of {nodes} node(s) x {processes} process(es), {idle} stay idle: {reason}")
    say(
        folder,
        f"attempt {len(attempts) + 1}: {used} node(s) x {each} process(es), train.global_batch="
        f"{config.train.global_batch} = {config.blocks_per_step} micro-batches of {config.train.micro_batch}, "
        f"{config.blocks_per_step // (used * each)} a process and step; from step {step}",
    )
    for report in (PREFLIGHT, OUTCOME, REFUSED):  # of the attempt before
        if _report(config, report, folder.name):
            (config.run.folder / report).unlink()
    for number in range(used):
        with (folder / f"node-{number}.log").open("a", encoding="utf-8") as log:
            log.write(f"=== attempt {len(attempts) + 1}, {time.strftime('%Y-%m-%d %H:%M:%S')} ===\n")
    begun = {"time": time.time(), "kind": "begun", "code": None, "reason": "begun", "step": step}
    _write_attempts(folder, [*attempts, begun])
    return used, each


def largest_world(config: RunConfig, *, nodes: int, processes: int) -> tuple[int, int]:
    """Return, of (nodes, processes a node), the pair with the most processes that fit the run, on the fewest nodes."""
    pairs = itertools.product(range(1, nodes + 1), range(1, processes + 1))
    fitting = [pair for pair in pairs if not config.world_problems(pair[0] * pair[1])]
    return max(fitting, key=lambda pair: (pair[0] * pair[1], pair[1]))


def _why_idle(config: RunConfig, processes: int) -> str:
    """Name what keeps the run from using that many, and what to change."""
    batch, share, lanes = config.train.global_batch, processes * config.train.micro_batch, config.data.lanes
    if lanes % processes:
        return f"data.lanes={lanes} cannot be shared evenly by more; a multiple of {processes} would use all"
    all_used = f"train.global_batch={-(-batch // share) * share} would use all"
    return f"train.global_batch={batch} cannot be shared evenly by more; {all_used}"


def has_outcome(folder: Path) -> bool:
    """Tell whether the training said how it ended, and it was not for want of an answer from some rank."""
    return _outcome(load_config(folder / "config.yaml"), folder.name).get("code") not in TRY_AGAIN


def next_action(folder: Path, *, signalled: bool, cancelled: bool, lost: Sequence[str]) -> tuple[str, int]:
    """Decide what to do after an attempt, and the exit code for the case that it is to stop."""
    config = load_config(folder / "config.yaml")
    attempt, away = _how_it_ended(config, folder.name, asked=signalled or cancelled, lost=lost)
    *before, _ = JsonLines(folder / ATTEMPTS)
    attempts = [*before, attempt]
    kind, step = attempt["kind"], attempt["step"]
    _write_attempts(folder, attempts)
    say(folder, f"attempt {len(attempts)} {kind}, saved up to step {step}: {attempt['reason']}")
    if kind == "ended":
        return ("done" if attempt["code"] == EXIT_DONE else "stop"), int(attempt["code"])
    if cancelled:
        say(folder, "ended from outside; if Slurm does not start it again by itself, the same command goes on")
        return "stop", EXIT_STOPPED
    if _gives_up(folder, attempts, step):
        return "stop", 1
    if kind == "stopped" or away or signalled:
        return f"requeue {','.join(dict.fromkeys(away))}".strip(), 0
    return "again", 0


def _how_it_ended(config: RunConfig, job: str, *, asked: bool, lost: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the line of attempts.jsonl for the attempt that is over, and the nodes to stay away from.

    Its kind is ``ended`` for good, ``stopped`` on request, or ``failed``.
    """
    outcome, preflight, away = _outcome(config, job), _report(config, PREFLIGHT, job), list(lost)
    code, reason = outcome.get("code"), str(outcome.get("reason", "ended without a word (killed, or a bug)"))
    kind = "stopped" if code == EXIT_STOPPED else "failed" if code in TRY_AGAIN else "ended"
    if code is None and preflight.get("problems"):
        reason, away = "preflight: " + "; ".join(preflight["problems"]), away + preflight["nodes"]
        if not away and preflight["code"] != EXIT_HUNG:
            kind, code = "ended", int(preflight["code"])
    elif code is None and asked:
        kind, reason = "stopped", "asked to stop before training began"
    if lost:
        reason += f"; nodes that do not answer: {', '.join(lost)}"
    return {"time": time.time(), "kind": kind, "code": code, "reason": reason, "step": _saved_step(config)}, away


def _gives_up(folder: Path, attempts: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Tell whether the last attempts brought no checkpoint beyond ``step`` too often, and say why if so."""
    here = [attempt for attempt in attempts if attempt["step"] == step]
    failures = [attempt for attempt in here if attempt["kind"] == "failed"]
    if len(failures) < SAME_STEP_FAILURES and len(here) < SAME_STEP_ATTEMPTS:
        return False
    lines = [
        f"GIVING UP: {len(here)} attempts in a row brought no checkpoint beyond step {step}. Started once more it "
        f"would do the same; mend the cause below, then submit the same command, which goes on from step {step}."
    ]
    lines += [f"  attempt: {attempt['reason']}" for attempt in here[-SAME_STEP_FAILURES:]]
    for log in sorted(folder.glob("node-*.log")):
        found = first_failure(_end_of(log))
        lines.append(f"  {log.name}: {found or 'no error in it'}")
    say(folder, "\n".join([*lines, f"  all of it: {folder}"]))
    return True


def say(folder: Path, text: str) -> None:
    """Write a line to the job's summary and to whoever reads its output."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
    print(line, file=sys.stderr, flush=True)
    with (folder / "summary.log").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def first_failure(log: str) -> str | None:
    """Return the first line that names an error, in what a log holds of the last attempt; later ones follow from it."""
    last = log.rpartition("=== attempt ")[2]
    return next((line.strip()[:300] for line in last.splitlines() if FAILURE.match(line.strip())), None)


def _end_of(log: Path) -> str:
    """Read the last megabytes of a log, which may have grown without bounds."""
    with open_regular(log) as file:
        file.seek(max(0, log.stat().st_size - LARGEST_FILE))
        return file.read().decode(errors="replace")


def _outcome(config: RunConfig, job: str) -> dict[str, Any]:
    """Read how the training of this job ended, in the run's folder or refused beside another's run."""
    return _report(config, OUTCOME, job) or _report(config, REFUSED, job)


def _report(config: RunConfig, name: str, job: str) -> dict[str, Any]:
    """Read what this job said in a file of the run folder; empty if it could not, or if another job said it."""
    with suppress(OSError, CorruptFileError):
        report = read_json(config.run.folder / name)
        if report.get("job") == job:
            return report
    return {}


def _saved_step(config: RunConfig) -> int:
    """Return where the next start would go on; 0 where nothing is saved."""
    with suppress(OSError, CorruptFileError, ValueError):
        name = read_text(config.run.folder / "checkpoints" / "latest")
        return int(name.strip().removeprefix("step_"))
    return 0


def _write_attempts(folder: Path, attempts: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(folder / ATTEMPTS, "".join(json.dumps(attempt) + "\n" for attempt in attempts))


if __name__ == "__main__":
    sys.exit(main())
