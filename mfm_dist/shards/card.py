"""What a data set looks like as downloaded: the form that the files of ``cards`` fill in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pkgutil import iter_modules

from mfm_dist.classes import CLASS_NAMES, IGNORE_INDEX
from mfm_dist.shards import cards

CITYSCAPES_TRAIN_IDS: Mapping[int, int] = {
    **dict.fromkeys(range(34), IGNORE_INDEX),
    **dict(zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(19), strict=True)),
}
"""Ids of Cityscapes to train ids; those of no evaluated class are ignored (Cityscapes scripts, labels.py)."""

TRAIN_IDS: Mapping[int, int] = {
    **{train_id: train_id for train_id in range(len(CLASS_NAMES))},
    IGNORE_INDEX: IGNORE_INDEX,
}
"""For labels that hold train ids already."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One folder of shards and the files that go into it."""

    name: str
    """``train`` or ``val``."""
    image: re.Pattern[str]
    """Searched in the path of every file; its group ``key`` pairs an image with its label and names the sample."""
    label: re.Pattern[str] | None
    """As ``image``; None where the data set has no labels."""
    samples: int
    """How many the complete download holds."""
    numbers: range | None = None
    """Keys of a data set whose files are numbered without a gap."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Samples by the group ``part`` of the paths (a city, a weather), to say what of a download is missing."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One data set."""

    name: str
    title: str
    download: str
    """What to download and where, completing "Download "; "" for images that come from nowhere."""
    splits: tuple[Split, ...]
    size: tuple[int, int]
    """Height and width of its images, pixels."""
    sizes_vary: bool = False
    """Whether images may have another size than ``size``."""
    leaves_out_unequal_pairs: bool = False
    """Whether the data set is known to hold labels of another size than their image; such pairs are left out."""
    label_kinds: tuple[str, ...] = ("8-bit grey",)
    """What its label files may be, as ``png_kind`` calls it. In an RGB label the id is the red channel."""
    train_ids: Mapping[int, int]
    """Every id that its labels may hold to a train id or ``IGNORE_INDEX``."""
    class_names: tuple[str, ...] = CLASS_NAMES
    """Index = train id."""

    def only(self, names: list[str]) -> Card:
        """The same card with some of its splits."""
        return replace(self, splits=tuple(split for split in self.splits if split.name in names))


def card_names() -> list[str]:
    """The data sets that have a card."""
    return sorted(module.name for module in iter_modules(cards.__path__))


def read_card(name: str) -> Card:
    """The card of one of ``card_names()``."""
    card = import_module(f"mfm_dist.shards.cards.{name}").CARD
    assert isinstance(card, Card)
    return card
