"""Types of arguments that several tools take."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Make an argparse type: a whole number from ``least`` on, up to ``most`` if there is a bound."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < least or (most is not None and number > most):
            allowed = f"at least {least}" if most is None else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return number

    return whole_number
