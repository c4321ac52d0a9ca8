"""Pack data sets into shards: mfm-shards make gta --input ~/downloads/gta --size 720x1280

The input is the download as it came, in folders or zip archives. Run the command again to go on after an
interruption; when everything is there it says so and ends. Exit codes: 0 done, 2 wrong arguments, 3 bad data,
4 no room or no right to write, 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from mfm_dist.config.arguments import image_size, whole
from mfm_dist.config.class_files import DEFAULT, load_class_file, load_class_set, shipped_class_sets
from mfm_dist.errors import EXIT_DONE, ConfigError, tell_user_errors
from mfm_dist.shards.card import IMAGE_SUFFIXES, Card, card_names, folder_card, read_card
from mfm_dist.shards.convert import Conversion, convert
from mfm_dist.shards.scene_shards import ALL_CAUSES, write_scenes

EXIT_INTERRUPTED = 130
EXAMPLE = """  names: [soil, crop, weed]
  ids: {3: soil, 10: crop, 11: weed}    # or colours: {"#804000": soil, "0 128 0": crop}
  ignore: [0, 255]                      # or others
  things: [weed]                        # optional, as are palette, groups and merges (docs/data.md)"""


def make_scenes(args: argparse.Namespace) -> None:
    """Carry out the ``scenes`` sub-command."""
    write_scenes(
        args.output,
        train=args.train,
        val=args.val,
        size=(args.height, args.width),
        seed=args.seed,
        report=partial(print, flush=True),
        gap=args.gap,
        classes=args.classes,
        shard_size=args.shard_size,
        workers=args.workers,
        overwrite=args.overwrite,
    )


def make_card_set(args: argparse.Namespace) -> None:
    """Carry out the sub-command of a data set that has a card."""
    card: Card = args.card
    if args.splits:
        card = card.only(args.splits)
    if args.classes:
        card = card.in_classes(load_class_set(args.classes))
    _convert(card, args, args.size, args.val_size)


def make_folder(args: argparse.Namespace) -> None:
    """Carry out the ``folder`` sub-command."""
    if args.labels is None and args.classes is not None:
        raise ConfigError("--classes says what labels mean, but no labels are given; name their folder with --labels")
    if args.labels is not None and args.classes is None:
        known = ", ".join(shipped_class_sets())
        raise ConfigError(f"--labels {args.labels}: say with --classes what they hold: {known}, or a file\n{EXAMPLE}")
    card = folder_card(
        name=args.name,
        split=args.split,
        images=args.images,
        labels=args.labels,
        image_end=args.image_end,
        label_end=args.label_end,
        classes=None if args.classes is None else load_class_file(args.classes),
    )
    _convert(card, args, args.size, args.size)


def _convert(
    card: Card, args: argparse.Namespace, box: tuple[int, int] | None, val_box: tuple[int, int] | None
) -> None:
    conversion = Conversion(
        source=args.input,
        output=args.output or Path("data") / card.name,
        box=box,
        val_box=val_box,
        image_format=args.format,
        shard_size=args.shard_size,
        bad_limit=args.bad_limit,
        allow_incomplete=args.allow_incomplete,
        command=_command(args),
    )
    convert(card, conversion, report=partial(print, flush=True), workers=args.workers, overwrite=args.overwrite)


def _command(args: argparse.Namespace) -> str:
    """Return the command that makes the same shards, without its ``--output``."""
    words = ["mfm-shards", "make", getattr(args, "data set")]
    for name in _REPEATED:
        value = vars(args).get(name)
        if value in (None, False, 0.0, ""):
            continue
        words += [f"--{name.replace('_', '-')}", *([] if value is True else _words(value))]
    return shlex.join(words)


_REPEATED = (
    "input", "name", "split", "splits", "images", "labels", "classes", "image_end", "label_end", "size", "val_size",
    "format", "shard_size", "bad_limit", "allow_incomplete",
)  # fmt: skip
"""Arguments that determine the shards."""


def _words(value: object) -> list[str]:
    if isinstance(value, str) and Path(value).suffix and Path(value).is_file():  # a class file
        return [str(Path(value).absolute())]
    if isinstance(value, Path):
        return [str(value.absolute())]
    if isinstance(value, tuple):
        return ["x".join(map(str, value))]
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


