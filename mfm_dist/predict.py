"""Segment photographs: mfm-predict (--run RUN | --model EXPORT) --input FILE_OR_FOLDER --output FOLDER

Writes FOLDER/ids/NAME.png, whose pixel values are the indices of the model's classes (train ids, for those of
Cityscapes) and which shows them in class colours, FOLDER/overlays/NAME.png, FOLDER/legend.png with the colours, and
FOLDER/predictions.json, which names the classes. A video becomes FOLDER/overlays/NAME.mp4 without its sound and
FOLDER/ids/NAME.mp4/000000.png ..., one for each frame (--no-ids: none); one that breaks off is done as far as it goes,
and named. Subfolders of the input are kept. Images are taken upright as EXIF says, and as in the run's evaluation:
whole or in windows, fitted into a box (eval.resize) or not.
Exit codes: 0 done, 2 command line, 3 some files could not be read (they are named, the others are done), 4 storage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mfm_dist import load
from mfm_dist.distributed.arithmetic import set_fp32_math
from mfm_dist.errors import (
    EXIT_DATA,
    EXIT_DONE,
    ConfigError,
    CorruptFileError,
    StorageError,
    first_line,
    tell_user_errors,
)
from mfm_dist.inference import video
from mfm_dist.inference.command_line import model_parser
from mfm_dist.inference.overlays import SUFFIXES, legend, overlay, read_image, save_ids, save_picture
from mfm_dist.inference.segmentor import TrainedSegmentor
from mfm_dist.storage import atomic_file, write_atomically

SUMMARY = "predictions.json"
"""Marks a folder of predictions, which a later start may write into."""
READ = (*SUFFIXES, *video.SUFFIXES)
LEGEND_WIDTH = 800
"""Pixels."""
Thing = TypeVar("Thing")


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(argv)
    output: Path = arguments.output
    refuse_unsafe_folders(arguments.input, output)
    names = find_pictures(arguments.input, output)
    if any(map(is_video, names)):
        video.require_pyav()
    model = load(arguments.run or arguments.model, checked_device(arguments.device))
    set_fp32_math(model.card.fp32_math)
    root = arguments.input if arguments.input.is_dir() else arguments.input.parent
    try:
        done, bad, short = predict_all(model, root, names, output, ids=arguments.ids, overlays=arguments.overlays)
        card = model.card
        summary = {"model": card.run, "step": card.step, "classes": card.class_names}
        summary |= {"ids": done, "bad": bad, "cut_short": short}
        write_atomically(output / SUMMARY, json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"--output {output} cannot be written: {error}") from error
    for what, files in (("not done", bad), ("done as far as it goes", short)):
        for name, reason in files.items():
            print(f"{what}: {root / name}: {reason}", file=sys.stderr)
    written = [f"indices of classes in {output / 'ids'}"] if arguments.ids else []
    written += [f"overlays in {output / 'overlays'}"] if arguments.overlays else []
    kind = "images and videos" if any(map(is_video, names)) else "images"
    print(f"{len(done)} of {len(names)} {kind}: {', '.join(written)}")
    return EXIT_DATA if bad else EXIT_DONE


def predict_all(
    model: TrainedSegmentor, root: Path, names: Sequence[Path], output: Path, *, ids: bool = True, overlays: bool = True
) -> tuple[dict[str, str | None], dict[str, str], dict[str, str]]:
    """Segment ``root / name`` for each name and write the pictures.

    Returns:
        the id picture of each image that is done, below ``output``, or the folder of a video's, None without them;
        why each of the others could not be used; and which videos end before they should.

    Raises:
        OSError: if ``output`` cannot be written.
    """
    done: dict[str, str | None] = {}
    bad: dict[str, str] = {}
    short: dict[str, str] = {}
    pictures = picture_names(names)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / SUMMARY, "{}\n")  # so that an interrupted start may be repeated
    if overlays:
        classes = model.card.classes
        save_picture(output / "legend.png", Image.fromarray(legend(classes, range(len(classes)), LEGEND_WIDTH)))
    for name in _progress(names, "file"):
        ids_at = output / "ids" / pictures[name] if ids else None
        overlay_at = output / "overlays" / pictures[name] if overlays else None
        try:
            if not is_video(name):
                predict_image(model, root / name, ids_at, overlay_at)
            elif cut_short := predict_video(model, root / name, ids_at, overlay_at):
                short[str(name)] = cut_short
        except CorruptFileError as error:
            bad[str(name)] = str(error)
        else:
            done[str(name)] = str(Path("ids") / pictures[name]) if ids else None
    return done, bad, short


def predict_image(model: TrainedSegmentor, path: Path, ids_at: Path | None, overlay_at: Path | None) -> None:
    """Segment one image and write what has a place.

    Raises:
        CorruptFileError: it cannot be read, or is too large.
    """
    image = read_image(path)
    ids = _predicted(model, image)
    if ids_at is not None:
        save_ids(ids_at, ids, model.card.palette)
    if overlay_at is not None:
        blended = overlay(image.permute(1, 2, 0).numpy(), ids, model.card.palette)
        save_picture(overlay_at, Image.fromarray(blended))


def predict_video(model: TrainedSegmentor, path: Path, ids_at: Path | None, overlay_at: Path | None) -> str | None:
    """Segment a video frame by frame: ids go into a folder, overlays into a video, which is whole or not there.

    Returns:
        where it ends, if that is before it should.

    Raises:
        CorruptFileError: as ``predict_image``, with the number of the frame. Ids of earlier frames stay.
    """
    with ExitStack() as stack:
        writer = None
        if overlay_at is not None:
            overlay_at.parent.mkdir(parents=True, exist_ok=True)
            writer = stack.enter_context(video.VideoWriter(stack.enter_context(atomic_file(overlay_at))))
        number, times, length = 0, list[float](), video.length_of(path)
        try:
            for frame in _progress(video.frames_of(path), "frame", length.frames):
                ids = _predicted(model, frame.image)
                if ids_at is not None:
                    save_ids(ids_at / f"{number:06d}.png", ids, model.card.palette)
                if writer is not None:
                    picture = overlay(frame.image.permute(1, 2, 0).numpy(), ids, model.card.palette)
                    writer.write(picture, frame.seconds)
                times.append(frame.seconds)
                number += 1
        except CorruptFileError as error:
            raise CorruptFileError(f"frame {number}: {error}") from error
        if number == 0:
            raise CorruptFileError("holds no frame")
    return length.cut_short(times)


def _predicted(model: TrainedSegmentor, image: Tensor) -> Tensor:
    try:
        return model.predict(image).cpu()
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        size = f"{image.shape[-1]} x {image.shape[-2]} pixels"
        raise CorruptFileError(f"{size} are too many for the device's memory") from error


def _progress(things: Iterable[Thing], unit: str, total: int | None = None) -> Iterable[Thing]:
    """Show how far it is, below one another where one is within another; every half minute is enough for a log file."""
    often = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(things, unit=unit, total=total, mininterval=often, dynamic_ncols=True, leave=unit == "file")


def is_video(name: Path) -> bool:
    """Tell by its name whether a file is a video."""
    return name.suffix.lower() in video.SUFFIXES


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


def find_pictures(source: Path, output: Path) -> list[Path]:
    """Return the image or video at ``source``, or all below it but those in ``output``: names below it, sorted.

    Raises:
        ConfigError: if there is none.
    """
    if source.is_file():
        if source.suffix.lower() not in READ:
            raise ConfigError(f"--input {source}: not an image or video by its name ({', '.join(READ)})")
        return [Path(source.name)]
    images = [path for path in source.rglob("*") if path.suffix.lower() in READ and not path.is_dir()]
    found = [path for path in images if not path.parent.resolve().is_relative_to(output.resolve())]
    if not found:
        raise ConfigError(f"--input {source}: no images or videos in it ({', '.join(READ)})")
    return sorted(path.relative_to(source) for path in found)


def picture_names(names: Sequence[Path]) -> dict[Path, Path]:
    """Name a PNG for each image: a.jpg becomes a.png, but a.jpg.png where another image would become a.png too.

    Likewise an MP4 for each video.
    """
    ends = {name: ".mp4" if is_video(name) else ".png" for name in names}
    chosen = {name: name.with_suffix(end) for name, end in ends.items()}
    while True:
        # Letters of either case, because some file systems tell no difference.
        count = Counter(str(picture).lower() for picture in chosen.values())
        full = {
            name: name.with_name(f"{name.name}{ends[name]}") for name in names if count[str(chosen[name]).lower()] > 1
        }
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
    parser.add_argument("--input", type=Path, required=True, help="an image or video, or a folder of them")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder, or earlier output")
    parser.add_argument(
        "--overlays", action=argparse.BooleanOptionalAction, default=True, help="save overlays too (default: yes)"
    )
    parser.add_argument(
        "--ids", action=argparse.BooleanOptionalAction, default=True, help="save pictures of indices (default: yes)"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"cpu, cuda, cuda:1 ... (default here: {device})")
    arguments = parser.parse_args(argv)
    if not arguments.ids and not arguments.overlays:
        parser.error("--no-ids and --no-overlays leave nothing to write")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
