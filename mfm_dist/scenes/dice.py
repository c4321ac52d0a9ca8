"""Scalar random draws, fast enough for the few thousand small decisions that a street needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Range = tuple[float, float]


class Dice:
    """Uniform numbers drawn in blocks: a plain Python float costs a fraction of a numpy scalar draw."""

    BLOCK = 2048

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._block: list[float] = []

    def unit(self) -> float:
        """A number in [0, 1)."""
        if not self._block:
            self._block = self._generator.random(self.BLOCK).tolist()
        return self._block.pop()

    def between(self, low_high: Range) -> float:
        low, high = low_high
        return low + (high - low) * self.unit()

    def around(self, value: float, share: float) -> float:
        """``value`` varied by up to ``share`` of itself either way."""
        return value * (1.0 + share * (2.0 * self.unit() - 1.0))

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.unit() * len(options))]

    def weighted(self, weights: Mapping[str, float]) -> str:
        """A key, with probability proportional to its weight."""
        keys = list(weights)
        rest = self.unit() * sum(weights.values())
        for key in keys[:-1]:
            rest -= weights[key]
            if rest < 0.0:
                return key
        return keys[-1]
