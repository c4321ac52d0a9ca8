"""Steps that must not be applied: gradients that are not finite, and losses far above what the run is used to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mfm_dist.config.schema import StabilitySection

FEWEST_LOSSES = 20
"""Losses of applied steps that the spike rule waits for before it judges."""


class SpikeRule:
    """A ceiling for the loss of a micro-batch: so many times the median of the last applied steps.

    Losses are means over ranks, so every rank has the same ceiling, at any world size.
    """

    def __init__(self, settings: StabilitySection, losses: Sequence[float] = ()) -> None:
        """``losses``: what ``losses`` held when a checkpoint was written, so that a resumed run judges alike."""
        self.settings = settings
        self.losses = list(losses)

    @property
    def active(self) -> bool:
        """Whether the rule is on at all."""
        return self.settings.spike_factor > 0

    def ceiling(self) -> float:
        """Loss above which the step is to be skipped; infinite while there is too little to compare with."""
        if not self.active or len(self.losses) < FEWEST_LOSSES:
            return math.inf
        return self.settings.spike_factor * statistics.median(self.losses)

    def note(self, loss: float) -> None:
        """Remember the loss of an applied step."""
        self.losses = [*self.losses, loss][-self.settings.spike_window :]
