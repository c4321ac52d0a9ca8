"""torch.compile for the networks of a run."""

from __future__ import annotations

from torch import nn

from mfm_dist.models.segmentor import Segmentor


def compile_segmentor(segmentor: Segmentor) -> None:
    """Have the encoder and each head translated at their first forward, each by itself; names and weights stay."""
    for part in (segmentor.backbone, *segmentor.heads):
        compile_module(part)


def compile_module(module: nn.Module) -> None:
    """Have a module translated at its first forward.

    Dropout draws torch's own numbers, so that a compiled run sees the same ones as any other.
    """
    module.compile(dynamic=False, options={"fallback_random": True})
