"""Files and folders that appear whole or not at all; and the one door for files that anybody may have written."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mfm_dist.errors import CorruptFileError, DiskFullError, StorageError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CHUNK_BYTES = 1 << 20
LARGEST_FILE = 64 << 20
"""Bytes of the largest file that is read whole; the manifest of 50,000 shards has as many."""

OF_KERNEL = 1 << 20
"""Bytes of the largest file in /proc that is read; asked for some millions, the kernel refuses (ENOMEM)."""


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Give an empty temporary folder to fill. At the end of the block it takes the place of ``final``, all on disk.

    If the block raises, nothing of it is left, and a ``final`` that was there before still is. The folder that it is
    in has to be there: one that somebody removed does not come back.
    """
    temporary = temporary_folder(final)
    try:
        make_empty(temporary)
        yield temporary
        for path in temporary.iterdir():
            fsync(path)
        put_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_folder(final: Path) -> Path:
    """Return where a folder is filled before it gets its name."""
    return final.with_name(f".{final.name}.tmp")


def make_empty(folder: Path) -> None:
    """Make a folder, in place of what a kill left behind there. The one that it is in has to be there."""
    _remove(folder)
    folder.mkdir()


def put_in_place(temporary: Path, final: Path) -> None:
    """Give a folder whose files are on the disk its name, in place of what has it. If that fails, ``final`` is back."""
    replaced = final.with_name(f".{final.name}.old")
    try:
        fsync(temporary)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        fsync(final.parent)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write. It gets its name when it is whole and on the disk, and is gone if the block raises.

    Raises DiskFullError.
    """
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # new, so no link is followed
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            free = shutil.disk_usage(path.parent).free
            raise DiskFullError(no_space_left(path, written, free, "run the same command again")) from error
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader sees the old content or the new, never half of it. Raises DiskFullError."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _remove(path: Path) -> None:
    """Remove a folder that a kill left behind, or whatever else has its name."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def regular_descriptor(path: Path) -> int:
    """Open a file to read, without waiting for what is none, such as a named pipe; return its descriptor.

    A link is followed: data sets and weights are often laid out by links.

    Raises:
        CorruptFileError: it is no regular file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptFileError(f"{path.name} is no regular file")
    return descriptor


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read as ``regular_descriptor`` does, with the same errors."""
    with open(regular_descriptor(path), "rb") as file:
        yield file


def require_regular(path: Path) -> Path:
    """Return the path of a file that a library opens itself. Raises what ``regular_descriptor`` does."""
    os.close(regular_descriptor(path))
    return path


def read_whole(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """Read a file. Raises what ``open_regular`` does, and CorruptFileError where it has more bytes than ``limit``."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CorruptFileError(f"{path.name} is larger than {limit / 2**20:g} MiB")
    return content


def read_text(path: Path, limit: int = LARGEST_FILE) -> str:
    """Read a text file. Raises what ``read_whole`` does, and CorruptFileError where it is not UTF-8."""
    try:
        return read_whole(path, limit).decode()
    except UnicodeDecodeError as error:
        raise CorruptFileError(
            f"{path.name} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}): save it as UTF-8"
        ) from error


def read_json(path: Path, limit: int = LARGEST_FILE) -> dict[str, Any]:
    """Read the JSON object in a file. Raises what ``read_text`` does, and CorruptFileError where there is none."""
    text = read_text(path, limit)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
        raise CorruptFileError(f"{path.name} is no JSON ({error!s:.200})") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path.name} is not a mapping")
    return value


def no_space_left(where: Path, need: int, free: int, again: str) -> str:
    """Say that a disk cannot take ``need`` bytes, and what to do."""
    return (
        f"no space left for {where}: it needs at least {need / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free. "
        f"Make room, then: {again}. What is finished is kept"
    )


def fsync(path: Path) -> None:
    """Have a file on the disk itself; of a folder, its names, so that a rename in it lasts."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits. Raises what ``regular_descriptor`` does."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class JsonLines:
    """A file of one JSON object a line, written through at once so that a kill loses nothing written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line. Numbers that are not finite become null, which JSON can hold."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read the records; a line that is none is passed over: the last of a killed run, or somebody else's.

        Raises:
            StorageError: there is something of this name that is no file.
        """
        if not self.path.exists():
            return
        try:
            with open_regular(self.path) as file:
                yield from filter(None, map(_record, file))
        except CorruptFileError as error:
            raise StorageError(f"{self.path.parent}: {error}; move it away") from error

    def forget_after(self, step: int) -> None:
        """Drop lines of steps beyond ``step``: a resumed run writes them again."""
        if not self.path.exists():
            return
        kept = [json.dumps(record) + "\n" for record in self if record.get("step", 0) <= step]
        write_atomically(self.path, "".join(kept))


def _record(line: bytes) -> dict[str, Any] | None:
    """Read one line; None where it holds no object, or one whose step is no number of steps."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step", 0)) is int else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
