"""Arguments that several tools take, and their types."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def add_run_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Let a command be told its run as training is: by ``--config``, once or more, and by overrides.

    Args:
        default: what the run is without ``--config``, for people; ``config`` is None then.
    """
    files = f"the run; given again, later files win key by key (default: {default})"
    parser.add_argument("--config", type=Path, action="append", metavar="FILE", help=files)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single settings")


def config_arguments(files: Sequence[Path]) -> list[str]:
    """Write configuration files as the arguments of another command."""
    return [word for file in files for word in ("--config", str(file))]


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Make an argparse type: a whole number from ``least`` on, up to ``most`` if there is a bound."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < least or (most is not None and number > most):
            allowed = f"at least {least}" if most is None else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return number

    return whole_number
