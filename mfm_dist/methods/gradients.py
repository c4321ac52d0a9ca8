"""Keep a loss from training a part of the networks, while its backward still reaches every parameter.

A parameter that a backward leaves out would be updated by ZeRO-3 with its previous gradient, and DDP with
``memory.lean`` would not exchange it: what must not learn gets a gradient of 0 instead of none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mfm_dist.models.dropout import dropouts_of, masked
from mfm_dist.models.layers import batch_norm_untracked


def zero_gradient(feature: Tensor) -> Tensor:
    """Return the same values; the gradient that flows back from here is 0."""
    stopped = feature.view_as(feature)
    if stopped.requires_grad:
        stopped.register_hook(torch.zeros_like)
    return stopped


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients pass through a module to its input in here, and give its own parameters none."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def zero_loss_through(heads: Sequence[nn.Module], features: list[Tensor]) -> Tensor:
    """Return the scalar 0, whose backward gives a gradient of 0 to every parameter of these decoders.

    They run on a corner of the encoder's maps, which costs next to nothing, and drop nothing there, for which they
    would draw.
    """
    corner = [feature.detach()[..., :2, :2] for feature in features]
    total = features[-1].new_zeros((), dtype=torch.float32)
    for head in heads:
        dropouts = dropouts_of([head])
        kept = corner[-1].new_ones(len(corner[-1]), sum(layer.width for layer in dropouts))
        with batch_norm_untracked(head), masked(dropouts, kept):
            total = total + 0.0 * head(corner).float().sum()
    return total
