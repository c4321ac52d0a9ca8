"""Geometry on the host, in uint8: resize, random crop, flip. Everything photometric happens later, on the device.

The order is the published one (DAFormer, HRDA, MIC): resize, crop, flip, pad on the right and at the bottom. What is
computed is less: the box of the crop is drawn first, and of the image only that box is resized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.geometry import Slices, box_factor, resize_box, resize_label, scaled_size

FLIP_PROBABILITY = 0.5
CROP_TRIES = 10
"""Redraws of a source crop that is too uniform (mmsegmentation, used by DAFormer, HRDA and MIC)."""
LARGEST_CLASS_SHARE = 0.75
"""The largest class must cover less of the valid pixels of a source crop (same origin)."""
LABEL_STRIDE = 4
"""Classes of a crop are counted on every 4th pixel both ways, 15 times faster than on all of them."""
RARE_CLASS_TRIES = 10
"""New crops until there is enough of the class that the sample was drawn for (DAFormer)."""
PAD_COLOUR = (124, 116, 104)
"""The ImageNet mean, so that padding is 0 after normalisation, up to rounding."""

MIRRORED_ROWS = 128
"""Rows mirrored at a time. torch mirrors into new memory, and that of a few rows stays in the cache."""


@dataclass(frozen=True, kw_only=True)
class Resize:
    """How large an image becomes before the crop. The defaults leave it as it is stored."""

    box: tuple[int, int] | None = None
    """Height and width, in either order, that the image fills as far as its aspect allows; None: the stored size."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of a further factor, drawn uniformly for each sample."""

    def size(self, stored: tuple[int, int], generator: np.random.Generator) -> tuple[int, int]:
        """Draw height and width for an image of ``stored`` height and width."""
        factor = 1.0 if self.box is None else box_factor(stored, self.box)
        if self.scale != (1.0, 1.0):
            factor *= generator.uniform(*self.scale)
        return scaled_size(stored, factor)


AS_STORED = Resize()


class RareClassTarget(NamedTuple):
    """What a crop of a sample drawn for a rare class should hold."""

    train_id: int
    pixels: float
    """More than this many pixels of the class."""


