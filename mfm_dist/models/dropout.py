"""Dropout whose masks are given from outside.

What is dropped is then a matter of block, pass and layer: the same on every device, when activations are computed again
in the backward pass, and whether images are encoded together or one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import timm.layers
import torch
from torch import Tensor, nn


class KeyedDropout(nn.Module):
    """Drops whole channels of a map (Dropout2d), or with width 1 whole samples of a branch (stochastic depth).

    A layer that is given no mask draws one from torch's generator, as torch's and timm's own layers do; so it does when
    it runs again (timm's EdgeNeXt has one for both branches of a block), and for windows instead of images.

    Args:
        p: probability that a channel or a sample is dropped; what stays is divided by 1 - p.
        width: number of channels, or 1.

    Attributes:
        mask: for the forward to come, [B, width], 0 or 1 / (1 - p).
    """

    mask: Tensor | None = None

    def __init__(self, p: float, width: int) -> None:
        super().__init__()
        self.p = p
        self.drops = p > 0.0
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [B, ...] by the mask in training; return it as it is otherwise."""
        # Not by the probability itself, which grows from block to block: each would be compiled by itself.
        if not (self.training and self.drops):
            return x
        mask, self.mask = self.mask, None
        if mask is None or len(mask) != len(x):
            keep = 1.0 - self.p
            mask = x.new_empty(len(x), self.width).bernoulli_(keep).div_(keep)
        return x * mask.to(x.dtype).view(len(x), self.width, *[1] * (x.ndim - 2))

    def extra_repr(self) -> str:
        """Describe the layer when its module is printed."""
        return f"p={self.p}, width={self.width}"


def replace_drop_path(net: nn.Module) -> None:
    """Put a ``KeyedDropout`` in the place of every stochastic depth layer of timm's that drops anything."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, timm.layers.DropPath) and child.drop_prob:
                assert child.scale_by_keep, "timm builds no other"
                setattr(parent, name, KeyedDropout(child.drop_prob, width=1))


def dropouts_of(modules: Iterable[nn.Module]) -> list[KeyedDropout]:
    """List the layers of these modules that draw anything, in order."""
    layers = (layer for module in modules for layer in module.modules())
    return [layer for layer in layers if isinstance(layer, KeyedDropout) and layer.p]


def shares_kept(layers: Sequence[KeyedDropout]) -> Tensor:
    """Return the probability that each channel of these layers is kept, side by side: float32 [sum of widths]."""
    return torch.tensor([1.0 - layer.p for layer in layers for _ in range(layer.width)])


@contextmanager
def masked(layers: Sequence[KeyedDropout], masks: Tensor) -> Iterator[None]:
    """Give layers their masks [B, sum of widths] for what runs in here."""
    if not layers:
        yield
        return
    for layer, mask in zip(layers, masks.split([layer.width for layer in layers], dim=1), strict=True):
        layer.mask = mask
    try:
        yield
    finally:
        for layer in layers:
            layer.mask = None
