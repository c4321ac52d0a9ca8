"""Prediction with a trained segmenter; the Rebuilder has no part in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfm_dist.methods.augment import normalise
from mfm_dist.models.segmentor import Segmentor


@torch.no_grad()
def predict_labels(
    segmentor: Segmentor, image: Tensor, device: torch.device, scale: Callable[[Tensor], Tensor] = normalise
) -> Tensor:
    """Most probable class of every pixel of one uint8 RGB image [3, H, W]: int64 [H, W] on ``device``.

    The image is taken whole, in one forward; ``scale`` makes uint8 [1, 3, H, W] what the segmenter expects.
    """
    logits: Tensor = segmentor(scale(image.unsqueeze(0).to(device)))
    return logits.float().argmax(dim=1).squeeze(0)
