"""Statistics of differences that are paired by seed: Student's t and Holm's correction, without SciPy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedDifference:
    """Mean of differences, with its two-sided 95 % interval and the p-value of no difference; None of a single one."""

    mean: float
    half_width: float | None
    p: float | None


def paired_difference(differences: Sequence[float]) -> PairedDifference:
    """Return the mean of at least one difference and what Student's t says of it."""
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return PairedDifference(mean, None, None)
    error = statistics.stdev(differences) / count**0.5
    if error == 0:
        return PairedDifference(mean, 0.0, 1.0 if mean == 0 else 0.0)
    p = 1 - t_within(abs(mean) / error, count - 1)
    return PairedDifference(mean, t_quantile(0.95, count - 1) * error, p)


def t_within(t: float, degrees: int) -> float:
    """Return the chance that |Student's t| is at most ``t`` >= 0; Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / degrees**0.5)
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))


def t_quantile(share: float, degrees: int) -> float:
    """Return the t within whose bounds, on both sides of 0, this share of Student's distribution lies."""
    low, high = 0.0, 1.0
    while t_within(high, degrees) < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, degrees) < share else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down rule, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
