"""torch.compile for the networks of a run."""

from __future__ import annotations

from mfm_dist.models.segmentor import Segmentor


def compile_segmentor(segmentor: Segmentor) -> None:
    """Have encoder and decoder translated at their first forward, each by itself; names and weights stay.

    Dropout draws torch's own numbers, so that a compiled run sees the same ones as any other.
    """
    for half in (segmentor.backbone, segmentor.decoder):
        half.compile(dynamic=False, options={"fallback_random": True})
