"""Clipping under every engine, ZeRO too, and steps that must not be applied: a factor for each part of the gradient.

``Engine.step`` multiplies the gradients by these factors; DeepSpeed's own clipping is off. Nothing here waits for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CLIP_EPSILON = 1e-6
"""Added to a norm before a limit is divided by it, as torch's and DeepSpeed's clipping do."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a step may not exceed if it is to be applied."""

    loss: float = math.inf
    """Mean loss of the global batch."""
    grad_norm: float = math.inf
    """Global norm before clipping."""


def sum_of_squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum the squares of all elements: a float32 scalar, 0 where this rank holds none of them."""
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(list(gradients), dtype=torch.float32)).square().sum().to(device)


def clip_factors(norms: Tensor, limits: Tensor, global_limit: float) -> Tensor:
    """Return what to multiply the gradient of each part with: [parts], at most 1.

    Args:
        norms: [parts], before clipping.
        limits: [parts], largest norm of each part by itself; infinite for none.
        global_limit: largest norm of all parts together, after that; 0 for none.
    """
    factors = (limits / (norms + CLIP_EPSILON)).clamp(max=1.0)
    total = (norms * factors).norm()
    return factors * ((global_limit or math.inf) / (total + CLIP_EPSILON)).clamp(max=1.0)


def is_good(norms: Tensor, loss: Tensor, ceilings: Ceilings) -> Tensor:
    """Tell, in a bool on the device, whether a step of these norms of parts and this loss is to be applied."""
    total = norms.norm()
    return torch.isfinite(loss) & (loss <= ceilings.loss) & torch.isfinite(total) & (total <= ceilings.grad_norm)
