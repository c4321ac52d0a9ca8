"""What runs below a process, whether it still does, and its end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def wait_until(condition: Callable[[], Any], *, seconds: float, what: str) -> None:
    """Return when ``condition`` holds; fail, naming ``what`` was waited for, when it takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def family(process: int) -> list[int]:
    """Return a process and everything below it."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        below.setdefault(parent, []).append(int(entry.parent.name))
    found = [process]
    for member in found:  # grows meanwhile
        found += below.get(member, [])
    return found


def is_running(process: int) -> bool:
    """Tell whether a process is there; a zombie that nobody has waited for yet is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(process: int) -> None:
    """Send SIGKILL, whether or not it is still there."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
