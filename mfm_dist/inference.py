"""Prediction with a trained segmenter; the Rebuilder has no part in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfm_dist.methods.augment import normalise
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.models.windows import Box, average_windows, sliding_boxes


@torch.no_grad()
def predict_labels(
    segmentor: Segmentor,
    image: Tensor,
    device: torch.device,
    scale: Callable[[Tensor], Tensor] = normalise,
    at_least: int = 1,
) -> Tensor:
    """Most probable class of every pixel of one uint8 RGB image [3, H, W]: int64 [H, W] on ``device``.

    The image is taken whole, in one forward, unless the segmenter has a window: then in windows that overlap by half,
    one forward each, whose logits are averaged.

    Args:
        scale: makes uint8 [1, 3, H, W] what the segmenter expects.
        at_least: forwards to run, for ranks that have to run as many; what is too many is not used.
    """
    scaled = scale(image.unsqueeze(0).to(device))
    boxes = windows_of(segmentor, image)
    patches = [segmentor(box.crop(scaled)) for box in boxes]
    for _ in range(at_least - len(boxes)):
        segmentor(boxes[-1].crop(scaled))
    logits = patches[0].float()
    if len(boxes) > 1:
        logits = average_windows(patches, boxes, (image.shape[-2], image.shape[-1]))
    return logits.argmax(dim=1).squeeze(0)


def windows_of(segmentor: Segmentor, image: Tensor) -> list[Box]:
    """The windows of an image [..., H, W] that a prediction is made in."""
    height, width = image.shape[-2:]
    window = segmentor.window or (height, width)
    return sliding_boxes((height, width), window, (max(1, window[0] // 2), max(1, window[1] // 2)))
