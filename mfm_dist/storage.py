"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mfm_dist.errors import DiskFullError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CHUNK_BYTES = 1 << 20


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Give an empty temporary folder to fill. At the end of the block it takes the place of ``final``, all on disk.

    If the block raises, nothing of it is left, and a ``final`` that was there before still is.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    replaced = final.with_name(f".{final.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            fsync(path)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        fsync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
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
        with open(temporary, "wb") as file:
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
    """Return the SHA-256 of a file in hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
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
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:  # the last line of a killed run
                    continue

    def forget_after(self, step: int) -> None:
        """Drop lines of steps beyond ``step``: a resumed run writes them again."""
        if not self.path.exists():
            return
        kept = [json.dumps(record) + "\n" for record in self if record.get("step", 0) <= step]
        write_atomically(self.path, "".join(kept))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
