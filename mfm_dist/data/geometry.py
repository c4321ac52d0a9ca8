"""How images and labels change their size: one rule for shards, training and prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Slices = tuple[slice, slice]
"""Rows and columns."""
WHOLE: Slices = (slice(None), slice(None))


def box_factor(size: tuple[int, int], box: tuple[int, int]) -> float:
    """Find the factor that makes a size as large as fits a box, which may lie on either side (mmcv's rule)."""
    return min(max(box) / max(size), min(box) / min(size))


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Multiply height and width by a factor, rounded to whole pixels, of which there is at least one."""
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width


def fitted(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Find the largest height and width of the same shape inside a box, its sides in any order, as published for UDA.

    GTA's 1914 x 1052 in 1280 x 720 gives 1280 x 704, not 720: nothing is stretched, nothing is padded.
    """
    return scaled_size(size, box_factor(size, box))


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a whole image as ``resize_box`` does, up to rounding; of shards the very bytes count.

    Args:
        image: uint8 [3, H, W].

    Returns:
        uint8 [3, h, w].
    """
    resized = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)
    return resized.round_().clamp_(0, 255).byte()[0]


def resize_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Take the nearest pixel by the floor rule, as published: [H, W] -> [H', W'] of the same type."""
    if label.shape == size:
        return label
    return F.interpolate(label[None, None], size, mode="nearest")[0, 0]


def resize_box(image: Tensor, size: tuple[int, int], box: Slices) -> Tensor:
    """Resize, but only a box of the resized image, computed from the pixels it needs and no other.

    Bilinear without antialiasing, as published: equal to resizing the whole image with torch's ``interpolate`` and
    cutting the box out of it.

    Args:
        image: uint8 [3, H, W].
        size: height and width of the whole resized image.
        box: in that.

    Returns:
        uint8 [3, h', w'].
    """
    if image.shape[1:] == size:
        return image[:, box[0], box[1]]
    (top, below, down), (left, right, across) = (
        _neighbours(stored, new, part) for stored, new, part in zip(image.shape[1:], size, box, strict=True)
    )
    first = (int(top[0]), int(left[0]))
    pixels = image.permute(1, 2, 0)[first[0] : int(below[-1]) + 1, first[1] : int(right[-1]) + 1].to(torch.float32)
    down, across = down.view(-1, 1, 1), across.view(1, -1, 1)
    rows = torch.lerp(pixels.index_select(0, top - first[0]), pixels.index_select(0, below - first[0]), down)
    resized = torch.lerp(rows.index_select(1, left - first[1]), rows.index_select(1, right - first[1]), across)
    return resized.round_().to(torch.uint8).permute(2, 0, 1)


def _neighbours(stored: int, new: int, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Find the stored pixel before each of the output pixels ``part`` of one axis, the one after, and its weight."""
    places = torch.arange(new, dtype=torch.float32)[part]
    places = ((places + 0.5) * (stored / new) - 0.5).clamp(min=0)
    before = places.to(torch.int64)
    return before, (before + 1).clamp(max=stored - 1), places - before
