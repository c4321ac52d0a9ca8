"""What GPUs are capable of, by their data sheets, and how much of it a run uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Card(NamedTuple):
    """Highest rates of a card, matrices dense."""

    bandwidth: float
    """Bytes/s of its memory."""
    bf16: float
    """FLOP/s in bf16, as tf32 and fp32 (IEEE) below."""
    tf32: float
    fp32: float


CARDS: Mapping[str, Card] = {
    "a10": Card(0.600e12, 125e12, 62.5e12, 31.2e12),
    "a100": Card(1.555e12, 312e12, 156e12, 19.5e12),
    "h100": Card(3.35e12, 989e12, 494e12, 67e12),
    "h100-nvl": Card(3.9e12, 835e12, 417e12, 60e12),
    "h100-pcie": Card(2.0e12, 756e12, 378e12, 51e12),
    "h200": Card(4.8e12, 989e12, 494e12, 67e12),
    "l4": Card(0.300e12, 121e12, 60e12, 30.3e12),
    "l40s": Card(0.864e12, 362e12, 183e12, 91.6e12),
}
"""By a part of torch's name of the device, NVIDIA's data sheets (A100 40 GB; H100 and H200 are SXM)."""


def card_of(device_name: str) -> Card | None:
    """Return the rates of a GPU by torch's name for it, e.g. "NVIDIA H100 80GB HBM3"; None for one not listed."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name.lower())
    found = [key for key in CARDS if re.search(rf"(?<![a-z0-9]){key}(?![a-z0-9])", name)]
    return CARDS[max(found, key=len)] if found else None


def peak_flops(card: Card, precision: str, *, tf32: bool) -> float:
    """Return the FLOP/s that the matrix products of a run cannot exceed.

    Args:
        precision: ``train.precision``.
        tf32: whether fp32 matrices are multiplied in TF32.
    """
    if precision.startswith("bf16"):
        return card.bf16
    return card.tf32 if tf32 else card.fp32
