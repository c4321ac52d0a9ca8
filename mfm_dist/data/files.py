"""Files that appear whole or not at all, on disks that may be full."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mfm_dist.errors import StorageError
from mfm_dist.storage import fsync

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and on the disk, and leaves nothing behind when it fails.

    Raises:
        StorageError: the disk is full.
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
            raise StorageError(no_space_left(path, written, free, "run the same command again")) from error
        raise


def no_space_left(where: Path, need: int, free: int, again: str) -> str:
    """The message of a disk that cannot take ``need`` bytes."""
    return (
        f"no space left for {where}: it needs at least {need / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free. "
        f"Make room, then: {again}. Finished shards are kept"
    )


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
