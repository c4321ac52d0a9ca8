"""Downloaded data sets as shards: a folder for each split, labels in train ids, pictures as they are or resized."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mfm_dist.data.manifest import Recipe
from mfm_dist.shards.card import Card
from mfm_dist.shards.packing import Report, UnusableSampleError, pack
from mfm_dist.shards.pictures import (
    UnusableError,
    encode_png,
    fitted,
    lookup_table,
    read_ids,
    read_picture,
    resize_label,
    resize_picture,
    to_train_ids,
)
from mfm_dist.shards.source_tree import SourceFile, SourceTree, UnreadableFileError
from mfm_dist.shards.survey import Pair, find_pairs

if TYPE_CHECKING:  # imported where needed, because it loads torch
    from mfm_dist.shards.writer import RawSample

CONVERTER_VERSION = 1
"""Raised whenever the same files would give other shards; shards record it."""
BYTES_PER_PIXEL = {"jpg": 0.5, "png": 2.0}
"""Room asked for before packing, with the label; a picture takes about half of it."""
LONGEST_KEY = 80
_NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9_\-]")


@dataclass(frozen=True, kw_only=True)
class ConvertedSplit:
    """One split of a downloaded data set (a ``PackableSet``)."""

    folder: Path
    card: Card
    split: str
    tree: SourceTree
    pairs: tuple[Pair, ...]
    box: tuple[int, int] | None
    """Sides of the box that every picture is made to fit; None keeps the size."""
    image_format: str
    """``jpg`` or ``png``."""
    shard_size: int
    bad_limit: float
    command: str

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.card.class_names

    @property
    def samples(self) -> int:
        return len(self.pairs)

    @property
    def recipe(self) -> Recipe:
        names = "\n".join(f"{pair.key} {pair.image.name} {pair.label and pair.label.name}" for pair in self.pairs)
        arguments: dict[str, Any] = {
            "split": self.split,
            "samples": self.samples,
            "files": hashlib.sha256(names.encode()).hexdigest()[:16],
            "size": "as downloaded" if self.box is None else "x".join(map(str, sorted(self.box))),
            "format": self.image_format,
            "shard_size": self.shard_size,
            "train_ids": {str(key): value for key, value in sorted(self.card.train_ids.items())},
        }
        return Recipe(generator=self.card.name, version=CONVERTER_VERSION, arguments=arguments)

    @property
    def bytes_per_sample(self) -> int:
        height, width = self.card.size if all(self.card.size) else self._first_size
        if self.box is not None:
            height, width = fitted((height, width), self.box)
        return int(height * width * BYTES_PER_PIXEL[self.image_format])

    @property
    def _first_size(self) -> tuple[int, int]:
        """Height and width of the first picture that can be read; one pixel if there is none."""
        for pair in self.pairs:
            try:
                image, _ = read_picture(self.tree.read(pair.image))
            except (UnusableError, UnreadableFileError):
                continue
            return image.shape[0], image.shape[1]
        return 1, 1

    @cached_property
    def _table(self) -> np.ndarray:
        return lookup_table(self.card.train_ids)

    def sample(self, number: int) -> RawSample:
        """Reads, checks and converts one pair.

        Raises:
            UnusableSampleError: naming the file and the reason.
        """
        from mfm_dist.shards.writer import RawSample

        pair = self.pairs[number]
        image, content, stored = self._image(pair)
        size = (image.shape[0], image.shape[1])
        label = None if pair.label is None else self._label(pair, pair.label, size)
        if self.box is not None and (smaller := fitted(size, self.box)) != size:
            image, stored = resize_picture(image, smaller), None
            label = None if label is None else resize_label(label, smaller)
        image_file = None  # a JPEG is made of the image
        if stored == self.image_format:
            image_file = (stored, content)
        elif self.image_format == "png":
            image_file = ("png", encode_png(image))
        return RawSample(
            key=sample_key(pair.key),
            image=image,
            label=label,
            meta={"file": str(pair.image), "original_size": list(size)},
            image_file=image_file,
        )

    def _image(self, pair: Pair) -> tuple[np.ndarray, bytes, str | None]:
        """The picture, the bytes of its file, and the format in which they may be stored."""
        content = self._read(pair, pair.image)
        try:
            image, stored = read_picture(content)
        except UnusableError as error:
            raise self._refusal(pair, pair.image, str(error)) from error
        if not self.card.sizes_vary and image.shape[:2] != self.card.size:
            allowed = "x".join(map(str, self.card.size))
            raise self._refusal(
                pair, pair.image, f"has {image.shape[0]}x{image.shape[1]} pixels (height x width), not {allowed}"
            )
        return image, content, stored

    def _label(self, pair: Pair, file: SourceFile, size: tuple[int, int]) -> np.ndarray:
        content = self._read(pair, file)
        try:
            ids = read_ids(content, self.card.label_kinds)
            if ids.shape != size:
                raise self._refusal(
                    pair,
                    file,
                    f"has {ids.shape[0]}x{ids.shape[1]} pixels and its image {size[0]}x{size[1]} (height x width)",
                    expected=self.card.leaves_out_unequal_pairs,
                )
            return to_train_ids(ids, self._table)
        except UnusableError as error:
            raise self._refusal(pair, file, str(error)) from error

    def _read(self, pair: Pair, file: SourceFile) -> bytes:
        try:
            return self.tree.read(file)
        except UnreadableFileError as error:
            raise self._refusal(pair, file, str(error)) from error

    def _refusal(self, pair: Pair, file: SourceFile, why: str, *, expected: bool = False) -> UnusableSampleError:
        return UnusableSampleError(key=sample_key(pair.key), reason=f"{file} {why}", expected=expected)


def sample_key(path: str) -> str:
    """A key that a shard can hold. Where letters have to go, some of a checksum keep keys apart."""
    plain = _NOT_IN_A_KEY.sub("_", path)
    if plain == path and len(path) <= LONGEST_KEY:
        return path
    return f"{plain[-(LONGEST_KEY - 9) :]}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What the command line says about a data set."""

    source: Path
    output: Path
    box: tuple[int, int] | None
    """For training splits."""
    val_box: tuple[int, int] | None
    """For ``val``."""
    image_format: str
    shard_size: int
    bad_limit: float
    allow_incomplete: bool
    command: str


def convert(card: Card, conversion: Conversion, *, report: Report, workers: int | None, overwrite: bool) -> None:
    """Writes ``<output>/<split>`` for every split of a data set, or what is missing of them.

    Args:
        workers: processes; None is one a core.
        overwrite: replace folders that hold other shards.

    Raises:
        ConfigError, DataError, StorageError: as ``find_pairs`` and ``pack`` do.
    """
    tree = SourceTree(conversion.source)
    found = find_pairs(card, tree, allow_incomplete=conversion.allow_incomplete)
    sets = [
        ConvertedSplit(
            folder=conversion.output / split,
            card=card,
            split=split,
            tree=tree,
            pairs=tuple(pairs),
            box=conversion.val_box if split == "val" else conversion.box,
            image_format=conversion.image_format,
            shard_size=conversion.shard_size,
            bad_limit=conversion.bad_limit,
            command=conversion.command,
        )
        for split, pairs in found.items()
    ]
    cores = len(os.sched_getaffinity(0))
    pack(sets, output=conversion.output, workers=workers or cores, overwrite=overwrite, report=report)
