"""Predict with a trained segmentor; the Rebuilder has no part in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfm_dist.data.geometry import WHOLE, fitted, resize_box
from mfm_dist.models.layers import resize
from mfm_dist.models.preprocessing import normalise
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.models.windows import Window, average_windows, sliding_boxes


def predict_labels(
    segmentor: Segmentor,
    image: Tensor,
    device: torch.device,
    scale: Callable[[Tensor], Tensor] = normalise,
    fit_into: tuple[int, int] | None = None,
) -> Tensor:
    """Return the most probable class of every pixel of one uint8 RGB image [3, H, W]: int64 [H, W] on ``device``.

    Args:
        scale, fit_into: as in ``predict_logits``.
    """
    return most_probable(predict_logits(segmentor, image, device, scale, fit_into=fit_into)[0])


def most_probable(values: Tensor) -> Tensor:
    """Return the class with the largest value, the first of equals, of every pixel: [C, H, W] -> int64 [H, W]."""
    return values.max(dim=0).indices  # on a CPU argmax takes two to three times as long


@torch.no_grad()
def predict_logits(
    segmentor: Segmentor,
    image: Tensor,
    device: torch.device,
    scale: Callable[[Tensor], Tensor] = normalise,
    at_least: int = 1,
    fit_into: tuple[int, int] | None = None,
) -> Tensor:
    """Return the logits of one uint8 RGB image [3, H, W] at its own size: fp32 [1, C, H, W] on ``device``.

    The image is taken whole, in one forward, unless the segmentor has a window: then in windows that overlap by half,
    one forward each, whose logits are averaged.

    Args:
        scale: makes uint8 [1, 3, H, W] what the segmentor expects. A batch of several gives logits of as many.
        at_least: forwards to run, for ranks that have to run as many; what is too many is not used.
        fit_into: sides of a box that the image is resized into first, aspect kept, as published for crops of 512; the
            logits are then enlarged to the image's own size. None: the image as it is.
    """
    size = seen_size(image, fit_into)
    scaled = scale(resize_box(image, size, WHOLE).unsqueeze(0).to(device))
    boxes = windows_of(segmentor, size)
    patches = [segmentor(box.crop(scaled)) for box in boxes]
    for _ in range(at_least - len(boxes)):
        segmentor(boxes[-1].crop(scaled))
    logits = patches[0].float()
    if len(boxes) > 1:
        logits = average_windows(patches, boxes, size)
    return resize(logits, image.shape[-2:])


def seen_size(image: Tensor, fit_into: tuple[int, int] | None) -> tuple[int, int]:
    """Return the height and width at which a segmentor sees an image [..., H, W]."""
    own = (image.shape[-2], image.shape[-1])
    return own if fit_into is None else fitted(own, fit_into)


def windows_of(segmentor: Segmentor, size: tuple[int, int]) -> list[Window]:
    """Return the windows that an image of this height and width is predicted in."""
    window = segmentor.window or size
    return sliding_boxes(size, window, (max(1, window[0] // 2), max(1, window[1] // 2)))
