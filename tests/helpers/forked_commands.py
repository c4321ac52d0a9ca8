"""The commands of a clone, each call in a process of its own that is forked where everything is imported already.

As a program it is that process: it reads one call a line, as JSON, and answers with a line. It imports nothing of this
repository but what a call names, and that from the working folder, so that other commits can be tried too.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

CALLS = {
    "train": ["mfm_dist.train:main"],
    "evaluate": ["mfm_dist.evaluate:main"],
    "predict": ["mfm_dist.predict:main"],
    "export": ["mfm_dist.export:main"],
    "report": ["mfm_dist.report.__main__:main"],
    "check": ["mfm_dist.shards.check:main", "tools.check_shards:main"],
    "config": ["mfm_dist.config.loader:load_config"],
    "scenes": ["mfm_dist.shards.scene_shards:write_scenes", "mfm_dist.data.scene_shards:write_scenes"],
    "adopt": ["tests.helpers.damaged_shards:adopt", "tests.damaged_shards:adopt"],
}
"""What a call may name, and where it stands or once stood."""
WARM = ["accelerate", "deepspeed", "timm", "mfm_dist.build", "mfm_dist.trainer", "mfm_dist.distributed.start",
        "mfm_dist.checkpoint.resume", "mfm_dist.session"]  # fmt: skip
"""What commands import late."""
MEMORY = 6 << 30
"""Bytes that a call may take beyond what is there."""
KEPT = 16_384
"""Characters of an output that are kept."""


class Answer(NamedTuple):
    """What became of a call."""

    code: int
    """Exit code, or minus the number of the signal that ended it."""
    cpu: float
    """Seconds, of its children too."""
    output: str
    """stdout and stderr, the first ``KEPT`` characters."""
    length: int
    """Bytes of the whole output."""


class ForkedCommands:
    """The process that forks, of one clone."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        variables = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                     "DS_ACCELERATOR": "cpu"}  # fmt: skip
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=tree, env=variables, text=True, stdin=pipe, stdout=pipe
        )

    def __call__(self, call: str, *arguments: object, seconds: float = 60.0) -> Answer:
        """Call something of ``CALLS``; it is killed where it takes more seconds of CPU time, or ten times as long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = {"call": call, "arguments": [str(one) for one in arguments], "seconds": seconds}
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def launch(self, run: Path, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]) -> ForkedLaunch:
        """Start training in a process for each environment, below a launcher that ends them all when one has failed.

        Args:
            run: the run folder, beside which the output goes.
            environments: what a real launcher gives to each rank. ``OTHERWISE`` names a change of ``train_otherwise``.
        """
        log = run.with_name(f"{run.name}_{time.time()}.log")
        pid = self("launch", log, json.dumps([dict(one) for one in environments]), *arguments).code
        return ForkedLaunch(run, log, pid)

    def close(self) -> None:
        """End it."""
        self._process.communicate()


class ForkedLaunch(NamedTuple):
    """A run below a launcher, that was started by ``ForkedCommands.launch``."""

    run: Path
    log: Path
    pid: int
    """Of the launcher."""

    def ranks(self) -> dict[int, int]:
        """Return the process of each rank."""
        file = self.log.with_suffix(".ranks")
        return dict(enumerate(json.loads(file.read_text()))) if file.exists() else {}

    def poll(self) -> int | None:
        """Return the launcher's code, -9 where it left none, None while it runs."""
        file = self.log.with_suffix(".code")
        if file.exists():
            return int(file.read_text())
        return None if is_running(self.pid) else -signal.SIGKILL

    def wait(self, seconds: float) -> int | None:
        """Wait for the launcher's end; None where it takes longer."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return code


def is_running(process: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def found(call: str) -> Callable[..., Any]:
    """Import what a call names."""
    for place in CALLS[call]:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError:
            continue
    raise LookupError(call)


def perform(call: str, arguments: Sequence[str]) -> int:
    """Do what a call names and return its exit code."""
    work = found(call)
    if call == "config":
        try:
            work(Path(arguments[0]) if arguments[0] else None, list(arguments[1:]))
        except importlib.import_module("mfm_dist.errors").UserError as error:  # as every command tells it
            print(error, file=sys.stderr)
            return int(error.exit_code)
        return 0
    if call == "scenes":
        folder, height, width, train, val = arguments
        size, counts = (int(height), int(width)), {"train": int(train), "val": int(val)}
        work(Path(folder), **counts, size=size, seed=0, shard_size=5, workers=1, report=lambda _: None)
        return 0
    if call == "adopt":
        print(json.dumps([bad.key for bad in work(Path(arguments[0]))]))
        return 0
    return int(work(list(arguments)))


def child(call: str, arguments: Sequence[str], output: int, seconds: float) -> NoReturn:
    """Be the process of one call, and end as Python would."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(output, stream)
    limit = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    there = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + MEMORY, there + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 1
    try:
        code = perform(call, arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""Signals that a launcher passes on."""


def launcher(log: Path, environments: list[dict[str, str]], arguments: list[str]) -> NoReturn:
    """Be a launcher, as torchrun is one: start the ranks, pass signals on, and end all when one has failed."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    ranks: list[int] = []
    for number in FORWARDED:
        signal.signal(number, lambda number, _: end_all(ranks, number))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for environment in environments:
        if (process := os.fork()) == 0:
            rank({**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, arguments)
        ranks.append(process)
    tell(log.with_suffix(".ranks"), json.dumps(ranks))
    code, left, deadline = 0, set(ranks), float("inf")
    while left:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            left.discard(process)
            if status and not code:
                code, deadline = 1, time.monotonic() + 20
                end_all(sorted(left), signal.SIGTERM)
        elif time.monotonic() > deadline:
            end_all(sorted(left), signal.SIGKILL)
        else:
            time.sleep(0.02)
    tell(log.with_suffix(".code"), str(code))
    os._exit(code)


def tell(path: Path, text: str) -> None:
    """Write a file that is whole as soon as it is there; somebody waits for it."""
    unfinished = path.with_suffix(f"{path.suffix}.tmp")
    unfinished.write_text(text)
    unfinished.rename(path)


def end_all(processes: Sequence[int], number: int) -> None:
    """Send a signal to each that is there."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def rank(environment: dict[str, str], arguments: list[str]) -> NoReturn:
    """Be one rank."""
    os.setsid()
    for number in FORWARDED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.update(environment)
    sys.argv = ["mfm-train", *arguments]
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    code = 1
    try:
        if otherwise := environment.get("OTHERWISE"):
            getattr(importlib.import_module("tests.distributed.train_otherwise"), otherwise)()
        code = int(found("train")(arguments))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # as ``end_process`` does
    os._exit(code)


def answer(call: str, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Fork, wait and tell; of a launch, tell the process at once."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # launchers that have ended
            continue
    if call == "launch":
        if (process := os.fork()) == 0:
            launcher(Path(arguments[0]), json.loads(arguments[1]), list(arguments[2:]))
        return {"code": process, "cpu": 0.0, "output": "", "length": 0}
    output = os.memfd_create("output")
    process = os.fork()
    if process == 0:
        child(call, arguments, output, seconds)
    deadline = time.monotonic() + 10 * seconds
    while (ended := os.wait4(process, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.003)
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what it has left
    length = os.fstat(output).st_size
    text = os.pread(output, 4 * KEPT, 0).decode(errors="replace")[:KEPT]
    os.close(output)
    used = ended[2].ru_utime + ended[2].ru_stime
    code = os.waitstatus_to_exitcode(ended[1])
    return {"code": code, "cpu": round(used, 3), "output": text, "length": length}


def main() -> None:
    """Answer calls until there are no more."""
    sys.path[0] = os.getcwd()  # it was this folder, whose names are common
    # An editable install would give what a clone does not have from elsewhere.
    sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
    answers, sys.stdout = sys.stdout, sys.stderr
    for call in CALLS:
        found(call)
    for name in WARM:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:  # it has another name in this clone
            continue
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
