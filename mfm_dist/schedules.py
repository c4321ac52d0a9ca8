"""What changes over the steps of a run: the learning rate, the weight of MFM, the decay of the teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfm_dist.config.schema import MFMSection

GRADIENT_DECAY = 0.9
"""Of the averages that ``mfm.gradient_budget`` compares: they follow within some ten steps."""


def ema_decay_at(update: int | Tensor, ema_decay: float) -> Tensor:
    """Return the decay of the teacher's ``update``-th update, counted from 1: a plain mean, then ``ema_decay``.

    The published schedule, min(1 - 1/(t + 1), alpha), updates at the start of step t >= 1, which is after the t-th
    applied optimiser step. How many were applied only the device knows in time: a float64 scalar, where ``update`` is.
    """
    return (1.0 - 1.0 / (torch.as_tensor(update, dtype=torch.float64) + 1.0)).clamp(max=ema_decay)


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, warmup_ratio: float) -> float:
    """Return what every base rate is multiplied with at a step counted from 0 (mmcv's ``poly`` of power 1).

    Linear decay to 0 at ``steps``; the warm-up multiplies the *decayed* rate, so the peak stays below the base.
    """
    factor = 1.0 - step / steps
    if step < warmup_steps:
        factor *= 1.0 - (1.0 - step / warmup_steps) * (1.0 - warmup_ratio)
    return factor


def mfm_weight(step: int, settings: MFMSection) -> float:
    """Return lambda at a step: 0 up to ``ramp_from``, ``loss_weight`` from ``ramp_to`` on, linear between."""
    if step >= settings.ramp_to:
        return settings.loss_weight
    if step <= settings.ramp_from:
        return 0.0
    return settings.loss_weight * (step - settings.ramp_from) / (settings.ramp_to - settings.ramp_from)


def within_budget(weight: float, norms: Sequence[float], budget: float) -> float:
    """Lower lambda to what ``mfm.gradient_budget`` allows.

    Args:
        weight: lambda of the step.
        norms: averaged norm of the gradient at the encoder's last map, of the method's own terms and of L_mfm at a
            weight of 1; empty before both were seen.
        budget: largest gradient of lambda * L_mfm, as a share of the method's; 0 for no limit.
    """
    if not budget or not norms or weight * norms[1] == 0:
        return weight
    return weight * min(1.0, budget * norms[0] / (weight * norms[1]))


def averaged_norms(before: Sequence[float], norms: Sequence[float], weight: float) -> list[float]:
    """Take the norms of one step into those that ``within_budget`` is given.

    Args:
        before: the averages so far.
        norms: of the step, of the method's own terms and of L_mfm at the weight that it had.
        weight: that weight; at 0 the step says nothing about L_mfm.
    """
    if weight == 0:
        return list(before)
    seen = [norms[0], norms[1] / weight]
    if not before:
        return seen
    return [GRADIENT_DECAY * old + (1 - GRADIENT_DECAY) * new for old, new in zip(before, seen, strict=True)]
