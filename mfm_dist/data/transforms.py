"""Geometry on the host, in uint8: random crop and flip. Everything photometric happens later, on the device.

The order is the published one (DAFormer, HRDA, MIC): crop, flip, pad on the right and at the bottom.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX

FLIP_PROBABILITY = 0.5
CROP_TRIES = 10
"""Redraws of a source crop that is too uniform (mmsegmentation, used by DAFormer, HRDA and MIC)."""
LARGEST_CLASS_SHARE = 0.75
"""The largest class must cover less of the valid pixels of a source crop (same origin)."""
LABEL_STRIDE = 4
"""Classes of a crop are counted on every 4th pixel both ways, 15 times faster than on all of them."""
PAD_COLOUR = (124, 116, 104)
"""The ImageNet mean, so that padding is 0 after normalisation, up to rounding."""


def source_crop(
    image: Tensor, label: Tensor, size: tuple[int, int], generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A random crop of more than one class, none of them above ``LARGEST_CLASS_SHARE``, flipped half of the time.

    After ``CROP_TRIES`` redraws the last box is taken unchecked.

    Args:
        image: uint8 [3, H, W].
        label: uint8 [H, W].
        size: height and width (h, w) of the crop; a smaller image is padded.
        generator: keyed by the sample's position.

    Returns:
        uint8 [3, h, w] and uint8 [h, w].
    """
    box = _draw_box(label, size, generator)
    for _ in range(CROP_TRIES):
        if _is_varied(label[box]):
            break
        box = _draw_box(label, size, generator)
    image, label = image[:, box[0], box[1]], label[box]
    if generator.random() < FLIP_PROBABILITY:
        image, label = image.flip(-1), label.flip(-1)
    return _pad_image(image, size), _pad(label, size, IGNORE_INDEX)


def target_crop(image: Tensor, size: tuple[int, int], generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A plain random crop, flipped half of the time; no label of the target is ever looked at.

    Args:
        image: uint8 [3, H, W].
        size: height and width (h, w) of the crop; a smaller image is padded.
        generator: keyed by the sample's position.

    Returns:
        uint8 [3, h, w], and bool [h, w] that is False on the padding.
    """
    rows, columns = _draw_box(image[0], size, generator)
    image = image[:, rows, columns]
    if generator.random() < FLIP_PROBABILITY:
        image = image.flip(-1)
    valid = torch.ones(image.shape[1:], dtype=torch.bool)
    return _pad_image(image, size), _pad(valid, size, False)


def _draw_box(plane: Tensor, size: tuple[int, int], generator: np.random.Generator) -> tuple[slice, slice]:
    """A uniform box of ``size`` inside a plane [H, W], or all of a side that is shorter."""
    top, left = (
        int(generator.integers(max(have - want, 0), endpoint=True))
        for have, want in zip(plane.shape, size, strict=True)
    )
    return slice(top, top + size[0]), slice(left, left + size[1])


def _is_varied(label: Tensor) -> bool:
    strided = label[::LABEL_STRIDE, ::LABEL_STRIDE].numpy()
    counts = np.bincount(strided.ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return bool(np.count_nonzero(counts) > 1 and counts.max() < LARGEST_CLASS_SHARE * counts.sum())


def _pad(plane: Tensor, size: tuple[int, int], value: int | bool) -> Tensor:
    """[h', w'] -> [h, w] with ``value`` on the right and at the bottom."""
    if plane.shape == size:
        return plane
    padded = plane.new_full(size, value)
    padded[: plane.shape[0], : plane.shape[1]] = plane
    return padded


def _pad_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, h', w'] -> [3, h, w] with ``PAD_COLOUR``."""
    if image.shape[1:] == size:
        return image
    return torch.stack([_pad(plane, size, value) for plane, value in zip(image, PAD_COLOUR, strict=True)])
