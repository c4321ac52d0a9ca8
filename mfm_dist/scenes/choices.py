"""The splits of the embedded data sets, and the check of a name against those that exist."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from mfm_dist.errors import ConfigError

SPLITS = ("train", "val")


def check_choice(what: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ConfigError, with the nearest name, unless ``value`` is one of ``allowed``."""
    if value in allowed:
        return
    near = difflib.get_close_matches(value, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown {what} {value!r} of the scenes: there are {', '.join(allowed)}{hint}")
