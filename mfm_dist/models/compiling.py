"""torch.compile for the networks of a run."""

from __future__ import annotations

from torch import nn

from mfm_dist.models.segmentor import Segmentor


def compile_segmentor(segmentor: Segmentor) -> None:
    """Compile the encoder and each head by torch.compile, at their first forward; names and weights stay."""
    for part in (segmentor.backbone, *segmentor.heads):
        compile_module(part)


def compile_module(module: nn.Module) -> None:
    """Compile a module by torch.compile, at its first forward.

    Dropout draws torch's own numbers, so that a compiled run sees the same ones as any other.
    """
    module.compile(dynamic=False, options={"fallback_random": True})
