"""Which files of a download make the samples of a data set, and what of it is missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mfm_dist.errors import DataError
from mfm_dist.shards.card import Card, Split
from mfm_dist.shards.source_tree import SourceFile, SourceTree

NAMED = 5
"""Files that a message names before it only counts the rest."""


class Pair(NamedTuple):
    """The files of one sample."""

    key: str
    image: SourceFile
    label: SourceFile | None


def find_pairs(card: Card, tree: SourceTree, *, allow_incomplete: bool) -> dict[str, list[Pair]]:
    """The samples of each split in the order of their keys.

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
    """The pairs of a split, and a line for each kind of thing that is missing of it."""
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
        counts = Counter(_part(split.image, file) for file in images.values())
        missing += [
            f"{name}: {counts[name]} images instead of {count}"
            for name, count in split.parts.items()
            if counts[name] != count
        ]
    elif split.samples and len(images) != split.samples:
        missing.append(f"{len(images)} images instead of {split.samples}")
    return pairs, missing


def _by_key(pattern: re.Pattern[str], files: Iterable[SourceFile], doubles: list[str]) -> dict[str, SourceFile]:
    """Key -> file. A file on the disk stands before its copy in an archive."""
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
    """The path with slashes: archives packed on Windows leave names such as ``GT\\LABELS\\0000000.png``."""
    return file.name.replace("\\", "/")


def _part(pattern: re.Pattern[str], file: SourceFile) -> str:
    match = pattern.search(_slashes(file))
    assert match is not None
    return match["part"]


def _unpaired(what: str, keys: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    names = sorted(keys)
    if not names:
        return []
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"{len(names)} have no {what} ({', '.join(names[:NAMED])}{more}); looked for {_readable(pattern)}"]


def _ranges(numbers: Sequence[int], digits: int) -> str:
    """``00001 to 02500, 07001``, at most ``NAMED`` of them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{a:0{digits}d}" if a == b else f"{a:0{digits}d} to {b:0{digits}d}" for a, b in runs[:NAMED]]
    return ", ".join(texts) + (f" and {len(runs) - NAMED} more gaps" if len(runs) > NAMED else "")


def _readable(pattern: re.Pattern[str]) -> str:
    """A path pattern for people: ``leftImg8bit/train/<part>/<key>_leftImg8bit.png``."""
    text = pattern.pattern.removeprefix("(?:^|/)").removesuffix("$").replace("\\.", ".").replace("(?:[^/]+/)*", "")
    text = re.sub(r"\(\?P<(\w+)>((?:[^()]|\\.)*)\)", r"<\1>", text)
    return text.replace("[^/]+", "<folder>")
