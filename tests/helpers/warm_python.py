"""Python that has torch, DeepSpeed and accelerate imported already, for tests that start many processes.

Each import of them takes five seconds of a core, three times in a run of two ranks and their launcher that then takes a
second or two. ``python warm_python.py serve SOCKET`` imports them once, then forks for whoever asks. ``python -I -S
warm_python.py -m MODULE ...`` or ``... FILE ...`` asks, and is from then on like the process that does the work: the
same streams, folder, environment and exit code, signals passed on. As ``PYTHON_EXEC`` it is what torchrun starts ranks
with. Those tests in which processes are counted, killed or started by Slurm start real ones (``runs.Start``).
"""

from __future__ import annotations

import array
import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NoReturn

SOCKET = "MFM_TEST_WARM_PYTHON"
"""Variable that names the socket."""
WARM = ["accelerate.commands.accelerate_cli", "accelerate.commands.launch", "torch.distributed.run", "deepspeed",
        "deepspeed.runtime.zero.stage3", "timm", "webdataset", "mfm_dist.train", "mfm_dist.trainer", "mfm_dist.build",
        "mfm_dist.checkpoint.resume", "mfm_dist.distributed.start"]  # fmt: skip
"""What commands import late, too."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


@cache
def warm_python(tree: Path) -> dict[str, str]:
    """Start it once for a clone, and return the variables that make torchrun use it; ``PYTHON_EXEC`` is the program.

    It ends with this process.
    """
    folder = Path(mkdtemp(prefix="warm_python_"))
    program, address = folder / "python", folder / "socket"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} "$@"\n')
    program.chmod(0o755)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tree)}
    server = subprocess.Popen(
        [sys.executable, __file__, "serve", str(address)],
        cwd=tree, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None
    while (line := server.stdout.readline()) != "ready\n":
        assert line, "it did not start"
    assert server.stdin is not None
    atexit.register(server.stdin.close)
    return {SOCKET: str(address), "PYTHON_EXEC": str(program)}


def serve(path: str) -> None:
    """Import, listen, and fork until the standard input ends."""
    import importlib

    for name in WARM:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        print("ready", flush=True)
        while listening in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                keep(connection)
            connection.close()


def keep(connection: socket.socket) -> NoReturn:
    """Start the process that was asked for, tell its number, then its exit status; end it if nobody listens."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    streams = array.array("i")
    message, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(3 * streams.itemsize))
    for *_, data in ancillary:
        streams.frombytes(data)
    asked = json.loads(message)
    process = os.fork()
    if process == 0:
        connection.close()
        become(asked, list(streams))
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{process}\n".encode())
    ended = os.pidfd_open(process)
    if connection in select.select([connection, ended], [], [])[0]:  # whoever asked was killed
        os.kill(process, signal.SIGKILL)
    connection.sendall(f"{os.waitpid(process, 0)[1]}\n".encode())
    os._exit(0)


def become(asked: dict[str, object], streams: list[int]) -> NoReturn:
    """Be the process that was asked for."""
    import runpy
    import traceback

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number in FORWARDED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(asked["environment"])  # type: ignore[call-overload]
    os.chdir(asked["folder"])  # type: ignore[arg-type]
    sys.stdin, sys.stdout, sys.stderr = (open(i, mode, buffering=1) for i, mode in enumerate("rww"))  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    arguments = list(asked["arguments"])  # type: ignore[call-overload]
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.modules.pop(arguments[1], None)  # a program is not imported
            sys.path.insert(0, os.getcwd())
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, os.path.dirname(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finish(code)


def finish(code: int) -> NoReturn:
    """End as Python does: threads, exit functions, streams."""
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ask(arguments: list[str]) -> NoReturn:
    """Have a process forked that does this, and end as it does."""
    while arguments[0].startswith("-") and arguments[0] != "-m":  # -u, from torchrun
        del arguments[0]
    asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]).tobytes())
        connection.sendmsg([json.dumps(asked).encode()], [rights])
        answers = connection.makefile()
        process = int(answers.readline())
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(process, number))
        status = int(answers.readline())
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.path[0] = os.getcwd()
        serve(sys.argv[2])
    else:
        ask(sys.argv[1:])
