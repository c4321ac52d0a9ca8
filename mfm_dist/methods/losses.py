"""Losses that every method uses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.models.layers import resize


def cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Average pixel-wise cross-entropy over *all* pixels, ignored ones included (docs/methods.md).

    Args:
        logits: [B, C, h, w]; enlarged bilinearly to the label's size. Computed in fp32 whatever comes in.
        label: integer [B, H, W]; ``IGNORE_INDEX`` pixels contribute 0 but count in the mean.
        weight: float [B, H, W] multiplied onto each pixel's loss, or None for 1 everywhere.
    """
    loss = pixel_cross_entropy(logits, label)
    return loss.mean() if weight is None else (loss * weight).mean()


def pixel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Return the cross-entropy of each pixel, float32 [B, H, W], 0 where ignored; as ``cross_entropy`` otherwise."""
    logits = resize(logits.float(), label.shape[-2:])
    return F.cross_entropy(logits, label.long(), ignore_index=IGNORE_INDEX, reduction="none")