class _Parser(argparse.ArgumentParser):
    """Report a wrong argument like every other mistake: one message, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. Try: {self.prog} --help")


box = image_size(16)


def street_size(text: str) -> tuple[int, int]:
    """Read height and width of pictures of streets, which all are wider than high."""
    height, width = box(text)
    if height > width:
        raise argparse.ArgumentTypeError(
            f"{text} is height x width, {height} pixels high; pictures of streets are wider than high: {width}x{height}"
        )
    return height, width


def share(text: str) -> float:
    """Read a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def name(text: str) -> str:
    """Read the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_\-]+", text):
        raise argparse.ArgumentTypeError(f"{text} holds more than letters, digits, _ and -")
    return text


def gap(text: str) -> list[str]:
    """Read causes of the domain gap, ``photometric,texture`` or ``none``."""
    chosen = [] if text == "none" else text.split(",")
    unknown = [name for name in chosen if name not in ALL_CAUSES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(ALL_CAUSES)}, or none")
    return chosen


def build_parser() -> argparse.ArgumentParser:
    """Make one sub-command for each data set."""
    parser = _Parser(prog="mfm-shards make", description="Pack data sets into WebDataset shards with an index.")
    commands = parser.add_subparsers(dest="data set", required=True)
    scenes = commands.add_parser("scenes", help="the embedded street scenes: game (source) and camera (target)")
    scenes.set_defaults(make=make_scenes)
    scenes.add_argument("--output", type=Path, required=True, help="folder of the four data sets, e.g. data/scenes")
    scenes.add_argument("--train", type=whole(1), default=600, help="training images a domain (%(default)s)")
    scenes.add_argument("--val", type=whole(1), default=100, help="validation images a domain (%(default)s)")
    scenes.add_argument("--height", type=whole(32, 8192), default=256, help="pixels (%(default)s)")
    scenes.add_argument("--width", type=whole(32, 8192), default=512, help="pixels (%(default)s)")
    scenes.add_argument("--seed", type=whole(0, 1 << 40), default=0, help="of the whole data set (%(default)s)")
    scenes.add_argument("--gap", type=gap, default=ALL_CAUSES, help="photometric,texture,layout (all) or some, or none")
    _add_classes(scenes, DEFAULT)
    _add_work(scenes)
    for card in map(read_card, card_names()):
        _add_card(commands, card)
    _add_folder(commands)
    return parser


def _add_card(commands: argparse._SubParsersAction, card: Card) -> None:
    splits = {split.name: split.samples for split in card.splits}
    counts = ", ".join(f"{samples} {name}" for name, samples in splits.items())
    command = commands.add_parser(card.name, help=f"{card.title} ({counts})", description=f"Download {card.download}.")
    command.set_defaults(make=make_card_set, card=card, val_size=None)
    command.add_argument("--input", type=Path, required=True, help="folder of the download, unpacked or not")
    command.add_argument("--output", type=Path, help=f"folder of the splits (data/{card.name})")
    command.add_argument("--splits", nargs="+", choices=list(splits), help="only these")
    said = "fit {} into this height and width, e.g. 720x1280 (as downloaded)"
    command.add_argument("--size", type=street_size, metavar="HxW", help=said.format("training images"))
    if "val" in splits:
        val = said.format("validation images, and what is scored,")
        command.add_argument("--val-size", type=street_size, metavar="HxW", help=val)
    _add_classes(command, None)
    _add_conversion(command)


def _add_classes(command: argparse.ArgumentParser, default: str | None) -> None:
    said = "class set that the labels become, by name: cityscapes7 ..., or a class file (cityscapes19)"
    command.add_argument("--classes", metavar="NAME|FILE", default=default, help=said)


def _add_folder(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "folder",
        help="your own images, labelled or not",
        description="The label of IMAGES/a/b.jpg is LABELS/a/b.png, a PNG that holds an id or a colour a pixel.",
        epilog=f"a class file:\n{EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(make=make_folder)
    command.add_argument("--input", type=Path, required=True, help="folder of the images, and of the labels")
    command.add_argument("--name", type=name, required=True, help="of the data set; becomes a folder in data/")
    command.add_argument("--split", choices=["train", "val"], default="train", help="(%(default)s)")
    command.add_argument("--images", default=".", help="where in the input the images are (anywhere)")
    command.add_argument("--labels", help="where in the input the labels are (there are none)")
    names = ", ".join(shipped_class_sets())
    command.add_argument("--classes", metavar="NAME|FILE", help=f"what the labels hold: {names}, or a file as below")
    command.add_argument(
        "--image-end", default="", help=f"how images end, e.g. _rgb.png (.{', .'.join(IMAGE_SUFFIXES)})"
    )
    command.add_argument("--label-end", default="", help="how labels end, e.g. _ids.png (.png)")
    command.add_argument("--output", type=Path, help="folder of the splits (data/NAME)")
    command.add_argument(
        "--size", type=box, metavar="HxW", help="fit images into this box, e.g. 512x1024 (as they are)"
    )
    _add_conversion(command)


def _add_conversion(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--format",
        choices=["jpg", "png"],
        default="jpg",
        help="of stored images (%(default)s): jpg is quality 95; png is lossless, larger and 4 to 8 times slower to "
        "read. A file that has the format, and is not resized, is stored byte for byte",
    )
    command.add_argument("--bad-limit", type=share, default=0.0, help="share of unusable pairs to leave out (0)")
    command.add_argument("--allow-incomplete", action="store_true", help="take the pairs that are there")
    _add_work(command)


def _add_work(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shard-size", type=whole(1), default=100, help="images a shard (%(default)s)")
    command.add_argument("--workers", type=whole(1), help="processes (one a core)")
    command.add_argument("--overwrite", action="store_true", help="replace shards that were made in another way")


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        args = build_parser().parse_args(argv)
        args.make(args)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last finished shard", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_DONE
