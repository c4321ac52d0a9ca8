"""One run folder, one job: who writes to it says so in ``lease.json``, and goes on saying so.

Not a lock of the file system, which network file systems promise and do not always keep. The heartbeat is the file's
time, given and compared by the file system's own clock. A lease is taken over

* at once by the same Slurm job, which was requeued, and where its process is known to be gone: its number is looked up
  only in the same start of the same machine and the same container, and is another process's where that began later;
* when its heartbeat stands still for ``STALE_SECONDS``.

A start that meets a heartbeat that moves is refused. Two that start in the same instant may both believe that they
hold the lease; the one whose lease was overwritten finds out at its next heartbeat and ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from mfm_dist.errors import EXIT_CONFIG, EXIT_STORAGE, ConfigError, CorruptFileError, StorageError
from mfm_dist.run.folder import LEASE
from mfm_dist.storage import OF_KERNEL, read_json, read_text, read_whole

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 100.0
"""More than the minute for which NFS may show an old time of a file."""


def end_without_saving(reason: str, code: int) -> None:
    """End this process at once: whoever has the folder now goes on from the last checkpoint."""
    os.write(sys.stderr.fileno(), f"{reason}\n".encode())
    os._exit(code)


class Lease(AbstractContextManager["Lease"]):
    """A run folder's lease, held from ``take`` to ``release``, which the end of a ``with`` calls."""

    def __init__(self, folder: Path, text: str, on_lost: Callable[[str, int], object]) -> None:
        self._path = folder / LEASE
        self._text = text
        self._on_lost = on_lost
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="lease").start()

    @classmethod
    def take(
        cls,
        folder: Path,
        *,
        on_lost: Callable[[str, int], object] = end_without_saving,
        say: Callable[[str], object] = print,
        environment: Mapping[str, str] = os.environ,
    ) -> Lease:
        """Wait until the folder is free, or known to be in use.

        Args:
            on_lost: called in a thread, with a sentence and an exit code, if another start holds the lease now or the
                folder is gone; must end the process.

        Raises:
            ConfigError: if another job or process is at work in this folder.
            StorageError: if the folder cannot be written.
        """
        owner = {
            "job": environment.get("SLURM_JOB_ID"),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "place": _pid_namespace(),
            "began": _process_start_time(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        path, text = folder / LEASE, json.dumps(owner) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _wait_until_free(path, owner, say)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise _in_use(path, _read(path)) from None
        except OSError as error:
            raise StorageError(f"run.folder={folder} cannot be written: {error}") from error
        return cls(folder, text, on_lost)

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the next start have the folder at once."""
        self._released.set()
        with suppress(OSError, CorruptFileError):
            if read_text(self._path) == self._text:
                self._path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                held = read_text(self._path) == self._text
                if held:
                    os.utime(self._path)
            except (FileNotFoundError, CorruptFileError):
                held = False
            except OSError:
                continue  # the disk is away; whoever writes will say so
            if not held and not self._released.is_set():
                folder = self._path.parent
                if folder.is_dir():
                    self._on_lost(
                        f"{_describe(_read(self._path))} has taken over {folder}; this start ends", EXIT_CONFIG
                    )
                else:
                    self._on_lost(f"run.folder={folder} is gone: somebody removed it; this start ends", EXIT_STORAGE)
                return


def _wait_until_free(path: Path, owner: Mapping[str, Any], say: Callable[[str], object]) -> None:
    """Return when there is no lease any more; remove one that nobody keeps."""
    patience, first = time.monotonic() + STALE_SECONDS, None
    with suppress(FileNotFoundError):
        while True:
            holder, heartbeat = _read(path), path.stat().st_mtime_ns
            gone = _is_gone(holder, owner["place"])
            same_job = owner["job"] is not None and holder.get("job") == owner["job"]
            if same_job or gone or time.monotonic() > patience or _age(path) > STALE_SECONDS:
                path.unlink()
                say(f"taking over {path.parent} from {_describe(holder)}")
                return
            if gone is False or heartbeat != (first or heartbeat):
                raise _in_use(path, holder)
            if first is None:
                say(f"waiting up to {STALE_SECONDS:.0f} s to see whether {_describe(holder)} still holds {path.parent}")
            first = heartbeat
            time.sleep(0.5)


def _in_use(path: Path, holder: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"run.folder={path.parent} is in use by {_describe(holder)}: wait until it has ended, or choose another "
        f"run.folder. If it is gone for certain, remove {path}"
    )


def _describe(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "somebody who left no name"
    job = f"Slurm job {holder['job']}" if holder.get("job") else f"process {holder.get('process')}"
    return f"{job} on {holder.get('host')}"


def _read(path: Path) -> dict[str, Any]:
    """Return whose lease it is; empty where that cannot be read."""
    with suppress(OSError, CorruptFileError):
        return read_json(path)
    return {}


def _age(path: Path) -> float:
    """Return the seconds since the last heartbeat, by the clock of the file system."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


def _is_gone(holder: Mapping[str, Any], place: str | None) -> bool | None:
    """Tell whether a holder's process has ended; None where that cannot be known, and its heartbeat has to tell."""
    process = holder.get("process")
    if place is None or holder.get("place") != place or not isinstance(process, int):
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user, and perhaps not the same process any more
        return None
    return _process_start_time(process) != holder.get("began")


def _pid_namespace() -> str | None:
    """Return where the numbers of processes mean the same: one start of a machine, one container; None if unknown."""
    with suppress(OSError):
        if os.readlink("/proc/self") == str(os.getpid()):  # else /proc is that of another container
            boot = read_text(Path("/proc/sys/kernel/random/boot_id"), OF_KERNEL).strip()
            return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return None


def _process_start_time(process: int) -> int | None:
    """Return when a process began, in ticks since the machine did; None if it has ended, also as a zombie."""
    with suppress(OSError):
        stat = read_whole(Path(f"/proc/{process}/stat"), OF_KERNEL).decode(errors="replace")
        fields = stat.rpartition(")")[2].split()  # from the third on; the second is its name
        return None if fields[0] in "ZX" else int(fields[19])
    return None
