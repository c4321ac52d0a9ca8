"""Downloaded data sets as shards: a folder for each split, labels as indices of classes, pictures resized or not."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mfm_dist.data.manifest import Recipe, class_arguments
from mfm_dist.errors import BadSample, CorruptFileError
from mfm_dist.shards.card import Card
from mfm_dist.shards.download import Pair, SourceFile, SourceTree, find_pairs
from mfm_dist.shards.packing import PackableSet, Report, pack
from mfm_dist.shards.pictures import encode_png, lookup_table, read_label, read_picture, resize_pair, to_indices

if TYPE_CHECKING:  # imported where needed, because it loads torch
    from mfm_dist.shards.writer import RawSample

CONVERTER_VERSION = 1
"""Raised whenever the same files would give other shards; shards record it."""
BYTES_PER_PIXEL = {"jpg": 0.5, "png": 2.0}
"""Room asked for before packing, with the label; a picture takes about half of it."""
LONGEST_KEY = 80
_NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9_\-]")


@dataclass(frozen=True, kw_only=True)
class ConvertedSplit(PackableSet):
    """One split of a downloaded data set."""

    card: Card
    tree: SourceTree
    pairs: tuple[Pair, ...]
    box: tuple[int, int] | None
    """Sides of the box that every picture is made to fit; None keeps the size."""
    image_format: str
    """``jpg`` or ``png``."""

    def bytes_per_sample(self) -> int:
        from mfm_dist.data.geometry import fitted

        height, width = self.card.size if all(self.card.size) else self._first_size()
        if self.box is not None:
            height, width = fitted((height, width), self.box)
        return int(height * width * BYTES_PER_PIXEL[self.image_format])

    def _first_size(self) -> tuple[int, int]:
        """Find height and width of the first picture that can be read; one pixel if there is none."""
        for pair in self.pairs:
            with suppress(CorruptFileError):
                image, _ = read_picture(self.tree.read(pair.image))
                return image.shape[0], image.shape[1]
        return 1, 1

    @cached_property
    def _table(self) -> np.ndarray:
        assert self.card.labels is not None
        return lookup_table(self.card.labels)

    def sample(self, number: int) -> RawSample | BadSample:
        """Read, check and convert one pair; the reason of a ``BadSample`` names the file."""
        pair = self.pairs[number]
        bad = partial(BadSample, shard=str(self.folder), key=sample_key(pair.key), number=number)
        try:
            image, image_file = self._read_image(pair.image)
            label = None
            if pair.label is not None:
                with _naming(pair.label):
                    values = read_label(
                        self.tree.read(pair.label), self.card.label_kinds, colours=self.card.has_colours
                    )
                    if values.shape != image.shape[:2]:
                        sizes = f"{_text(values.shape)} pixels and its image {_text(image.shape)} (height x width)"
                        return bad(reason=f"{pair.label} has {sizes}", expected=self.card.leaves_out_unequal_pairs)
                    label = to_indices(values, self._table, colours=self.card.has_colours)
        except CorruptFileError as error:
            return bad(reason=str(error))
        return self._stored(pair, image, label, image_file)

    def _read_image(self, file: SourceFile) -> tuple[np.ndarray, tuple[str, bytes] | None]:
        """Read a picture; beside it format and bytes of its file, where it may be stored as it is."""
        with _naming(file):
            content = self.tree.read(file)
            image, stored = read_picture(content)
            if not self.card.sizes_vary and image.shape[:2] != self.card.size:
                allowed = _text(self.card.size)
                raise CorruptFileError(f"has {_text(image.shape)} pixels (height x width), not {allowed}")
            return image, None if stored is None else (stored, content)

    def _stored(
        self, pair: Pair, image: np.ndarray, label: np.ndarray | None, image_file: tuple[str, bytes] | None
    ) -> RawSample:
        """Bring a pair into the size and the format that are stored."""
        from mfm_dist.data.geometry import fitted
        from mfm_dist.shards.writer import RawSample

        size = (image.shape[0], image.shape[1])
        if self.box is not None and (smaller := fitted(size, self.box)) != size:
            (image, label), image_file = resize_pair(image, label, smaller), None
        if image_file is None or image_file[0] != self.image_format:
            image_file = ("png", encode_png(image)) if self.image_format == "png" else None  # a JPEG is made of it
        return RawSample(
            key=sample_key(pair.key),
            image=image,
            label=label,
            meta={"file": str(pair.image), "original_size": list(size)},
            image_file=image_file,
        )


@contextmanager
def _naming(file: SourceFile) -> Iterator[None]:
    """Put the name of a file before what is wrong with it."""
    try:
        yield
    except CorruptFileError as error:
        raise CorruptFileError(f"{file} {error}") from error


def _text(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}"


def sample_key(path: str) -> str:
    """Make a key that a shard can hold. Where letters have to go, some of a checksum keep keys apart."""
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
    """Write ``<output>/<split>`` for every split of a data set, or what is missing of them.

    Args:
        workers: processes; None is one a core.
        overwrite: replace folders that hold other shards.

    Raises:
        ConfigError, DataError, StorageError: as ``find_pairs`` and ``pack`` do.
    """
    tree = SourceTree(conversion.source)
    found = find_pairs(card, tree, allow_incomplete=conversion.allow_incomplete)
    sets = []
    for split, pairs in found.items():
        box = conversion.val_box if split == "val" else conversion.box
        sets.append(
            ConvertedSplit(
                folder=conversion.output / split,
                recipe=_recipe(card, split, pairs, box, conversion),
                command=conversion.command,
                classes=card.classes,
                samples=len(pairs),
                shard_size=conversion.shard_size,
                bad_limit=conversion.bad_limit,
                card=card,
                tree=tree,
                pairs=tuple(pairs),
                box=box,
                image_format=conversion.image_format,
            )
        )
    pack(sets, output=conversion.output, workers=workers, overwrite=overwrite, report=report)


def _recipe(card: Card, split: str, pairs: list[Pair], box: tuple[int, int] | None, conversion: Conversion) -> Recipe:
    names = "\n".join(f"{pair.key} {pair.image.name} {pair.label and pair.label.name}" for pair in pairs)
    arguments: dict[str, Any] = {
        "split": split,
        "samples": len(pairs),
        "files": hashlib.sha256(names.encode()).hexdigest()[:16],
        "size": "as downloaded" if box is None else "x".join(map(str, sorted(box))),
        "format": conversion.image_format,
        "shard_size": conversion.shard_size,
    }
    if card.labels is not None and card.classes is not None:
        values = sorted(card.labels.classes.items())
        arguments["train_ids"] = {f"#{key:06x}" if card.has_colours else str(key): index for key, index in values}
        arguments |= {"ignore": "others"} if card.labels.others_ignored else {}
        arguments |= class_arguments(card.classes)
    return Recipe(generator=card.name, version=CONVERTER_VERSION, arguments=arguments)
