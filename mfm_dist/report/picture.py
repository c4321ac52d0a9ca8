"""Turn photographs and label maps into ``data:`` addresses, at the size a page needs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mfm_dist.classes import IGNORE_INDEX, Colour
from mfm_dist.inference.overlays import GAP, OPACITY, colourise

MAX_WIDTH = 640
"""Pixels a picture is shrunk to."""
MIN_WIDTH = 480
"""Pixels a label map is enlarged to, by whole factors, so that its hatching is finer than its pixels."""
HATCH_PERIOD, HATCH_WIDTH = 8, 3
"""Diagonal stripes of the class colour, in pixels of the finished picture; pale between them."""
PALE = 0.25
"""Share of the class colour between the stripes; the rest is white."""
GREY = 128

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

OUTSIDE_COLOUR = (208, 208, 208)
RIGHT_COLOUR, WRONG_COLOUR = (222, 226, 230), (213, 94, 0)


def photograph(image: Pixels) -> str:
    """Turn RGB [H, W, 3] into a JPEG."""
    picture = Image.fromarray(image)
    size = _size(picture.width, picture.height, enlarge=False)
    return _address(picture.resize(size, Image.Resampling.LANCZOS), "jpeg", quality=86)


def label_map(
    label: Pixels, palette: Sequence[Colour], *, unsure: Mask | None = None, outside: Mask | None = None
) -> str:
    """Turn indices of classes [H, W] into a PNG in their colours, pixel for pixel.

    Args:
        label: ``IGNORE_INDEX`` where there is none: black.
        unsure: pixels to hatch.
        outside: pixels that the picture says nothing about: light grey.
    """
    large = _enlarged(label)
    drawn = colourise(torch.from_numpy(large), palette)
    if outside is not None:
        drawn[_enlarged(outside) > 0] = OUTSIDE_COLOUR
    if unsure is not None:
        rows, columns = np.indices(large.shape)
        stripes = (rows + columns) % HATCH_PERIOD < HATCH_WIDTH
        hatched = (_enlarged(unsure) > 0) & ~stripes & (large != IGNORE_INDEX)
        drawn[hatched] = (255 - PALE * (255.0 - drawn[hatched])).round()
    return _address(Image.fromarray(drawn), "png", optimize=True)


def mistakes(label: Pixels, prediction: Pixels) -> str:
    """Draw where a prediction [H, W] differs from the label: a PNG of right, wrong and not labelled."""
    kind = np.where(label == IGNORE_INDEX, 2, label != prediction)
    colours = np.array([RIGHT_COLOUR, WRONG_COLOUR, (0, 0, 0)], dtype=np.uint8)
    return _address(Image.fromarray(colours[_enlarged(kind)]), "png", optimize=True)


def greyed(image: Pixels, hidden: Mask, outside: Mask) -> Pixels:
    """Make the hidden pixels of an image [H, W, 3] grey, and those outside of the crop pale."""
    covered = np.where(hidden[..., None], np.uint8(GREY), image)
    pale = (0.25 * image.astype(np.float32) + 0.75 * 208).round().astype(np.uint8)
    return np.where(outside[..., None], pale, covered)


def overlay_prediction(panels: Pixels, image: Pixels, palette: Sequence[Colour]) -> Pixels | None:
    """Return the prediction [H, W] that ``save_overlay`` laid over ``image``, or None if it is of another image.

    Args:
        panels: RGB, as saved: image, label, prediction, [H, 3 W + 2 gaps], or image and prediction, and a legend below.
    """
    height, width = image.shape[:2]
    row = panels[:height]
    sizes = [(height, count * (width + GAP) - GAP, 3) for count in (2, 3)]
    if row.shape not in sizes or not np.array_equal(row[:, :width], image):
        return None
    blended = row[:, -width:].astype(np.float32)
    colour = (blended - (1 - OPACITY) * image) / OPACITY
    distance = [((colour - np.array(one, dtype=np.float32)) ** 2).sum(axis=-1) for one in palette]
    nearest: Pixels = np.argmin(np.stack(distance), axis=0).astype(np.uint8)
    return nearest


def hexadecimal(colour: tuple[int, int, int]) -> str:
    """Write a colour as the page does."""
    return "#" + "".join(f"{part:02x}" for part in colour)


def _size(width: int, height: int, *, enlarge: bool) -> tuple[int, int]:
    if width > MAX_WIDTH:
        return MAX_WIDTH, max(1, round(height * MAX_WIDTH / width))
    factor = -(-MIN_WIDTH // width) if enlarge else 1
    return width * factor, height * factor


def _enlarged(plane: npt.NDArray[Any]) -> Pixels:
    """Bring a map [H, W] to the size of a finished label map."""
    size = _size(plane.shape[1], plane.shape[0], enlarge=True)
    return np.array(Image.fromarray(plane.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))


def _address(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
