"""What a data set looks like as downloaded: the form that the files of ``cards`` fill in, or the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from mfm_dist.classes import CLASS_NAMES, IGNORE_INDEX
from mfm_dist.errors import ConfigError
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


IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff")
LABEL_KINDS = (
    "8-bit grey", "16-bit grey", "1-bit palette", "2-bit palette", "4-bit palette", "8-bit palette", "16-bit RGB",
)  # fmt: skip
"""Any PNG that holds one id a pixel (in the red channel of 16-bit RGB). Grey of fewer bits is scaled by its readers."""


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
        """Return the same card with some of its splits."""
        return replace(self, splits=tuple(split for split in self.splits if split.name in names))


def card_names() -> list[str]:
    """List the data sets that have a card."""
    return sorted(module.name for module in iter_modules(cards.__path__))


def read_card(name: str) -> Card:
    """Return the card of one of ``card_names()``."""
    card = import_module(f"mfm_dist.shards.cards.{name}").CARD
    assert isinstance(card, Card)
    return card


def folder_card(
    *,
    name: str,
    split: str,
    images: str,
    labels: str | None,
    image_end: str,
    label_end: str,
    train_ids: Mapping[int, int],
) -> Card:
    """Make a card for the images below one folder, and their labels below another.

    The label of ``<images>/a/b<image_end>`` is ``<labels>/a/b<label_end>``.

    Args:
        name: of the data set.
        split: ``train`` or ``val``.
        images: folder of the images, relative to the input folder; "" is the input folder itself.
        labels: folder of the labels, likewise; None for images without labels.
        image_end: last letters of an image's name, such as ``_leftImg8bit.png``; "" is any image format.
        label_end: last letters of a label's name; "" is ``.png``.
        train_ids: what the ids in the labels mean.
    """
    ends = re.escape(image_end) if image_end else rf"\.(?i:{'|'.join(IMAGE_SUFFIXES)})"
    label = None
    not_labels = ""
    if labels is not None:
        label = re.compile(rf"{_below(labels)}(?P<key>.+){re.escape(label_end or '.png')}$")
        not_labels = f"(?!{_below(labels)})"
    image = re.compile(rf"{not_labels}{_below(images)}(?P<key>.+){ends}$")
    return Card(
        name=name,
        title="set of images and labels" if label else "set of images",
        download="",
        splits=(Split(name=split, image=image, label=label, samples=0),),
        size=(0, 0),
        sizes_vary=True,
        label_kinds=LABEL_KINDS,
        train_ids=train_ids,
    )


def _below(folder: str) -> str:
    """Start a pattern for files below a folder."""
    path = Path(folder).as_posix()
    return "^" if path == "." else f"^{re.escape(path)}/"


def read_mapping(tree: Mapping[Any, Any], where: str) -> dict[int, int]:
    """Read id -> train id from what a mapping file holds: ``{7: road, 8: 1, 9: ignore}``.

    Train ids may be numbers or class names; 255 and ``ignore`` mean that a pixel counts for nothing.

    Raises:
        ConfigError: naming every entry that is none.
    """
    names = {name: train_id for train_id, name in enumerate(CLASS_NAMES)} | {"ignore": IGNORE_INDEX}
    found: dict[int, int] = {}
    wrong = []
    for key, value in tree.items():
        train_id = names.get(value) if isinstance(value, str) else value
        if not _is_id(key) or isinstance(train_id, bool) or not isinstance(train_id, int) or train_id not in TRAIN_IDS:
            wrong.append(f"{where}: {json.dumps({str(key): value})} maps no id (0 to 65535) to a train id")
        else:
            found[int(key)] = train_id
    if wrong:
        allowed = f"0 to {len(CLASS_NAMES) - 1}, their names ({', '.join(CLASS_NAMES)}), or 255 and ignore"
        raise ConfigError([f"{line}; those are {allowed}" for line in wrong])
    if not found:
        raise ConfigError(f"{where} maps nothing; write a line such as '7: road' for every id in the labels")
    return found


def _is_id(value: Any) -> bool:
    """Tell whether a key of the file is a whole number of 16 bits; JSON writes keys as text."""
    if isinstance(value, str):
        return value.isdigit() and int(value) < 1 << 16
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 16
