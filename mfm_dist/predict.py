"""Segment photographs: mfm-predict (--run RUN | --model EXPORT) --input FILE_OR_FOLDER --output FOLDER

Writes FOLDER/ids/NAME.png, whose pixel values are the indices of the model's classes (train ids, for those of
Cityscapes) and which shows them in class colours, FOLDER/overlays/NAME.png, and FOLDER/predictions.json, which names
the classes. Subfolders of the input are kept. Images are
taken upright as EXIF says, and as in the run's evaluation: whole or in windows, fitted into a box (eval.resize) or not.
Exit codes: 0 done, 2 command line, 3 some images could not be read (they are named, the others are done), 4 storage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from mfm_dist import load
from mfm_dist.errors import (
    EXIT_DATA,
    EXIT_DONE,
    ConfigError,
    CorruptFileError,
    StorageError,
    first_line,
    tell_user_errors,
)
from mfm_dist.inference.command_line import model_parser
from mfm_dist.inference.overlays import SUFFIXES, overlay, read_image, save_ids, save_picture
from mfm_dist.inference.segmentor import TrainedSegmentor
from mfm_dist.storage import write_atomically

SUMMARY = "predictions.json"
"""Marks a folder of predictions, which a later start may write into."""


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(argv)
    output: Path = arguments.output
    refuse_unsafe_folders(arguments.input, output)
    names = find_images(arguments.input, output)
    model = load(arguments.run or arguments.model, checked_device(arguments.device))
    root = arguments.input if arguments.input.is_dir() else arguments.input.parent
    try:
        ids, bad = predict_all(model, root, names, output, overlays=arguments.overlays)
        card = model.card
        summary = {"model": card.run, "step": card.step, "classes": card.class_names, "ids": ids, "bad": bad}
        write_atomically(output / SUMMARY, json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"--output {output} cannot be written: {error}") from error
    for name, reason in bad.items():
        print(f"not done: {root / name}: {reason}", file=sys.stderr)
    print(f"{len(ids)} of {len(names)} images: indices of classes in {output / 'ids'}", end="")
    print(f", overlays in {output / 'overlays'}" if arguments.overlays else "")
    return EXIT_DATA if bad else EXIT_DONE


def predict_all(
    model: TrainedSegmentor, root: Path, names: Sequence[Path], output: Path, *, overlays: bool = True
) -> tuple[dict[str, str], dict[str, str]]:
    """Segment ``root / name`` for each name and write the pictures.

    Returns:
        the id picture of each image that is done, below ``output``, and why each of the others could not be used.

    Raises:
        OSError: if ``output`` cannot be written.
    """
    ids_of: dict[str, str] = {}
    bad: dict[str, str] = {}
    pictures = picture_names(names)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / SUMMARY, "{}\n")  # so that an interrupted start may be repeated
    # Every half minute is enough for a log file.
    for name in tqdm(names, unit="image", mininterval=0.1 if sys.stderr.isatty() else 30.0, dynamic_ncols=True):
        try:
            image = read_image(root / name)
            ids = model.predict(image).cpu()
        except CorruptFileError as error:
            bad[str(name)] = str(error)
            continue
        except (MemoryError, RuntimeError) as error:
            if "memory" not in str(error) and not isinstance(error, MemoryError):
                raise
            bad[str(name)] = f"{image.shape[-1]} x {image.shape[-2]} pixels are too many for the device's memory"
            continue
        picture = pictures[name]
        save_ids(output / "ids" / picture, ids, model.card.palette)
        if overlays:
            blended = overlay(image.permute(1, 2, 0).numpy(), ids, model.card.palette)
            save_picture(output / "overlays" / picture, Image.fromarray(blended))
        ids_of[str(name)] = str(Path("ids") / picture)
    return ids_of, bad


def refuse_unsafe_folders(source: Path, output: Path) -> None:
    """Keep inputs and other people's files from being written over.

    Raises:
        ConfigError: the input is missing or lies in the output, or the output holds something else already.
    """
    if not source.exists():
        raise ConfigError(f"--input {source}: no such file or folder")
    if source.resolve().is_relative_to(output.resolve()):
        raise ConfigError(f"--output {output}: --input {source} lies in it; choose a folder apart")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: there is a file of that name; choose another")
    if output.is_dir() and any(output.iterdir()) and not (output / SUMMARY).is_file():
        raise ConfigError(f"--output {output}: holds other files and no {SUMMARY}; choose a new folder")


def find_images(source: Path, output: Path) -> list[Path]:
    """Return the image at ``source``, or all below it but those in ``output``: names below it, sorted.

    Raises:
        ConfigError: if there is none.
    """
    if source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"--input {source}: not an image by its name ({', '.join(SUFFIXES)})")
        return [Path(source.name)]
    images = [path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    found = [path for path in images if not path.parent.resolve().is_relative_to(output.resolve())]
    if not found:
        raise ConfigError(f"--input {source}: no images in it ({', '.join(SUFFIXES)})")
    return sorted(path.relative_to(source) for path in found)


def picture_names(names: Sequence[Path]) -> dict[Path, Path]:
    """Name a PNG for each image: a.jpg becomes a.png, but a.jpg.png where another image would become a.png too."""
    chosen = {name: name.with_suffix(".png") for name in names}
    while True:
        # Letters of either case, because some file systems tell no difference.
        count = Counter(str(picture).lower() for picture in chosen.values())
        full = {name: name.with_name(f"{name.name}.png") for name in names if count[str(chosen[name]).lower()] > 1}
        if all(chosen[name] == picture for name, picture in full.items()):
            return chosen
        chosen |= full


def checked_device(name: str) -> torch.device:
    """Return the device of that name, once it has been tried.

    Raises:
        ConfigError: if there is none.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name}: cannot be used here ({first_line(error)})") from error
    return device


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = model_parser("predict", __doc__)
    parser.add_argument("--input", type=Path, required=True, help="an image, or a folder of jpg, png and webp images")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder, or earlier output")
    parser.add_argument(
        "--overlays", action=argparse.BooleanOptionalAction, default=True, help="save overlays too (default: yes)"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"cpu, cuda, cuda:1 ... (default here: {device})")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
