"""Arguments that several commands take, and their types."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
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


def image_size(least: int) -> Callable[[str], tuple[int, int]]:
    """Make an argparse type: height and width in pixels, such as ``720x1280``, each at least ``least``."""

    def height_and_width(text: str) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
        if match is None or min(int(match[1]), int(match[2])) < least:
            pixels = f", of at least {least} pixels a side" if least > 1 else ""
            raise argparse.ArgumentTypeError(f"{text} is no height x width such as 720x1280{pixels}")
        return int(match[1]), int(match[2])

    return height_and_width


Command = Callable[[Sequence[str]], int]
"""From the arguments after its name to its exit code."""


def run_named(commands: Mapping[str, Command], description: str | None, prog: str, argv: Sequence[str] | None) -> int:
    """Run the command that the first argument names; where it names none, say which there are and end."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in commands:
        return commands[given[0]](given[1:])
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=commands, help="--help after it says more")
    parser.parse_args(given[:1])
    raise AssertionError("not reached: no command was named")
