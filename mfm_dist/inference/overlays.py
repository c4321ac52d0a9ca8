"""Draw label maps in colours, and overlays of image, label and prediction; read photographs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from mfm_dist.classes import ClassSet, Colour
from mfm_dist.data.photographs import opened
from mfm_dist.errors import CorruptFileError
from mfm_dist.storage import atomic_file, read_whole

OPACITY = 0.65
"""Share of the class colour in an overlay."""
GAP = 4
"""White pixels between panels."""
SMALLEST_LETTERS = 11
"""Pixels of a legend's letters."""


def colourise(label: Tensor, palette: Sequence[Colour]) -> npt.NDArray[np.uint8]:
    """Turn indices of classes [H, W] into uint8 RGB [H, W, 3] in their colours; ignored pixels are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    return table[label.cpu().numpy().astype(np.uint8)]


def overlay(image: npt.NDArray[np.uint8], label: Tensor, palette: Sequence[Colour]) -> npt.NDArray[np.uint8]:
    """Lay class colours over an RGB image [H, W, 3]."""
    blended = (1 - OPACITY) * image + OPACITY * colourise(label, palette)
    return blended.round().astype(np.uint8)


def save_ids(path: Path, ids: Tensor, palette: Sequence[Colour]) -> None:
    """Write indices of classes [H, W] as a PNG whose pixel values they are, and that shows them in class colours."""
    picture = Image.fromarray(ids.numpy().astype(np.uint8))
    picture.putpalette(colourise(torch.arange(256), palette).flatten().tolist())
    save_picture(path, picture)


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, whole or not at all; a link of that name is replaced, not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def save_overlay(path: Path, image: Tensor, label: Tensor | None, prediction: Tensor, classes: ClassSet) -> None:
    """Write a PNG of panels side by side: the image, its label if there is one, the prediction, these laid over it.

    Below them stands the legend of the classes that occur.

    Args:
        image: uint8 [3, H, W]; label and prediction: integer [H, W].
    """
    picture = image.permute(1, 2, 0).numpy()
    gap = np.full((picture.shape[0], GAP, 3), 255, dtype=np.uint8)
    panels, occurring = [picture], set()
    for ids in (prediction,) if label is None else (label, prediction):
        panels += [gap, overlay(picture, ids, classes.palette)]
        occurring |= set(ids.unique().tolist())
    row = np.concatenate(panels, axis=1)
    shown = [index for index in range(len(classes)) if index in occurring]
    save_picture(path, Image.fromarray(np.concatenate([row, legend(classes, shown, row.shape[1])])))


def legend(classes: ClassSet, shown: Sequence[int], width: int) -> npt.NDArray[np.uint8]:
    """Draw colours and names of classes below one another and side by side, as they fit: uint8 RGB [H, width, 3].

    The letters grow with the width, so that they are read where a large picture is shown small.
    """
    size = max(SMALLEST_LETTERS, width // 110)
    font, line = ImageFont.load_default(size), 2 * size
    places: list[tuple[float, int]] = []
    left, top = float(size), size // 2
    for index in shown:
        needed = 1.5 * size + font.getlength(classes.names[index])
        if left > size and left + needed > width:
            left, top = float(size), top + line
        places.append((left, top))
        left += needed + 1.5 * size
    picture = Image.new("RGB", (width, top + line), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for index, (left, top) in zip(shown, places, strict=True):
        draw.rectangle((left, top, left + size, top + size), classes.palette[index], (120, 120, 120))
        draw.text((left + 1.5 * size, top + size / 2), classes.names[index], (0, 0, 0), font, anchor="lm")
    return np.array(picture)


LARGEST_IMAGE = 1 << 30
"""Bytes of an image file."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_image(path: Path) -> Tensor:
    """Read an image file as uint8 RGB [3, H, W], upright as its EXIF orientation says.

    Greyscale becomes three equal channels, 16 bits become 8, transparent pixels are laid over black, and of an
    animation the first picture is taken.

    Raises:
        CorruptFileError: for a file that cannot be decoded, or with more pixels than PIL's MAX_IMAGE_PIXELS.
    """
    try:
        content = read_whole(path, LARGEST_IMAGE)
    except OSError as error:
        raise CorruptFileError(f"cannot be read ({error.strerror})") from error
    with opened(content, Image.MAX_IMAGE_PIXELS or sys.maxsize) as picture:
        pixels = np.array(_to_rgb(ImageOps.exif_transpose(picture)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale, in older versions of PIL as 32-bit
        values = np.asarray(image).astype(np.float64) / 257.0  # 65535 becomes 255
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
