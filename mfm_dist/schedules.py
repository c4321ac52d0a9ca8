"""What changes over the steps of a run: the learning rate, the weight of MFM, the decay of the teacher."""

from __future__ import annotations

from mfm_dist.config.schema import MFMSection


def ema_decay_at(update: int, ema_decay: float) -> float:
    """Return the decay of the teacher's ``update``-th update, counted from 1: a plain mean, then ``ema_decay``.

    The published schedule, min(1 - 1/(t + 1), alpha), updates at the start of step t >= 1, which is after the t-th
    applied optimiser step.
    """
    return min(1.0 - 1.0 / (update + 1), ema_decay)


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, warmup_ratio: float) -> float:
    """Return what every base rate is multiplied with at a step counted from 0 (UDA_FACTS 3.3).

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
