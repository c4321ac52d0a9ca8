"""The files of a data set as downloaded: in folders, and in zip archives, which need not be unpacked."""

from __future__ import annotations

import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mfm_dist.errors import ConfigError, CorruptFileError, DataError

MEMBER_BYTES = 1 << 28
"""Largest file read out of an archive; pictures are a hundredth of it, a zip bomb is more."""

_ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    OSError,  # of the disk, and of bz2
    EOFError,
    ValueError,  # of names and offsets
    KeyError,
    RuntimeError,  # encrypted, or a version and method that nobody knows
)
"""What ``zipfile`` raises for damaged archives."""


class SourceFile(NamedTuple):
    """One file of a download."""

    name: str
    """Path below the root of the download, or inside the archive."""
    archive: str | None = None
    """Path of the zip archive that holds it, below the root."""

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}" if self.archive else self.name


class SourceTree:
    """A downloaded tree, read only. Members of archives are read into memory: no name in one is a path to write."""

    def __init__(self, root: Path) -> None:
        """Raise ConfigError where there is no such folder."""
        if not root.is_dir():
            raise ConfigError(f"{root} is no folder; --input names the folder that holds the download")
        self.root = root
        self._archives: dict[str, zipfile.ZipFile] = {}

    def files(self) -> list[SourceFile]:
        """List every file, those of zip archives included; what is hidden is passed over.

        Raises:
            DataError: an archive cannot be opened.
        """
        found = []
        for name in sorted(self._walk(self.root, set())):
            found.append(SourceFile(name))
            if name.lower().endswith(".zip"):
                found += [SourceFile(member, name) for member in self._members(name)]
        return found

    def read(self, file: SourceFile) -> bytes:
        """Read a file.

        Raises:
            CorruptFileError: it is gone, its checksum in the archive is wrong, or it is impossibly large.
        """
        if file.archive is None:
            try:
                return (self.root / file.name).read_bytes()
            except OSError as error:
                raise CorruptFileError(f"cannot be read ({error.strerror})") from error
        try:
            archive = self._archive(file.archive)
            if (size := archive.getinfo(file.name).file_size) > MEMBER_BYTES:
                raise CorruptFileError(f"would unpack to {size} bytes; {MEMBER_BYTES} are allowed")
            return archive.read(file.name)
        except _ZIP_DAMAGE as error:
            raise CorruptFileError(f"cannot be read out of the archive ({error})") from error

    def _walk(self, folder: Path, seen: set[str]) -> Iterator[str]:
        """Yield paths below the root, through symbolic links too; ``seen`` ends loops of them."""
        real = os.path.realpath(folder)
        if real in seen:
            return
        seen.add(real)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith((".", "__MACOSX")):
                    continue
                if entry.is_dir():
                    yield from self._walk(Path(entry.path), seen)
                elif entry.is_file():
                    yield Path(entry.path).relative_to(self.root).as_posix()

    def _members(self, archive: str) -> list[str]:
        try:
            infos = self._archive(archive).infolist()
        except _ZIP_DAMAGE as error:
            raise DataError(f"{self.root / archive} cannot be opened ({error}); download it again") from error
        return sorted(
            info.filename
            for info in infos
            if not info.is_dir() and not any(part.startswith((".", "__MACOSX")) for part in info.filename.split("/"))
        )

    def _archive(self, name: str) -> zipfile.ZipFile:
        if name not in self._archives:
            self._archives[name] = zipfile.ZipFile(self.root / name)
        return self._archives[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_archives": {}}
