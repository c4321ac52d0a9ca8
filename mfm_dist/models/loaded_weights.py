"""What tensors out of a file may be, before they take the place of a network's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

WRITTEN_FLOATS = (torch.float32, torch.bfloat16)
"""Of checkpoints and exports; copying would turn any other type into these without a word."""


def wrong_types(stored: Mapping[str, torch.dtype], own: Mapping[str, torch.dtype]) -> Iterator[str]:
    """Name every tensor of a type that is never written in the place of one of these types."""
    for name in stored.keys() & own.keys():
        allowed = WRITTEN_FLOATS if own[name].is_floating_point else (own[name],)
        if stored[name] not in allowed:
            yield f"{name} is {str(stored[name]).removeprefix('torch.')}"


def not_finite(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Name every tensor with a number that is NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            yield f"{name} holds numbers that are not finite"
