"""A rank must not outlive its launcher: it would go on writing beside the one that is started in its place.

torchrun gives each rank a session of its own, so a launcher that is killed leaves its ranks behind. Linux can send a
process a signal when its parent dies; other systems cannot, and nothing is done there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from mfm_dist.distributed.launch import Launch

PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h."""
REAPERS = ("init", "systemd", "slurmstepd", "containerd-shim", "tini", "dumb-init", "docker-init", "catatonit")
"""Who adopts orphans, by the name in /proc/PID/comm; process 1 does everywhere else."""


def end_with_launcher(launch: Launch) -> None:
    """Tie this process to its launcher, if it has one. Call early: a launcher may die while its ranks start.

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
    """Whether a process that a launcher started now belongs to whoever adopts orphans."""
    parent = os.getppid()
    name = _read(parent, "comm").strip()
    return name in REAPERS or (parent == 1 and "python" not in _read(parent, "cmdline"))  # in a container it may be 1


def _read(process: int, entry: str) -> str:
    try:
        return Path(f"/proc/{process}/{entry}").read_text(errors="replace")
    except OSError:
        return ""
