"""What the values of a label mean: the classes of a data set, and how labels as stored become their indices.

A class set is written as plain nested values, in a class file (YAML, ``config.class_files``) and, as JSON, in the
manifest of shards and in checkpoints::

    names: [soil, crop, weed]           # the order is that of the logits
    palette: {soil: "#804000"}          # optional, of all or some
    things: [weed]                      # optional: objects, not stuff (DAFormer)
    groups: {plants: [crop, weed]}      # optional: subsets whose mean IoU may be given too
    merges: {crop: [maize, wheat]}      # optional: classes of other sets that one of these takes in

and only in a class file, where it describes labels that are to be packed::

    ids: {3: soil, 10: crop, 11: weed}  # or colours: {"#804000": soil, "0 128 0": crop}
    ignore: [0, 255]                    # or others: whatever is not listed
"""

from __future__ import annotations

import colorsys
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from mfm_dist.errors import ConfigError

IGNORE_INDEX = 255
"""Label of a pixel that no loss and no metric may count."""
MOST_CLASSES = IGNORE_INDEX
"""A label is one byte."""
IGNORED = "ignore"
"""What counts of pixels call those without a class; no class may have this name."""

Colour = tuple[int, int, int]
"""RGB in 0..255."""


@dataclass(frozen=True, kw_only=True)
class ClassSet:
    """The classes of a data set. Index = channel of the logits = value of a stored label."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    """Of each class, all different."""
    things: tuple[str, ...] = ()
    """Classes of objects that an ImageNet encoder knows (DAFormer's feature distance)."""
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Subsets by name, whose mean IoU can be given too."""
    merges: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of other sets' classes that a class takes in."""

    def __len__(self) -> int:
        return len(self.names)

    def indices(self, names: Iterable[str]) -> list[int]:
        """Return the index of each of these classes."""
        return [self.names.index(name) for name in names]

    def to_tree(self) -> dict[str, Any]:
        """Return plain nested values, as JSON has them, which ``from_tree`` reads back."""
        return {
            "names": list(self.names),
            "palette": [list(colour) for colour in self.palette],
            "things": list(self.things),
            "groups": {name: list(names) for name, names in self.groups.items()},
            "merges": {name: list(names) for name, names in self.merges.items()},
        }

    @classmethod
    def from_tree(cls, tree: Any, where: str) -> ClassSet:
        """Read a class set. Raises ConfigError with everything that is wrong, each beginning with ``where``."""
        classes, labels = read_classes(tree, where)
        if labels is not None:
            raise ConfigError(f"{where}: ids and colours belong into a class file")
        return classes

    def difference(self, other: ClassSet) -> str:
        """Say how the names or their order differ, with both lists; "" where they do not."""
        if self.names == other.names:
            return ""
        how = "the same in another order" if sorted(self.names) == sorted(other.names) else "not the same"
        return f"the classes are {how}:\n    {self}\n    {other}"

    def relabelling(self, other: ClassSet) -> Relabelling | None:
        """Return what each class of another set is here: the class that takes it in, else the one of its name.

        None where both sets have the same names in the same order.
        """
        if self.names == other.names:
            return None
        into = {name: name for name in self.names}
        into |= {taken: name for name, several in self.merges.items() for taken in several}
        found = [into.get(name) for name in other.names]
        return Relabelling(
            new_classes=len(self),
            table=tuple(IGNORE_INDEX if name is None else self.names.index(name) for name in found),
            ignored=tuple(name for name, here in zip(other.names, found, strict=True) if here is None),
            absent=tuple(name for name in self.names if name not in found),
        )

    def __str__(self) -> str:
        return f"{len(self)}: {', '.join(self.names)}"


@dataclass(frozen=True, kw_only=True)
class Relabelling:
    """How labels of one class set become labels of another."""

    new_classes: int
    """How many the new set has."""
    table: tuple[int, ...]
    """New label of each class, ``IGNORE_INDEX`` where it has none."""
    ignored: tuple[str, ...]
    """Classes that become none."""
    absent: tuple[str, ...]
    """Classes of the new set that none becomes."""

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of what becomes of each class."""
        return hashlib.sha256(repr(self.table).encode()).hexdigest()

    @property
    def matches(self) -> bool:
        """Whether any class becomes one of the new set."""
        return len(self.ignored) < len(self.table)

    def label(self, index: int) -> int:
        """Return the new label of one class, or of ``IGNORE_INDEX``."""
        return IGNORE_INDEX if index == IGNORE_INDEX else self.table[index]

    def apply(self, label: np.ndarray) -> np.ndarray:
        """Return the new label of each pixel, uint8 [H, W]."""
        new = np.full(IGNORE_INDEX + 1, IGNORE_INDEX, dtype=np.uint8)
        new[: len(self.table)] = self.table
        return new[label]

    def sum_counts(self, counts: np.ndarray) -> np.ndarray:
        """Return counts of pixels by new class, uint32 [samples, new classes], from [samples, classes]."""
        table = np.array(self.table)
        sums = np.zeros((len(counts), self.new_classes), dtype=counts.dtype)
        for index in np.unique(table[table != IGNORE_INDEX]):
            sums[:, index] = counts[:, table == index].sum(axis=1)
        return sums


@dataclass(frozen=True, kw_only=True)
class LabelMapping:
    """What the values mean that label files hold."""

    classes: Mapping[int, int]
    """Every id, or colour as ``colour_code`` gives it, to the index of a class or ``IGNORE_INDEX``."""
    colours: bool = False
    """Whether the values are colours."""
    others_ignored: bool = False
    """Whether values that are not listed are ignored; they are an error otherwise."""


def colour_code(colour: Colour) -> int:
    """Return a colour as one number, 0xRRGGBB."""
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def generated_palette(count: int) -> list[Colour]:
    """Return colours that are easily told apart: hues a golden section apart, in turns of brightness and saturation."""
    turns = ((0.95, 0.85), (0.65, 1.0), (1.0, 0.45))
    parts = [colorsys.hsv_to_rgb((0.07 + i * 0.618034) % 1.0, *reversed(turns[i % 3])) for i in range(count)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in parts]


_KEYS = ("names", "palette", "things", "groups", "merges", "ids", "colours", "ignore")
OTHERS = "others"


def read_classes(tree: Any, where: str) -> tuple[ClassSet, LabelMapping | None]:
    """Read a class set and, where it says so, what the values of labels are.

    Raises:
        ConfigError: with everything that is wrong, each beginning with ``where``.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: expected a class set, which has names, got {tree!r:.80}")
    reader = _Reader(tree)
    classes, labels = reader.class_set(), reader.labels()
    if reader.problems:
        raise ConfigError([f"{where}: {problem}" for problem in dict.fromkeys(reader.problems)])
    return classes, labels


def read_colour(value: Any) -> Colour | None:
    """Read ``#804080``, ``128 64 128`` or [128, 64, 128]; None if it is no colour."""
    parts: Sequence[Any] = value if isinstance(value, list | tuple) else ()
    if isinstance(value, str):
        hexadecimal = re.fullmatch(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", value)
        numbers = re.fullmatch(r"(\d{1,3})[ ,]+(\d{1,3})[ ,]+(\d{1,3})", value)
        parts = [int(part, 16) for part in hexadecimal.groups()] if hexadecimal else parts
        parts = [int(part) for part in numbers.groups()] if numbers else parts
    if len(parts) != 3 or any(type(part) is not int or not 0 <= part <= 255 for part in parts):
        return None
    return parts[0], parts[1], parts[2]


class _Reader:
    """Reads the parts of a class set and gathers what is wrong with them."""

    def __init__(self, tree: Mapping[Any, Any]) -> None:
        self.tree = tree
        allowed = ", ".join(_KEYS)
        self.problems = [f"unknown key {key!r}; allowed are {allowed}" for key in tree if key not in _KEYS]
        self.names = self._names()

    def class_set(self) -> ClassSet:
        """Read all but what labels hold."""
        merges = {name: self._several(f"merges.{name}", names) for name, names in self._mapping("merges").items()}
        self._check_known("merges", merges)
        for name in _repeated([*chain(*merges.values())]):
            self.problems.append(f"merges: {name!r} is taken in by two classes")
        for name in [taken for into, several in merges.items() for taken in several if taken != into]:
            if name in self.names:
                self.problems.append(f"merges: {name!r} is a class of this set itself")
        things = self._several("things", self.tree.get("things"))
        self._check_known("things", things)
        groups = {name: self._several(f"groups.{name}", names) for name, names in self._mapping("groups").items()}
        for name, names in groups.items():
            self._check_known(f"groups.{name}", names)
        return ClassSet(names=self.names, palette=self._palette(), things=things, groups=groups, merges=merges)

    def labels(self) -> LabelMapping | None:
        """Read what labels hold; None where nothing is said of it."""
        kinds = [key for key in ("ids", "colours") if key in self.tree]
        ignore = self.tree.get("ignore", [])
        if len(kinds) != 1:
            self.problems += ["ids and colours: labels hold one or the other, leave one out"] if kinds else []
            self.problems += ["ignore: says nothing without ids or colours"] if ignore and not kinds else []
            return None
        kind, listed = kinds[0], self._mapping(kinds[0])
        found: dict[int, int] = {}
        self._check_known(kind, listed.values())
        for key, name in listed.items():
            value = self._value(key, kind, kind)
            if value is not None and name in self.names:
                found[value] = self.names.index(name)
        for key in [] if ignore == OTHERS else ignore if isinstance(ignore, list) else [ignore]:
            value = self._value(key, kind, f"ignore ({OTHERS}, or a list)")
            if value in found:
                self.problems.append(f"ignore: {key} stands for a class, too")
            elif value is not None:
                found[value] = IGNORE_INDEX
        return LabelMapping(classes=found, colours=kind == "colours", others_ignored=ignore == OTHERS)

    def _names(self) -> tuple[str, ...]:
        names = self._several("names", self.tree.get("names"))
        if not names:
            self.problems.append("names: are missing; write names: [soil, crop, ...], in the order of the classes")
        if IGNORED in names:
            self.problems.append(f"names: {IGNORED!r} is no class; list what shall not count under ignore")
        self.problems += [f"names: {name!r} is there twice" for name in _repeated(names)]
        if len(names) > MOST_CLASSES:
            self.problems.append(f"names: {len(names)} classes are too many: a label is one byte, {MOST_CLASSES} fit")
        return names

    def _palette(self) -> tuple[Colour, ...]:
        """Return the colours that are given, else those that labels have, else generated ones."""
        given = self.tree.get("palette") or {}
        if isinstance(given, list):
            if len(given) != len(self.names):
                self.problems.append(f"palette: {len(given)} colours for {len(self.names)} classes")
            given = dict(zip(self.names, given, strict=False))
        elif not isinstance(given, Mapping):
            self.problems.append(f"palette: expected a colour by class, got {given!r:.80}")
            given = {}
        self._check_known("palette", given)
        of_labels = reversed(self._mapping("colours").items())  # so that the first of several wins
        in_labels = {name: colour for colour, name in of_labels if read_colour(colour)}
        colours = list(generated_palette(len(self.names)))
        for name, value in {**in_labels, **given}.items():
            colour = read_colour(value)
            if colour is None:
                self.problems.append(f"palette: {value!r} of {name!r} is no colour; {_COLOUR_FORMS}")
            elif name in self.names:
                colours[self.names.index(name)] = colour
        self.problems += [f"palette: {list(colour)} is the colour of two classes" for colour in _repeated(colours)]
        return tuple(colours)

    def _value(self, key: Any, kind: str, where: str) -> int | None:
        """Read one id or colour that labels hold."""
        if kind == "colours":
            colour = read_colour(key)
            if colour is None:
                self.problems.append(f"{where}: {key!r} is no colour; {_COLOUR_FORMS}")
            return None if colour is None else colour_code(colour)
        if isinstance(key, str) and key.isdigit():  # JSON writes keys as text
            key = int(key)
        if type(key) is not int or not 0 <= key < 1 << 16:
            self.problems.append(f"{where}: {key!r} is no id, a whole number from 0 to 65535")
            return None
        return key

    def _mapping(self, key: str) -> dict[Any, Any]:
        value = self.tree.get(key) or {}
        if isinstance(value, Mapping):
            return dict(value)
        self.problems += [f"{key}: expected a mapping, got {value!r:.80}"]
        return {}

    def _several(self, where: str, value: Any) -> tuple[str, ...]:
        """Read a list of names."""
        several = value if isinstance(value, list | tuple) else [] if value is None else [value]
        wrong = [name for name in several if not (isinstance(name, str) and name.strip() and name.isprintable())]
        self.problems += [f"{where}: {name!r} is no name (in quotes, yes, no, on and off are text)" for name in wrong]
        return tuple(name for name in several if name not in wrong)

    def _check_known(self, where: str, names: Iterable[Any]) -> None:
        unknown = dict.fromkeys(str(name) for name in names if name not in self.names)
        if unknown:
            self.problems.append(f"{where}: {', '.join(unknown)} not in names, which are {', '.join(self.names)}")


_COLOUR_FORMS = "write '#804080' or '128 64 128'"


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for value in dict.fromkeys(values) if values.count(value) > 1]
