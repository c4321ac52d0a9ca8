"""Files and folders that appear whole or not at all; and the one door for files that anybody may have written."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from mfm_dist.errors import CorruptFileError, DiskFullError, StorageError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CHUNK_BYTES = 1 << 20
LARGEST_FILE = 64 << 20
"""Bytes of the largest file that is read whole."""

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


def read_json_in_parts(path: Path, many: str, limit: int) -> Iterator[tuple[str, Any]]:
    """Yield keys and values of the JSON object in a file; of the list under ``many``, the key with each of its items.

    What is held of the file is one value, of at most ``LARGEST_FILE``.

    Args:
        limit: most bytes that the file may have.

    Raises what ``open_regular`` does, and CorruptFileError where there is no such object.
    """
    with open_regular(path) as file:
        text = _JsonText(io.TextIOWrapper(file, encoding="utf-8"), limit)
        try:
            for _ in text.separated("{", "}"):
                key = text.value()
                text.one_of(":")
                if key != many:
                    yield key, text.value()
                    continue
                for _ in text.separated("[", "]"):
                    yield key, text.value()
            text.require_end()
        except (ValueError, RecursionError) as error:  # a text that is not UTF-8 is a ValueError too
            raise CorruptFileError(f"{path.name} is no JSON ({error!s:.200})") from error


class _JsonText:
    """A JSON text that is parsed value by value as it is read; what is wrong with it raises ValueError."""

    def __init__(self, file: TextIO, limit: int) -> None:
        self._file = file
        self._left = limit
        self._window, self._at = "", 0
        """What was read and is not parsed yet stands in the window from ``_at`` on."""
        self._decoder = json.JSONDecoder()

    def value(self) -> Any:
        """Return the next value. What ends the window may be half of a value, or of a number that looks whole."""
        self._skip_space()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
                if self._window[end : end + 1] in _AFTER_VALUE:
                    self._at = end
                    return value
                problem = f"no value at {self._window[self._at : self._at + 40]!r}"
            except ValueError as error:
                problem = str(error)
            if not self._read():
                raise ValueError(problem)

    def one_of(self, marks: str) -> str:
        """Take the next character, which is to be one of these, and return it."""
        self._skip_space()
        found = self._window[self._at : self._at + 1]
        if not found or found not in marks:
            raise ValueError(f"{found!r} where {' or '.join(marks)} belongs")
        self._at += 1
        return found

    def separated(self, opening: str, closing: str) -> Iterator[None]:
        """Stop at each thing between two brackets, which whoever iterates takes, and take all around them."""
        self.one_of(opening)
        self._skip_space()
        if self._window[self._at : self._at + 1] == closing:
            self._at += 1
            return
        while True:
            yield
            if self.one_of("," + closing) == closing:
                return

    def require_end(self) -> None:
        """Require that nothing follows."""
        self._skip_space()
        if self._at < len(self._window):
            raise ValueError(f"{self._window[self._at : self._at + 40]!r} behind its end")

    def _skip_space(self) -> None:
        while True:
            found = _SPACE.match(self._window, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._window) or not self._read():
                return

    def _read(self) -> bool:
        """Read on, twice as far each time that it did not do; return whether there was more."""
        rest = self._window[self._at :]
        more = self._file.read(max(CHUNK_BYTES, len(rest)))
        self._left -= len(more)
        if self._left < 0 or len(rest) > LARGEST_FILE:
            raise ValueError("it is too large")
        self._window, self._at = rest + more, 0
        return bool(more)


_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER_VALUE = (",", ":", "]", "}", " ", "\t", "\n", "\r")


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
        """Add one line, below what a kill left half. Numbers that are not finite become null, which JSON can hold."""
        line = json.dumps(_finite(record), allow_nan=False) + "\n"
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())

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
