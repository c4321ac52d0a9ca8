"""Shards on a disk of the node: copied once for all its ranks, verified, and removed when others need the room.

A copy is named after the checksum of what it holds, so data sets that share a shard share the copy, and one that was
made anew is copied anew. It gets its name when it is whole and on the disk. Removing one that is being read does no
harm: whoever has it open reads on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mfm_dist.data.files import CHUNK_BYTES, atomic_file, sha256_of
from mfm_dist.data.manifest import Manifest, ShardRecord
from mfm_dist.errors import DataError, StorageError

Report = Callable[[str], object]
"""Takes one line for the person who waits."""

PROGRESS_SECONDS = 5.0
"""Between two lines on a copy that takes long."""


class Scratch:
    """A folder of copies that all processes of a node share."""

    def __init__(self, folder: Path, *, limit_gib: float = 0.0) -> None:
        """
        Args:
            limit_gib: size it may grow to, all data sets together; 0 is no limit.

        Raises:
            StorageError: the folder cannot be made.
        """
        self.folder = folder
        self.limit = int(limit_gib * 2**30)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"data.scratch={folder} cannot be written to: {error.strerror}") from error

    def stage(self, origin: Path, report: Report) -> None:
        """Copies every shard of a folder that is not here yet; other processes of the node wait for that.

        Raises:
            StorageError: they do not fit.
            DataError: a shard cannot be read.
        """
        manifest = Manifest.read(origin / "dataset.json")
        total = sum(record.bytes for record in manifest.shards)
        if self.limit and total > self.limit:
            raise StorageError(
                f"data.scratch_gib={self.limit / 2**30:g}: the shards of {origin.name} have {total / 2**30:.2f} GiB. "
                "Raise it, or set data.lanes, which needs only a part of them at a time"
            )
        started, told, done = time.monotonic(), time.monotonic(), 0
        for record in manifest.shards:
            if not self._is_here(record):
                try:
                    self.copy(origin / record.file, record)
                except OSError as error:
                    raise DataError(f"{origin / record.file} cannot be copied to {self.folder}: {error}") from error
                done += record.bytes
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                rate = done / 2**20 / (told - started)
                report(f"staging {origin.name}: {done / 2**30:.2f} of {total / 2**30:.2f} GiB, {rate:.0f} MiB/s")
        if done:
            seconds = time.monotonic() - started
            report(f"staged {origin.name}: {done / 2**30:.2f} GiB in {seconds:.1f} s, to {self.folder}")

    def copy(self, tar: Path, record: ShardRecord) -> Path:
        """The path of the local copy of a shard, made now if there is none; a ``local_copy`` of ``ShardReader``.

        A shard that differs from what was written is copied as it is: its samples are checked one by one. For one that
        is missing its own path is returned; whoever opens it is told.

        Raises:
            StorageError: the disk is full.
            DataError: the disk gives back other bytes than were written to it.
            OSError: the shard cannot be read.
        """
        if not tar.exists():
            return tar
        local = self._path(record)
        with self._locked(f".{local.name}.lock"):
            if not self._is_here(record):
                self._make_room(record.bytes)
                self._copy(tar, local)
            os.utime(local)  # now used
        return local

    def _copy(self, tar: Path, local: Path) -> None:
        digest = hashlib.sha256()
        with open(tar, "rb") as origin, atomic_file(local) as file:
            while chunk := origin.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            if sha256_of(Path(file.name)) != digest.hexdigest():
                raise DataError(f"{local.parent} gives back other bytes than were written to it; is the disk sound?")

    def _make_room(self, need: int) -> None:
        """Removes the copies that were not used for longest until ``need`` more bytes fit the limit."""
        if not self.limit:
            return
        with self._locked(".lock"):
            copies = sorted(self.folder.glob("*.tar"), key=lambda path: path.stat().st_mtime)
            used = sum(path.stat().st_size for path in copies)
            while copies and used + need > self.limit:
                oldest = copies.pop(0)
                used -= oldest.stat().st_size
                oldest.unlink()

    def _is_here(self, record: ShardRecord) -> bool:
        return self._path(record).is_file()

    def _path(self, record: ShardRecord) -> Path:
        return self.folder / f"{record.sha256[:32]}.tar"

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process of the node at a time; the others wait. The kernel frees the lock of a process that is killed."""
        with open(self.folder / name, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
