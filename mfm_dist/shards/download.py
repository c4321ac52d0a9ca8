"""A download: its files, in folders and zip archives, which of them make samples, and what of it is missing."""

from __future__ import annotations

import lzma
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mfm_dist.errors import ConfigError, CorruptFileError, DataError
from mfm_dist.shards.card import Card, Split
from mfm_dist.storage import read_whole, require_regular

NAMED = 5
"""Files that a message names before it only counts the rest."""
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
                return read_whole(self.root / file.name, MEMBER_BYTES)
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
            self._archives[name] = zipfile.ZipFile(require_regular(self.root / name))
        return self._archives[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_archives": {}}


class Pair(NamedTuple):
    """The files of one sample."""

    key: str
    image: SourceFile
    label: SourceFile | None


def find_pairs(card: Card, tree: SourceTree, *, allow_incomplete: bool) -> dict[str, list[Pair]]:
    """Find the samples of each split in the order of their keys.

    Args:
        allow_incomplete: take the pairs that are there, and only the splits that have any.

    Raises:
        DataError: nothing of the data set is there, something is missing, or a file is there twice. Everything is
            named, with where to download it.
    """
    files = tree.files()
    doubles: list[str] = []
    missing: list[str] = []
    found: dict[str, list[Pair]] = {}
    for split in card.splits:
        pairs, gaps = _find_split(split, files, doubles)
        missing += [f"{split.name}: {gap}" for gap in gaps]
        if pairs:
            found[split.name] = pairs
    if doubles:
        raise DataError("\n  ".join([f"{tree.root} holds files twice; remove one of each:", *doubles]))
    if missing and not (allow_incomplete and found):
        way_out = "\nOr take what is there: --allow-incomplete" if found else ""
        lines = "\n  ".join([f"{tree.root} is no complete {card.title}:", *missing])
        source = f"\nDownload {card.download}" if card.download else ""
        raise DataError(f"{lines}{source}{way_out}")
    return found


def _find_split(split: Split, files: Sequence[SourceFile], doubles: list[str]) -> tuple[list[Pair], list[str]]:
    """Find the pairs of a split, and a line for each kind of thing that is missing of it."""
    images = _by_key(split.image, files, doubles)
    labels = _by_key(split.label, files, doubles) if split.label else {}
    keys = sorted(images if split.label is None else images.keys() & labels.keys())
    pairs = [Pair(key, images[key], labels.get(key)) for key in keys]
    if not images:
        return pairs, [f"there is no image at all; their paths look like {_readable(split.image)}"]
    missing = _unpaired("label", images.keys() - labels.keys(), split.label) if split.label else []
    missing += _unpaired("image", labels.keys() - images.keys(), split.image)
    if split.numbers:
        digits = len(keys[0]) if keys else 1
        present = {int(key) for key in (*images, *labels)}
        absent = [number for number in split.numbers if number not in present]
        if absent:
            missing.append(f"{len(absent)} of {split.samples} pairs are missing: {_ranges(absent, digits)}")
    elif split.parts:
        paths = (split.image.search(_slashes(file)) for file in images.values())
        counts = Counter(path["part"] for path in paths if path)
        missing += [
            f"{name}: {counts[name]} images instead of {count}"
            for name, count in split.parts.items()
            if counts[name] != count
        ]
    elif split.samples and len(images) != split.samples:
        missing.append(f"{len(images)} images instead of {split.samples}")
    return pairs, missing


def _by_key(pattern: re.Pattern[str], files: Iterable[SourceFile], doubles: list[str]) -> dict[str, SourceFile]:
    """Find the file of each key. A file on the disk stands before its copy in an archive."""
    found: dict[str, SourceFile] = {}
    for file in files:
        match = pattern.search(_slashes(file))
        if match is None:
            continue
        other = found.setdefault(match["key"], file)
        if other == file or (other.archive is None) > (file.archive is None):
            continue
        if (other.archive is None) == (file.archive is None):
            doubles.append(f"{other} and {file}")
        found[match["key"]] = file
    return found


def _slashes(file: SourceFile) -> str:
    """Return the path with slashes: archives packed on Windows leave names such as ``GT\\LABELS\\0000000.png``."""
    return file.name.replace("\\", "/")


def _unpaired(what: str, keys: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    names = sorted(keys)
    if not names:
        return []
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"{len(names)} have no {what} ({', '.join(names[:NAMED])}{more}); looked for {_readable(pattern)}"]


def _ranges(numbers: Sequence[int], digits: int) -> str:
    """Say ``00001 to 02500, 07001``, at most ``NAMED`` of them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{a:0{digits}d}" if a == b else f"{a:0{digits}d} to {b:0{digits}d}" for a, b in runs[:NAMED]]
    return ", ".join(texts) + (f" and {len(runs) - NAMED} more gaps" if len(runs) > NAMED else "")


def _readable(pattern: re.Pattern[str]) -> str:
    """Write a path pattern for people: ``leftImg8bit/train/<part>/<key>_leftImg8bit.png``."""
    text = pattern.pattern.removeprefix("(?:^|/)").removesuffix("$").replace("\\.", ".").replace("(?:[^/]+/)*", "")
    text = re.sub(r"\(\?P<(\w+)>((?:[^()]|\\.)*)\)", r"<\1>", text)
    return text.replace("[^/]+", "<folder>")
