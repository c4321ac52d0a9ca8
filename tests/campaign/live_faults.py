#!/usr/bin/env python
"""Live runs of two ranks, disturbed; each has to end or to go on, and outcome.json has to be true.

python -m tests.campaign.live_faults [--rounds 100] [--first 0] [--only KIND] [--seed 0] [--work FOLDER] [--record FILE]

A round is one run at ZeRO-2 or ZeRO-3 that meets with one of KINDS; then the same command is given again until the run
is done. At the same world and stage it ends with the bits of an undisturbed run: every tensor of the last checkpoint
and every logged number; in another world it has been trained on the same samples. One line of the record a round;
rounds on record are not run again. With ``--tree`` the code of another clone is tried.

So that a round takes seconds, ranks are forked where everything is imported (tests/helpers/forked_commands.py), in the
environment that ``accelerate launch`` gives. The real launcher is disturbed in ``kills`` and ``slurm_rounds``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mfm_dist.storage import JsonLines
from tests.campaign.kills import different, last_step
from tests.helpers.forked_commands import ForkedCommands, ForkedLaunch
from tests.helpers.processes import family, is_running, kill, wait_until
from tests.helpers.provenance import provenance
from tests.helpers.runs import DEFAULTS, REPOSITORY, read_json, tiny_overrides

RECORD = REPOSITORY / "docs" / "benchmarks" / "live_faults.jsonl"
STEPS = 12
SETTINGS = [f"train.steps={STEPS}", "checkpoint.every=3", "checkpoint.keep=9", "eval.overlays=0", "log.trackers=[]",
            "self_training.pseudo_threshold=0", "data.crop=32x32", "model.decoder=segformer",
            "model.decoder_options={width: 8}", "rebuilder.width=8", "rebuilder.grid=1",
            "debug.check_gradients=false"]  # fmt: skip
"""Beside ``tiny_overrides``."""
PATIENCE = 600.0
"""Seconds given to any start on a busy machine."""
SILENCE = 10.0
"""``watchdog.seconds`` where a rank is stopped."""

ODD_LINES = [b"null\n", b"3\n", b'{"step": "x"}\n', b"\xff\n", b"[\n", b"9" * 5000]


class Round:
    """One run, what happens to it, and what was not as promised."""

    def __init__(self, commands: ForkedCommands, work: Path, seed: int, number: int, kind: str) -> None:
        self.commands, self.work, self.kind = commands, work, kind
        self.stage = 2 + (number // len(KINDS)) % 2
        self.draw = random.Random(f"live {seed} {number} {kind}")
        self.aim = self.draw.randrange(3, STEPS - 5)
        self.scenes, self.run = work / "scenes", work / f"{number:03d}"
        self.samples = work / f"{number:03d}.samples"
        self.problems: list[str] = []
        self.notes: dict[str, Any] = {}

    def start(self, *overrides: str, form: str = "", otherwise: str = "") -> ForkedLaunch:
        """Give the command, perhaps in another form or with a change of ``train_otherwise``."""
        arguments = [*settings(self.scenes, self.run), *overrides]
        said = {"OTHERWISE": otherwise, "SAMPLES": f"{self.run}.samples"}
        ranks = environments(self.commands.tree, self.work, form or f"cpu_zero{self.stage}")
        return self.commands.launch(self.run, arguments, [{**rank, **said} for rank in ranks])

    def at_step(self, life: ForkedLaunch, step: int) -> dict[int, int]:
        """Wait for a step; return the process of each rank."""
        wait_until(
            lambda: last_step(self.run) >= step or life.poll() is not None,
            seconds=PATIENCE, what=f"step {step}",
        )  # fmt: skip
        self.expect(life.poll() is None, f"it ended before step {step}: {life.log.read_text()[-600:]}")
        self.expect(not (self.run / "outcome.json").exists(), "outcome.json is there while the run goes on")
        self.notes["step"] = last_step(self.run)
        return life.ranks()

    def ends(self, life: ForkedLaunch) -> int:
        """Wait for the end of a start and of everything below it; return the launcher's code."""
        code = life.wait(PATIENCE)
        if code is None:
            self.problems.append(f"it did not end: {life.log.read_text()[-600:]}")
            stop(life)
        return -1 if code is None else code

    def expect(self, holds: bool, problem: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(problem)

    def expect_outcome(self, life: ForkedLaunch, *codes: int | None, says: str = "") -> None:
        """Compare outcome.json with what happened; None among the codes: it may be missing, as after a kill."""
        outcome, output = read_json(self.run / "outcome.json"), life.log.read_text()
        code = outcome.get("code")
        self.notes["code"] = code
        self.expect(code in codes, f"outcome.json says {outcome or 'nothing'}; it ended with: {output[-600:]}")
        self.expect(code is None or says in str(outcome.get("reason")), f"the reason is not told: {outcome}")
        if code is not None and code != 0:
            self.expect(outcome["step"] >= self.notes["step"], f"{outcome} is of a step before the last one logged")
        traceback = re.search(r'Traceback(?s:.*)File "[^"]*mfm_dist/(?s:.*)', output)
        self.expect(traceback is None, f"a traceback: {traceback and traceback[0][:100] + traceback[0][-1500:]}")

    def finish(self, same_bits: bool = True) -> None:
        """Give the command again, to the end, and compare."""
        life = self.start()
        self.expect(self.ends(life) == 0, f"the same command does not go on: {life.log.read_text()[-1500:]}")
        self.compare(same_bits)

    def compare(self, same_bits: bool = True) -> None:
        """Compare the finished run with the undisturbed one."""
        outcome = read_json(self.run / "outcome.json")
        self.expect((outcome.get("code"), outcome.get("step")) == (0, STEPS), f"at the end outcome.json says {outcome}")
        if same_bits and not self.problems:
            names = different(self.run, self.work / f"undisturbed_{self.stage}", STEPS)
            self.expect(not names, f"not the bits of an undisturbed run: {names[:5]}")

    def end_somehow(self, life: ForkedLaunch) -> None:
        """Expect an end that outcome.json does not call better than it was: what a rank holds may do to the end."""
        whole = self.ends(life) == 0
        self.expect_outcome(life, *((0,) if whole else (None, 1, 4)))
        self.finish()

    # What happens to a run.

    def signalled(self) -> None:
        """The launcher, which passes it on, or all ranks are sent a signal."""
        life = self.start()
        ranks = self.at_step(life, self.aim)
        number = self.draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
        for process in self.draw.choice([[life.pid], [*ranks.values()], [life.pid, *ranks.values()]]):
            os.kill(process, number)
        self.notes["signal"] = number.name
        self.ends(life)
        self.expect_outcome(life, 75, says="SIG")
        self.finish()

    def rank_killed(self) -> None:
        """One rank or both are killed."""
        life = self.start()
        ranks = self.at_step(life, self.aim)
        for rank in self.draw.choice([(0,), (1,), (0, 1)]):
            kill(ranks[rank])
        self.expect(self.ends(life) != 0, "it ended with 0")
        self.expect_outcome(life, None, 1, 75)
        self.finish()

    def launcher_killed(self) -> None:
        """The launcher is killed, and everything below it is gone soon."""
        life = self.start()
        self.at_step(life, self.aim)
        everyone = family(life.pid)
        kill(life.pid)
        self.ends(life)
        wait_until(lambda: not any(map(is_running, everyone)), seconds=60, what="everyone gone")
        self.expect_outcome(life, None, 75)
        self.finish()

    def worker_killed(self) -> None:
        """A loader's worker is killed, as the system does when memory is short."""
        life = self.start("data.workers=1")
        ranks = self.at_step(life, self.aim)
        workers = [process for process in family(ranks[self.draw.randrange(2)])[1:] if is_worker(process)]
        for process in workers:
            kill(process)
        self.expect(bool(workers), "no worker was found")
        self.expect(self.ends(life) != 0, "it ended with 0")
        self.expect_outcome(life, 1, says="orker")
        self.finish()

    def folder_removed(self) -> None:
        """Somebody removes the run folder, and it stays removed."""
        life = self.start()
        self.at_step(life, self.aim)
        while self.run.exists():
            shutil.rmtree(self.run, ignore_errors=True)
        self.expect(self.ends(life) != 0, "it ended with 0")
        self.expect(not self.run.exists(), f"the folder is back: {sorted(p.name for p in self.run.glob('*'))}")
        self.expect("gone" in life.log.read_text(), f"it does not say so: {life.log.read_text()[-1500:]}")
        shutil.rmtree(self.run, ignore_errors=True)
        self.finish()

    def immutable_file(self) -> None:
        """A file of the run cannot be written any more."""
        life = self.start()
        self.at_step(life, self.aim)
        file = self.run / "metrics.jsonl"
        set_it = subprocess.run(["chattr", "+i", str(file)], capture_output=True, text=True, check=False)
        if set_it.returncode != 0:
            self.notes["not_tried"] = set_it.stderr.strip()
            stop(life)
            return
        self.expect(self.ends(life) != 0, "it ended with 0")
        subprocess.run(["chattr", "-i", str(file)], check=True)
        self.expect_outcome(life, 4, says="metrics.jsonl")
        self.finish()

    def disk_full(self) -> None:
        """No file can grow beyond 256 KiB any more: the next checkpoint fails."""
        life = self.start()
        resource.prlimit(self.at_step(life, self.aim)[0], resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
        self.expect(self.ends(life) != 0, "it ended with 0")
        self.expect_outcome(life, 4, says="could not be written")
        self.finish()

    def no_descriptors(self) -> None:
        """A rank gets no more descriptors."""
        life = self.start()
        process = self.at_step(life, self.aim)[self.draw.randrange(2)]
        count = len(os.listdir(f"/proc/{process}/fd"))
        resource.prlimit(process, resource.RLIMIT_NOFILE, (count, count))
        self.notes["descriptors"] = count
        self.end_somehow(life)

    def no_memory(self) -> None:
        """A rank gets no more memory."""
        life = self.start()
        process = self.at_step(life, self.aim)[self.draw.randrange(2)]
        size = int(Path(f"/proc/{process}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(process, resource.RLIMIT_AS, (size, size))
        self.end_somehow(life)

    def rank_stopped(self) -> None:
        """A rank stops; the watchdogs of the others end the run and name it."""
        life = self.start(f"watchdog.seconds={SILENCE:g}", "checkpoint.every=1000")
        ranks = self.at_step(life, self.aim)
        stopped = self.draw.randrange(2)
        os.kill(ranks[stopped], signal.SIGSTOP)
        wait_until(
            lambda: (self.run / "outcome.json").exists() or life.poll() is not None,
            seconds=PATIENCE, what="the watchdog",
        )  # fmt: skip
        kill(ranks[stopped])  # what the launcher does after PET_SHUTDOWN_TIMEOUT
        self.ends(life)
        self.expect_outcome(life, 76, says=f"rank {stopped}")
        self.finish()

    def paused(self) -> None:
        """All ranks stop for some seconds, as when a machine sleeps, and go on."""
        life = self.start()
        ranks = self.at_step(life, self.aim)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in ranks.values():
                os.kill(process, number)
            time.sleep(self.draw.uniform(1, 5) if number == signal.SIGSTOP else 0)
        self.expect(self.ends(life) == 0, f"it did not go on: {life.log.read_text()[-1500:]}")
        self.compare()

    def clock_set_back(self) -> None:
        """The clock of the processes goes back by an hour."""
        life = self.start(otherwise="clock_set_back")
        self.expect(self.ends(life) == 0, f"it did not go on: {life.log.read_text()[-1500:]}")
        self.compare()

    def second_start(self) -> None:
        """The same command is given while the run goes on: it is refused, and the run does not notice."""
        life = self.start("eval.every=5")  # or it has ended before the second is refused
        self.at_step(life, 1)
        second = self.start("eval.every=5")
        self.expect(self.ends(second) != 0, "the second start ended with 0")
        said, outcome = second.log.read_text(), (self.run / "outcome.json").exists()
        self.expect("at work in" in said or "in use" in said, f"the second does not say why: {said[-600:]}")
        if life.poll() is None:
            self.notes["first_went_on"] = True
            self.expect(not outcome, "the second start has written the first one's outcome")
        self.expect(self.ends(life) == 0, f"the first ended: {life.log.read_text()[-600:]}")
        self.compare()

    def damaged_checkpoint(self) -> None:
        """After a kill, a bit of the newest checkpoint is another one; it is kept aside."""
        life = self.start()
        ranks = self.at_step(life, max(self.aim, 7))
        for process in ranks.values():
            kill(process)
        self.ends(life)
        newest = max((self.run / "checkpoints").glob("step_*"))
        file = self.draw.choice(sorted(newest.rglob("*.safetensors")))
        content = bytearray(file.read_bytes())
        content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        file.write_bytes(content)
        self.notes["file"] = file.name
        self.finish()
        aside = self.run / "checkpoints" / "set_aside"
        found = [path.read_bytes() == bytes(content) for path in aside.rglob(file.name)]
        self.expect(any(found), f"the damaged checkpoint is gone; set aside: {[str(p) for p in aside.glob('*')]}")

    def odd_lines(self) -> None:
        """After a kill, files of lines end in the middle of one and hold odd ones."""
        life = self.start()
        ranks = self.at_step(life, max(self.aim, 6))
        for process in ranks.values():
            kill(process)
        self.ends(life)
        for name in ("metrics.jsonl", "events.jsonl"):
            with (self.run / name).open("ab") as file:
                file.writelines(self.draw.sample(ODD_LINES, 3))
        self.finish()

    def world_changed(self) -> None:
        """The run goes on at another stage and number of ranks, with the same samples."""
        self.samples.unlink(missing_ok=True)
        life = self.start(otherwise="samples_noted")
        ranks = self.at_step(life, self.aim)
        for process in ranks.values():
            os.kill(process, signal.SIGTERM)
        self.ends(life)
        self.expect_outcome(life, 75, says="SIGTERM")
        form = self.notes["then"] = self.draw.choice(["alone", "cpu_ddp", f"cpu_zero{5 - self.stage}"])
        life = self.start(form=form, otherwise="samples_noted")
        self.expect(self.ends(life) == 0, f"it does not go on there: {life.log.read_text()[-1500:]}")
        self.compare(same_bits=False)
        seen = sorted(set(self.samples.read_text().splitlines()))  # a block that was under way is trained on again
        whole = self.work / f"undisturbed_{self.stage}.samples"
        self.expect(seen == sorted(whole.read_text().splitlines()), "other samples than without the change")


KINDS: dict[str, Callable[[Round], None]] = {
    "signal": Round.signalled, "rank killed": Round.rank_killed, "launcher killed": Round.launcher_killed,
    "worker killed": Round.worker_killed, "folder removed": Round.folder_removed,
    "immutable file": Round.immutable_file, "full disk": Round.disk_full, "no descriptors": Round.no_descriptors,
    "no memory": Round.no_memory, "rank stopped": Round.rank_stopped, "paused": Round.paused,
    "clock set back": Round.clock_set_back, "second start": Round.second_start,
    "damaged checkpoint": Round.damaged_checkpoint, "odd lines": Round.odd_lines, "world changed": Round.world_changed,
}  # fmt: skip


def settings(scenes: Path, run: Path) -> list[str]:
    """Return the arguments of the command."""
    return [*DEFAULTS, *tiny_overrides(scenes, run), *SETTINGS]


def environments(tree: Path, work: Path, form: str) -> list[dict[str, str]]:
    """Return what ``accelerate launch`` gives to each rank of a launch file, asked of it once."""
    if form == "alone":
        return [{}]
    file = work / f"{form}.json"
    if not file.exists():
        launch_file = str(tree / "configs" / "accelerate" / f"{form}.yaml")
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
        command += ["--config_file", launch_file, str(work / "tell.py")]
        code = "import json, os\njson.dump(dict(os.environ), open(f'{__file__}.' + os.environ['RANK'], 'w'))\n"
        (work / "tell.py").write_text(code)
        subprocess.run(command, cwd=tree, capture_output=True, check=True)
        ranks = [read_json(work / f"tell.py.{rank}") for rank in range(2)]
        ours = re.compile("ACCELERATE_|TORCHELASTIC_|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|ROLE_NAME|OMP_")
        ranks = [{name: value for name, value in rank.items() if ours.match(name)} for rank in ranks]
        for rank in ranks:
            rank["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # here rank 0 has the store
        file.write_text(json.dumps(ranks))
    return list(json.loads(file.read_text()))


def is_worker(process: int) -> bool:
    """Tell a loader's worker from the helpers that Python and torch start."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return b"resource_tracker" not in command and is_running(process)


def stop(life: ForkedLaunch) -> None:
    """Leave nothing of a start."""
    for process in family(life.pid):
        kill(process)


def undisturbed(commands: ForkedCommands, work: Path, stage: int) -> None:
    """Make the run that nobody disturbs, once, and note its samples."""
    run = work / f"undisturbed_{stage}"
    if read_json(run / "outcome.json").get("code") == 0:
        return
    shutil.rmtree(run, ignore_errors=True)
    Path(f"{run}.samples").unlink(missing_ok=True)
    said = {"OTHERWISE": "samples_noted" if commands.tree == REPOSITORY else "", "SAMPLES": f"{run}.samples"}
    ranks = [{**rank, **said} for rank in environments(commands.tree, work, f"cpu_zero{stage}")]
    life = commands.launch(run, settings(work / "scenes", run), ranks)
    assert life.wait(PATIENCE) == 0, life.log.read_text()


def one_round(commands: ForkedCommands, work: Path, seed: int, number: int, kind: str) -> dict[str, Any]:
    """Run a round; return its line of the record."""
    this = Round(commands, work, seed, number, kind)
    shutil.rmtree(this.run, ignore_errors=True)
    undisturbed(commands, work, this.stage)
    began = time.monotonic()
    try:
        KINDS[kind](this)
    except Exception as error:  # whatever it is, the round did not go as promised
        this.problems.append(f"{type(error).__name__}: {error}")
    if not this.problems:
        for path in work.glob(f"{this.run.name}_*"):
            path.unlink()
        shutil.rmtree(this.run, ignore_errors=True)
        this.samples.unlink(missing_ok=True)
    seconds = round(time.monotonic() - began, 1)
    found = [problem.replace(str(work), "WORK") for problem in this.problems]
    about = {"round": number, "seed": seed, "kind": kind, "stage": this.stage, **this.notes}
    return {**about, "as_promised": not found, "problems": found, "seconds": seconds, **provenance(commands.tree)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rounds; 0 if every one went as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (%(default)s)")
    parser.add_argument("--only", choices=sorted(KINDS), nargs="+", help="these kinds alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tree", type=Path, default=REPOSITORY, help="the clone to try (this one)")
    parser.add_argument("--work", type=Path, default=Path("runs/campaign/live"), help="scenes and runs (%(default)s)")
    parser.add_argument("--record", type=Path, default=RECORD, help="appended to (%(default)s)")
    arguments = parser.parse_args(argv)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    commands = ForkedCommands(arguments.tree.resolve())
    assert commands("scenes", work / "scenes", 32, 64, 6, 1).code == 0
    record = JsonLines(arguments.record)
    done = {line["round"] for line in record if line["seed"] == arguments.seed}
    good = True
    for number in range(arguments.first, arguments.first + arguments.rounds):
        kind = list(KINDS)[number % len(KINDS)]
        if number in done or (arguments.only and kind not in arguments.only):
            continue
        record.append(one_round(commands, work, arguments.seed, number, kind))
        line = list(record)[-1]
        print(json.dumps({name: line[name] for name in ("round", "kind", "stage", "problems", "seconds")}), flush=True)
        good = good and line["as_promised"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
