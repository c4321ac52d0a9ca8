"""How a run is asked to stop, at any time, any number of times; and how its processes end, with their launcher too.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning) or SIGHUP (the terminal is gone; not below nohup, which ignores it).

Light on purpose: the command listens before it imports torch, which takes seconds.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mfm_dist.distributed.launch import Launch
from mfm_dist.errors import EXIT_STOPPED, CorruptFileError
from mfm_dist.run.folder import write_outcome
from mfm_dist.storage import OF_KERNEL, read_whole

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818  not an error
    """Some rank was asked to stop and all have agreed to; raised on every rank at the same place."""


class StopRequested:
    """Before training a signal ends the process at once; from ``training_begins`` on it is noted, and looked at.

    As a context manager around the start of a run: what fails there after a signal, because its peers or its workers
    were stopped too, is no error.

    Python runs a handler only between two of its own instructions, and a start waits for other ranks, or reads a
    large file, inside a single one. So a thread listens too, and it is that thread that ends the process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        """
        Args:
            folder: the run folder, which is told when a signal ends the process while there is nothing to save.
        """
        self.name: str | None = None
        """The last stop signal, if there was one."""
        self.training = False
        self.owns_folder = False
        """Whether this start has the folder's lease."""
        self._folder, self._rank = folder, rank
        self._lock = threading.Lock()
        receiving, sending = os.pipe()
        os.set_blocking(sending, False)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own
        threading.Thread(target=self._listen, args=(receiving,), daemon=True, name="stop signals").start()

    def __enter__(self) -> StopRequested:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and self.name is not None and not self.training:
            self._leave(self.name)

    def training_begins(self) -> None:
        """Leave signals to whoever trains, who looks at ``name``, saves and ends: now there is something to lose."""
        with self._lock:
            self.training = True

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def _leave(self, name: str) -> NoReturn:
        """End the process; in whichever thread."""
        reason = f"stopped by {name} before training began"
        if self._rank == 0:
            os.write(sys.stderr.fileno(), f"{reason}; the same command starts again\n".encode())
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_outcome(self._folder, code=EXIT_STOPPED, reason=reason, step=-1, owned=self.owns_folder)
        os._exit(EXIT_STOPPED)

    def _listen(self, receiving: int) -> None:
        while numbers := os.read(receiving, 64):
            for number in numbers:
                with self._lock:
                    if number in STOP_SIGNALS and not self.training:
                        self._leave(signal.Signals(number).name)


def end_process(code: int) -> NoReturn:
    """End a rank as ``sys.exit`` does, but without taking the interpreter down.

    Threads of gloo outlive the process group. Now and then one still runs while the interpreter is taken down, which
    ends in ``terminate called without an active exception`` and SIGABRT (torch 2.15, one end in thirty on a busy
    machine): torchrun then reports a finished run as failed.
    """
    atexit._run_exitfuncs()  # ends child processes too, and lets trackers write
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h."""
REAPERS = ("init", "systemd", "slurmstepd", "containerd-shim", "tini", "dumb-init", "docker-init", "catatonit")
"""Who adopts orphans, by the name in /proc/PID/comm; process 1 does everywhere else."""


def end_with_launcher(launch: Launch) -> None:
    """Tie this process to its launcher, if it has one. Call early: a launcher may die while its ranks start.

    A rank that outlives its launcher would go on writing beside the one that is started in its place, and torchrun
    gives each rank a session of its own. Linux sends a process a signal when its parent dies; elsewhere nothing is
    done.

    A rank of torchrun is killed, as its peers are: none could take part in another exchange. A lone process below
    ``accelerate launch`` gets SIGTERM and so saves first, because that launcher dies of the same Ctrl-C or SIGTERM.
    """
    if sys.platform != "linux" or launch.launcher is None:
        return
    if launch.launcher == "torchrun":
        _on_death_of_parent(signal.SIGKILL)
        if _is_orphan():  # it died before this process could ask for the signal
            os.kill(os.getpid(), signal.SIGKILL)
    elif "accelerate" in _read(os.getppid(), "cmdline"):  # not merely its variables, exported to a plain start
        _on_death_of_parent(signal.SIGTERM)


def _on_death_of_parent(number: signal.Signals) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _is_orphan() -> bool:
    """Tell whether a process that a launcher started now belongs to whoever adopts orphans."""
    parent = os.getppid()
    name = _read(parent, "comm").strip()
    return name in REAPERS or (parent == 1 and "python" not in _read(parent, "cmdline"))  # in a container it may be 1


def _read(process: int, entry: str) -> str:
    try:
        return read_whole(Path(f"/proc/{process}/{entry}"), OF_KERNEL).decode(errors="replace")
    except (OSError, CorruptFileError):
        return ""
