"""What a data set looks like as downloaded: the form that the files of ``cards`` fill in, or the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from mfm_dist.classes import ClassSet, LabelMapping
from mfm_dist.config.class_files import DEFAULT, ClassFile, load_class_file, load_class_set
from mfm_dist.errors import ConfigError
from mfm_dist.shards import cards

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff")
LABEL_KINDS = (
    "8-bit grey", "16-bit grey", "1-bit palette", "2-bit palette", "4-bit palette", "8-bit palette", "16-bit RGB",
)  # fmt: skip
"""Any PNG that holds one id a pixel (in the red channel of 16-bit RGB). Grey of fewer bits is scaled by its readers."""
COLOUR_KINDS = ("8-bit RGB", "8-bit RGBA", "1-bit palette", "2-bit palette", "4-bit palette", "8-bit palette")
"""Any PNG that holds one colour a pixel."""


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
    """What its label files may be, as ``png_kind`` calls it. Where labels hold ids, that of RGB is the red channel."""
    labels: LabelMapping | None
    """What its label files hold; None without labels."""
    classes: ClassSet | None = field(default_factory=lambda: load_class_set(DEFAULT))
    """What they become; None without labels."""

    @property
    def has_colours(self) -> bool:
        """Whether its labels hold colours and not ids."""
        return self.labels is not None and self.labels.colours

    def only(self, names: list[str]) -> Card:
        """Return the same card with some of its splits."""
        return replace(self, splits=tuple(split for split in self.splits if split.name in names))

    def in_classes(self, classes: ClassSet) -> Card:
        """Return the same card with labels that become other classes, by name. Raises ConfigError where none does."""
        assert self.classes is not None
        assert self.labels is not None
        relabelling = classes.relabelling(self.classes)
        if relabelling is None:
            return replace(self, classes=classes)
        if not relabelling.matches:
            raise ConfigError(f"--classes: none of them is a class of {self.title}, or merges one, {self.classes}")
        indices = {value: relabelling.label(index) for value, index in self.labels.classes.items()}
        return replace(self, classes=classes, labels=replace(self.labels, classes=indices))


def labels_of(name: str) -> LabelMapping:
    """Return what labels hold that a shipped class file describes."""
    labels = load_class_file(name).labels
    assert labels is not None
    return labels


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
    classes: ClassFile | None,
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
        classes: what the labels hold and become; None for images without labels.

    Raises:
        ConfigError: the class file does not say what labels hold.
    """
    mapping = None if classes is None else classes.labels
    if classes is not None and mapping is None:
        raise ConfigError("--classes: that file does not say what labels hold; add ids: {3: soil, ...} or colours: ...")
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
        label_kinds=COLOUR_KINDS if mapping is not None and mapping.colours else LABEL_KINDS,
        labels=mapping,
        classes=None if classes is None else classes.classes,
    )


def _below(folder: str) -> str:
    """Start a pattern for files below a folder."""
    path = Path(folder).as_posix()
    return "^" if path == "." else f"^{re.escape(path)}/"
