"""Teacher targets and ClassMix of the UDA line, as pure functions.

They reproduce the DAFormer / HRDA / MIC code line, oddities included, because published figures rest on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NUM_LABEL_VALUES = 256
"""A label is one byte."""


@dataclass(frozen=True)
class PseudoTarget:
    """What the teacher says of a target micro-batch."""

    label: Tensor
    """int64 [B, H, W]: the teacher's class of every pixel; none is dropped for low confidence."""
    weight: Tensor
    """float32 [B, H, W]: the pseudo-weight, one value for the whole micro-batch, 0 where not valid."""
    confidence: Tensor
    """float32 [B, H, W]: the probability of that class."""
    valid: Tensor
    """bool [B, H, W]: False in margins and on padding."""


@torch.no_grad()
def pseudo_target(logits: Tensor, valid: Tensor, threshold: float) -> PseudoTarget:
    """Make pseudo-label and pseudo-weight from the teacher's logits at image size.

    Args:
        logits: [B, C, H, W].
        valid: bool [B, H, W]; the weight is 0 where False. The share is still taken over all pixels.
        threshold: the pseudo-weight is the share of pixels whose largest probability is at least this.
    """
    # fp32: near 1 bfloat16 has steps of 0.004, which would blur a threshold of 0.968.
    probability, label = logits.float().softmax(dim=1).max(dim=1)
    weight = pseudo_weight(probability, valid, threshold)
    return PseudoTarget(label=label, weight=weight, confidence=probability, valid=valid)


def pseudo_weight(confidence: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Return float32 [B, H, W]: the share of all pixels held at ``threshold`` at least; 0 where not ``valid``."""
    return (confidence >= threshold).float().mean() * valid


def without_margins(valid: Tensor, top: int, bottom: int) -> Tensor:
    """Make this many rows of ``valid`` [B, H, W] False at the top and at the bottom (DAFormer's published code)."""
    rows = torch.arange(valid.shape[1], device=valid.device)
    inside = (rows >= top) & (rows < valid.shape[1] - bottom)
    return valid & inside[:, None]


def draw_class_masks(label: Tensor, ranks: Tensor, scope: Literal["batch", "image"]) -> Tensor:
    """Choose the source pixels that ClassMix pastes: those of a random half of the classes, anew for each image.

    Of n candidate classes ceil(n / 2) are drawn without replacement. Like the published code this treats 255 as a
    class and takes the candidates from the whole micro-batch (``scope="batch"``), so that a drawn class may be absent
    from the image. Nothing here waits for a result or changes shape with the data.

    Args:
        label: uint8 [B, H, W].
        ranks: float [B, 256], one random key per image and label value; the smallest keys are drawn.
        scope: "batch" (DAFormer, MIC) or "image" (original DACS).

    Returns:
        bool [B, H, W], True where the source is pasted.
    """
    batch = len(label)
    index = label.reshape(batch, -1).long()
    present = torch.zeros(batch, NUM_LABEL_VALUES, device=label.device)
    present.scatter_(1, index, 1.0)
    if scope == "batch":
        present = present.amax(dim=0, keepdim=True).expand(batch, -1)
    candidates = present > 0
    drawn_count = (candidates.sum(dim=1, keepdim=True) + 1) // 2
    keys = torch.where(candidates, ranks.to(label.device), math.inf)
    place = keys.argsort(dim=1).argsort(dim=1)
    drawn = candidates & (place < drawn_count)
    return drawn.gather(1, index).reshape(label.shape)


def mix(mask: Tensor, pasted: Tensor, background: Tensor) -> Tensor:
    """Return ``pasted`` where the class mask [B, H, W] is True, else ``background``; any [B, ..., H, W]."""
    while mask.ndim < pasted.ndim:
        mask = mask.unsqueeze(1)
    return torch.where(mask, pasted, background)
