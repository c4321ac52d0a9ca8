#!/usr/bin/env python
"""Packs data sets into shards: python tools/make_shards.py scenes --output data/scenes

Run it again to go on after an interruption; when everything is there it says so and ends. Exit codes: 0 done,
2 wrong arguments, 3 bad data, 4 no room or no right to write, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

from mfm_dist.data.scene_shards import write_scenes
from mfm_dist.data.scenes import Gap
from mfm_dist.errors import EXIT_DONE, ConfigError, UserError

EXIT_INTERRUPTED = 130


def make_scenes(args: argparse.Namespace) -> None:
    """The ``scenes`` sub-command."""
    write_scenes(
        args.output,
        train=args.train,
        val=args.val,
        size=(args.height, args.width),
        seed=args.seed,
        report=partial(print, flush=True),
        gap=args.gap,
        shard_size=args.shard_size,
        workers=args.workers,
        overwrite=args.overwrite,
    )


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other mistake: one message, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. Try: {self.prog} --help")


def whole(least: int, most: int = 1 << 40) -> Callable[[str], int]:
    """An argparse type: a whole number between two bounds."""

    def whole_number(text: str) -> int:
        number = int(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return number

    return whole_number


def gap(text: str) -> Gap:
    """An argparse type: causes of the domain gap, ``photometric,texture`` or ``none``."""
    known = list(asdict(Gap()))
    chosen = [] if text == "none" else text.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(known)}, or none")
    return Gap(**{name: name in chosen for name in known})


def build_parser() -> argparse.ArgumentParser:
    """One sub-command for each data set."""
    parser = _Parser(prog="make_shards.py", description="Packs data sets into WebDataset shards with an index.")
    commands = parser.add_subparsers(dest="data set", required=True)
    scenes = commands.add_parser("scenes", help="the embedded street scenes: game (source) and camera (target)")
    scenes.set_defaults(make=make_scenes)
    scenes.add_argument("--output", type=Path, required=True, help="folder of the four data sets, e.g. data/scenes")
    scenes.add_argument("--train", type=whole(1), default=600, help="training images a domain (%(default)s)")
    scenes.add_argument("--val", type=whole(1), default=100, help="validation images a domain (%(default)s)")
    scenes.add_argument("--height", type=whole(32, 8192), default=256, help="pixels (%(default)s)")
    scenes.add_argument("--width", type=whole(32, 8192), default=512, help="pixels (%(default)s)")
    scenes.add_argument("--seed", type=whole(0), default=0, help="of the whole data set (%(default)s)")
    scenes.add_argument("--gap", type=gap, default=Gap(), help="photometric,texture,layout (all) or some, or none")
    scenes.add_argument("--shard-size", type=whole(1), default=100, help="images a shard (%(default)s)")
    scenes.add_argument("--workers", type=whole(1), help="processes (one a core)")
    scenes.add_argument("--overwrite", action="store_true", help="replace shards that were made in another way")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    try:
        args = build_parser().parse_args(argv)
        args.make(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last finished shard", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
