"""Shards on a disk of the node: copied once for all its ranks, verified, and removed when others need the room.

A copy is named after the checksum of the shard as it was written, and there is none of a shard that differs. So data
sets that share a shard share the copy, one that was made anew is copied anew, and damage of the origin, or on the way,
is never kept. It gets its name when it is whole and on the disk. Removing one that is being read does no harm: whoever
has it open reads on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mfm_dist.data.manifest import Manifest
from mfm_dist.data.shard_records import ShardRecord
from mfm_dist.errors import CorruptFileError, DataError, DiskFullError, StorageError
from mfm_dist.storage import CHUNK_BYTES, atomic_file, open_regular, regular_descriptor, sha256_of

Report = Callable[[str], object]
"""Takes one line for the person who waits."""

OWN_FOLDER = "mfm_dist-shards"
"""Inside the folder that the user named, which may hold files of others."""
PROGRESS_SECONDS = 5.0
"""Between two lines on a copy that takes long."""
_COPY = re.compile(r"[0-9a-f]{32}\.tar")
_UNFINISHED = re.compile(rf"\.({_COPY.pattern})\.unfinished")


class _NoRoomError(Exception):
    """A copy does not fit beside those under way."""


class Scratch:
    """A folder of copies that all processes of a node share."""

    def __init__(self, folder: Path, report: Report, *, limit_gib: float = 0.0) -> None:
        """
        Args:
            folder: on a disk of the node; the copies go into a folder of their own in it.
            limit_gib: size it may grow to, all data sets together; 0 is no limit.

        Raises:
            StorageError: the folder cannot be made.
        """
        self.folder = folder / OWN_FOLDER
        self.limit = int(limit_gib * 2**30)
        self._report = report
        self._uncopied: set[str] = set()
        """Checksums of shards that this process could not copy as they were written; it says so once."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"data.scratch={folder} cannot be written to: {error.strerror}") from error

    def stage(self, origin: Path) -> None:
        """Copy every shard of a folder that is not here yet; other processes of the node wait for that.

        Raises:
            StorageError: they do not fit.
            DataError: the disk gives back other bytes than were written to it.
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
            if not self._path(record).is_file():
                with suppress(OSError, CorruptFileError):  # it is gone; whoever reads it is told
                    os.close(self.open(origin / record.file, record))
                done += record.bytes if self._path(record).is_file() else 0
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                rate = done / 2**20 / (told - started)
                self._report(f"staging {origin.name}: {done / 2**30:.2f} of {total / 2**30:.2f} GiB, {rate:.0f} MiB/s")
        if done:
            seconds = time.monotonic() - started
            self._report(f"staged {origin.name}: {done / 2**30:.2f} GiB in {seconds:.1f} s, to {self.folder}")

    def open(self, tar: Path, record: ShardRecord) -> int:
        """Open the local copy of a shard, made now if there is none; the ``open_shard`` of ``ShardReader``.

        A shard that cannot be copied as it was written, or finds no room beside copies under way, is opened where it
        lies, and that is reported: whoever reads it checks each of its samples.

        Raises:
            StorageError: the disk is full.
            DataError: the disk gives back other bytes than were written to it.
            OSError: the shard cannot be opened.
        """
        local = self._path(record)
        if record.sha256 in self._uncopied:
            return regular_descriptor(tar)
        with self._locked(f".{local.name}.lock"):
            with suppress(FileNotFoundError):  # never copied, or removed to make room
                os.utime(local)  # now used
                return regular_descriptor(local)
            try:
                return self._copy(tar, record, local)
            except _NoRoomError as error:
                reason = str(error)
            except DiskFullError as error:  # an OSError too, which a reader would take for one bad sample
                raise StorageError(str(error)) from error
            except (CorruptFileError, OSError) as error:
                reason = str(error)
                self._uncopied.add(record.sha256)
        self._report(f"{tar} is read where it lies, not from a copy in {self.folder}: {reason}")
        return regular_descriptor(tar)

    def _copy(self, tar: Path, record: ShardRecord, local: Path) -> int:
        """Make a copy and return a descriptor of it, opened before others can remove it."""
        digest = hashlib.sha256()
        with open_regular(tar) as origin, atomic_file(local) as file:
            with self._locked(".lock"):
                self._make_room(record.bytes)
                file.truncate(record.bytes)  # counts from now on
            while chunk := origin.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
                if file.tell() > record.bytes:
                    break
            file.flush()
            os.fsync(file.fileno())
            if digest.hexdigest() != record.sha256:
                raise CorruptFileError("it differs from what was written (wrong SHA-256)")
            if sha256_of(Path(file.name)) != record.sha256:
                raise DataError(f"{self.folder} gives back other bytes than were written to it; is the disk sound?")
            return regular_descriptor(Path(file.name))

    def _make_room(self, need: int) -> None:
        """Remove the copies that were not used for longest until ``need`` more bytes fit the limit.

        Raises:
            _NoRoomError: they do not, beside the copies that other processes are making.
        """
        if not self.limit:
            return
        # Copies under way are listed first: one that is finished meanwhile counts twice rather than not at all.
        coming = sum(self._reserved(path) for path in self.folder.iterdir() if _UNFINISHED.fullmatch(path.name))
        copies = [path for path in self.folder.iterdir() if _COPY.fullmatch(path.name)]
        copies.sort(key=lambda path: path.stat().st_mtime)
        used = coming + sum(path.stat().st_size for path in copies)
        while copies and used + need > self.limit:
            oldest = copies.pop(0)
            used -= oldest.stat().st_size
            oldest.unlink()
        if used + need > self.limit:
            raise _NoRoomError(f"data.scratch_gib={self.limit / 2**30:g} has no room beside the copies under way")

    def _reserved(self, unfinished: Path) -> int:
        """Count the bytes that a copy under way has set aside; remove what a killed process left."""
        match = _UNFINISHED.fullmatch(unfinished.name)
        assert match is not None
        with open(self.folder / f".{match[1]}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with suppress(FileNotFoundError):  # finished since
                    return unfinished.stat().st_size
                return 0
            unfinished.unlink(missing_ok=True)
            return 0

    def _path(self, record: ShardRecord) -> Path:
        return self.folder / f"{record.sha256[:32]}.tar"

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Let one process of the node in at a time. The kernel frees the lock of one that is killed."""
        with open(self.folder / name, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
