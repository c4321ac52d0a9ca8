"""Class sets by name or file: those of ``class_sets`` beside this file, and the user's own in the same form."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

from mfm_dist.classes import ClassSet, LabelMapping, read_classes
from mfm_dist.config.loader import read_yaml
from mfm_dist.errors import ConfigError

SHIPPED = Path(__file__).parent / "class_sets"
DEFAULT = "cityscapes19"
"""The classes of the scenes, and of every data set that has a card."""


class ClassFile(NamedTuple):
    """What a class file says."""

    classes: ClassSet
    labels: LabelMapping | None
    """What the values in labels mean that are to be packed; None where the file does not say it."""


def shipped_class_sets() -> list[str]:
    """List the names that stand for a class file of ours."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_class_file(name: str) -> ClassFile:
    """Read one of ``shipped_class_sets()``, or the YAML or JSON file of this path.

    Raises:
        ConfigError: there is none, or with everything that is wrong with it.
    """
    path = SHIPPED / f"{name}.yaml" if name in shipped_class_sets() else Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, shipped_class_sets(), n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(shipped_class_sets())
        raise ConfigError(f"{name}: {meant}no class set has this name ({known}), and there is no such file")
    try:
        tree = read_yaml(path)
    except ConfigError as error:
        if "unhashable key" in str(error):  # what YAML's reader says of {[128, 64, 128]: soil}
            raise ConfigError(f"{name}: a colour in front of a colon is written '#804080' or '128 64 128'") from error
        raise
    return ClassFile(*read_classes(tree, name))


def load_class_set(name: str) -> ClassSet:
    """Read the class set of ``load_class_file``, which raises ConfigError."""
    return load_class_file(name).classes
