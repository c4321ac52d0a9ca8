"""Masked Feature Modeling (arXiv 2509.13801): the auxiliary term that attaches to any method."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_dist.config.schema import MFMSection
from mfm_dist.methods.base import StepInputs
from mfm_dist.methods.self_training import cross_entropy
from mfm_dist.models.rebuilder import Rebuilder, draw_mask
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.rng import Stream, torch_generator


def mfm_term(student: Segmentor, rebuilder: Rebuilder, inputs: StepInputs, settings: MFMSection) -> Tensor:
    """L_mfm: hide part of the target's features, rebuild it, and classify the result as the teacher does.

    f_t = E(x_t); f_r = R(f_t); cross-entropy of D(f_r) with the pseudo-label, weighted by the pseudo-weight. The
    image is clean (neither mixed nor augmented), and encoder, decoder and Rebuilder all receive gradients.
    """
    assert inputs.pseudo is not None
    features = student.encode(inputs.target_image)
    mask = keyed_masks(inputs, rebuilder.grid, settings.mask_ratio)
    rebuilt = rebuild(student, rebuilder, features, mask)
    logits = student.decode(rebuilt)
    weight = inputs.pseudo.weight
    if settings.loss_on == "hidden":
        # Divided by the hidden share, so that lambda weighs a hidden pixel the same at any mask ratio.
        hidden = enlarge_mask(mask, weight.shape[-2:]).to(weight.dtype)
        weight = weight * hidden / hidden.mean().clamp_min(1.0 / hidden.numel())
    return cross_entropy(logits, inputs.pseudo.label, weight)


def keyed_masks(inputs: StepInputs, grid: tuple[int, int], mask_ratio: float) -> Tensor:
    """bool [B, rows, cols] on the inputs' device, True = hidden; each sample's mask is keyed by its position."""
    masks = [
        draw_mask(1, grid, mask_ratio, torch_generator(inputs.seed, Stream.MFM_MASK, position))
        for position in inputs.positions
    ]
    return torch.cat(masks).to(inputs.target_image.device)


def rebuild(student: Segmentor, rebuilder: Rebuilder, features: list[Tensor], mask: Tensor) -> list[Tensor]:
    """The encoder's maps with the hidden cells of those that the decoder reads replaced by rebuilt ones."""
    read = student.decoder_inputs
    rebuilt = rebuilder(features[-1], [features[index] for index in read], mask)
    complete = list(features)
    for index, feature in zip(read, rebuilt, strict=True):
        complete[index] = feature
    return complete


def enlarge_mask(mask: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """A grid mask [B, rows, cols] at another size, nearest cell: bool [B, H, W]."""
    return F.interpolate(mask.unsqueeze(1).float(), size, mode="nearest").squeeze(1).bool()