def source_crop(
    image: Tensor,
    label: Tensor,
    size: tuple[int, int],
    generator: np.random.Generator,
    *,
    resize: Resize = AS_STORED,
    wanted: RareClassTarget | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Crop at random: more than one class, none of them above ``LARGEST_CLASS_SHARE``, flipped half of the time.

    After ``CROP_TRIES`` redraws the last box is taken unchecked. If that crop has too little of a wanted class, crop
    and flip are drawn again, up to ``RARE_CLASS_TRIES`` times, and the last one is kept.

    Args:
        image: uint8 [3, H, W].
        label: uint8 [H, W].
        size: height and width (h, w) of the crop; a smaller image is padded.
        generator: keyed by the sample's position.
        into: what to write to and return; None makes new tensors.

    Returns:
        uint8 [3, h, w] and uint8 [h, w].
    """
    resized = resize.size((image.shape[1], image.shape[2]), generator)
    label = resize_label(label, resized)
    box, flips = _draw_varied(label, size, generator)
    if wanted is not None:
        for _ in range(RARE_CLASS_TRIES):
            if np.count_nonzero(label[box].numpy() == wanted.train_id) > wanted.pixels:
                break
            box, flips = _draw_varied(label, size, generator)
    image_crop, label_crop = into or (_empty_image(size), torch.empty(size, dtype=torch.uint8))
    _put_image(resize_box(image, resized, box), image_crop, flips)
    _put_plane(label[box], label_crop, flips, IGNORE_INDEX)
    return image_crop, label_crop


def target_crop(
    image: Tensor,
    size: tuple[int, int],
    generator: np.random.Generator,
    *,
    resize: Resize = AS_STORED,
    margins: tuple[int, int, int, int] = (0, 0, 0, 0),
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Crop plainly at random, flipped half of the time; no label of the target is ever looked at.

    Args:
        image: uint8 [3, H, W].
        size: height and width (h, w) of the crop; a smaller image is padded.
        generator: keyed by the sample's position.
        margins: rows and columns of the stored image that are not valid: top, bottom, left, right.
        into: what to write to and return; None makes new tensors.

    Returns:
        uint8 [3, h, w], and bool [h, w] that is False on the padding and in the margins.
    """
    stored = (image.shape[1], image.shape[2])
    resized = resize.size(stored, generator)
    box = _draw_box(resized, size, generator)
    flips = generator.random() < FLIP_PROBABILITY
    image_crop, valid_crop = into or (_empty_image(size), torch.empty(size, dtype=torch.bool))
    _put_image(resize_box(image, resized, box), image_crop, bool(flips))
    _put_plane(_inside(stored, resized, box, margins), valid_crop, bool(flips and any(margins)), False)
    return image_crop, valid_crop


def central_crop(
    image: Tensor,
    label: Tensor,
    size: tuple[int, int],
    *,
    box: tuple[int, int] | None = None,
    margins: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the middle out of a labelled target image, as large as training sees it; nothing is drawn.

    Args:
        image: uint8 [3, H, W].
        label: uint8 [H, W].
        size: height and width (h, w) of the crop; a smaller image is padded.
        box: that the image is resized into first; None: as it is stored.
        margins: as for ``target_crop``.

    Returns:
        uint8 [3, h, w], uint8 [h, w], and bool [h, w] as of ``target_crop``.
    """
    stored = (image.shape[1], image.shape[2])
    resized = stored if box is None else scaled_size(stored, box_factor(stored, box))
    top, left = (max(have - want, 0) // 2 for have, want in zip(resized, size, strict=True))
    middle = (slice(top, min(top + size[0], resized[0])), slice(left, min(left + size[1], resized[1])))
    crops = _empty_image(size), torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.bool)
    _put_image(resize_box(image, resized, middle), crops[0], flips=False)
    _put_plane(resize_label(label, resized)[middle], crops[1], flips=False, padding=IGNORE_INDEX)
    _put_plane(_inside(stored, resized, middle, margins), crops[2], flips=False, padding=False)
    return crops


def _inside(
    stored: tuple[int, int], resized: tuple[int, int], box: Slices, margins: tuple[int, int, int, int]
) -> Tensor:
    """Tell which pixels of a box of the resized image lie in no margin of the stored one: bool [h', w']."""
    if not any(margins):
        cut = tuple(len(range(side)[part]) for side, part in zip(resized, box, strict=True))
        return torch.ones((), dtype=torch.bool).expand(cut)  # no memory of its own
    top, bottom, left, right = margins
    inside = torch.zeros(stored, dtype=torch.uint8)
    inside[top : stored[0] - bottom, left : stored[1] - right] = 1
    return resize_label(inside, resized)[box].bool()


def _draw_varied(label: Tensor, size: tuple[int, int], generator: np.random.Generator) -> tuple[Slices, bool]:
    """Draw a box that passes the rule of ``source_crop``, and whether to flip."""
    shape = (label.shape[0], label.shape[1])
    box = _draw_box(shape, size, generator)
    for _ in range(CROP_TRIES):
        if _is_varied(label[box]):
            break
        box = _draw_box(shape, size, generator)
    return box, bool(generator.random() < FLIP_PROBABILITY)


def _draw_box(shape: tuple[int, int], size: tuple[int, int], generator: np.random.Generator) -> Slices:
    """Draw a uniform box of ``size`` inside a plane of ``shape`` [H, W], or all of a side that is shorter."""
    top, left = (
        int(generator.integers(max(have - want, 0), endpoint=True)) for have, want in zip(shape, size, strict=True)
    )
    return slice(top, top + size[0]), slice(left, left + size[1])


def _is_varied(label: Tensor) -> bool:
    strided = label[::LABEL_STRIDE, ::LABEL_STRIDE].numpy()
    counts = np.bincount(strided.ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return bool(counts.max() < LARGEST_CLASS_SHARE * counts.sum())  # False for one class alone, and for none


def _empty_image(size: tuple[int, int]) -> Tensor:
    """Return uint8 [3, h, w], a view of rows of triples."""
    return torch.empty((*size, 3), dtype=torch.uint8).permute(2, 0, 1)


def _put_image(image: Tensor, into: Tensor, flips: bool) -> None:
    """Put uint8 [3, h', w'] into [3, h, w], mirrored if it ``flips``, ``PAD_COLOUR`` on the right and at the bottom.

    Mirrored after it was copied: torch flips what lies in one piece several times faster than a part of an image.
    """
    if image.shape != into.shape:
        into.copy_(torch.tensor(PAD_COLOUR, dtype=torch.uint8).view(3, 1, 1).expand(into.shape))
        into = into[:, : image.shape[1], : image.shape[2]]
    into.copy_(image)
    if flips:
        for rows in into.permute(1, 2, 0).split(MIRRORED_ROWS):
            rows.copy_(rows.flip(1))


def _put_plane(plane: Tensor, into: Tensor, flips: bool, padding: int | bool) -> None:
    """Put [h', w'] into [h, w], mirrored if it ``flips``, ``padding`` on the right and at the bottom."""
    if plane.shape != into.shape:
        into.fill_(padding)
        into = into[: plane.shape[0], : plane.shape[1]]
    into.copy_(plane.flip(-1) if flips else plane)
