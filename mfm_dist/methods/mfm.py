"""Masked Feature Modeling (arXiv 2509.13801): the auxiliary term that attaches to any method.

``mfm_term`` with default settings is the paper's; every other branch is a row of one of its ablation tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_dist.config.schema import MFMSection
from mfm_dist.errors import ConfigError
from mfm_dist.methods.base import ForwardKind, StepInputs
from mfm_dist.methods.gradients import frozen, zero_gradient, zero_loss_through
from mfm_dist.methods.hrda import draw_detail_box
from mfm_dist.methods.losses import cross_entropy
from mfm_dist.models.hrda import HRDASegmentor
from mfm_dist.models.rebuilder import Rebuilder
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.rng import Stream, torch_generator

PATCH = 4
"""Side in pixels of the patches that ``mfm.reconstruction: pixels`` regresses, the stride of the finest encoder map."""

Encode = Callable[[Tensor], list[Tensor]]
"""From an image [B, 3, H, W] to encoder maps."""


def passes_of(settings: MFMSection) -> list[ForwardKind]:
    """List the forwards of the term, each with the weight lambda: source before target, context before detail."""
    target, source = [ForwardKind.MFM], [ForwardKind.MFM_SOURCE]
    if settings.view == "both":
        target.append(ForwardKind.MFM_DETAIL)
        source.append(ForwardKind.MFM_SOURCE_DETAIL)
    return {"target": target, "source": source, "both": [*source, *target]}[settings.domain]


class View(NamedTuple):
    """What the term looks at."""

    image: Tensor
    """float32 [B, 3, h, w], clean: neither mixed nor augmented."""
    label: Tensor
    """int64 [B, H, W]."""
    weight: Tensor
    """float32 [B, H, W]."""


def mfm_term(
    student: Segmentor,
    rebuilder: Rebuilder | None,
    inputs: StepInputs,
    settings: MFMSection,
    *,
    grid: tuple[int, int],
    teacher: Encode,
    kind: ForwardKind = ForwardKind.MFM,
) -> Tensor:
    """Compute L_mfm: hide part of the target's features, rebuild it, and classify the result as the teacher does.

    f_t = E(x_t); f_r = R(f_t); cross-entropy of D(f_r) with the pseudo-label, weighted by the pseudo-weight. The
    image is clean (neither mixed nor augmented), and encoder, decoder and Rebuilder all receive gradients.

    Args:
        rebuilder: None where hidden features stay empty.
        grid: rows and columns of the mask.
        teacher: the teacher's encoder, without gradients.
        kind: one of ``passes_of(settings)``.
    """
    view = view_of(student, inputs, settings, kind)
    features = student.encode(view.image)
    mask = keyed_masks(inputs, grid, settings.mask_ratio, kind)
    if settings.reconstruction != "classes":
        assert rebuilder is not None
        loss = regression_loss(student, rebuilder, view, features, mask, settings=settings, teacher=teacher)
        return loss + zero_loss_through(student.heads, features)

    if settings.trained_parts == "decoder":
        features = [zero_gradient(feature) for feature in features]
    rebuilt = rebuild(student, rebuilder, features, mask)
    if settings.trained_parts == "encoder":
        with frozen(student.decoder):
            logits = student.decode(rebuilt)
        not_reached = student.heads
    else:
        logits = student.decode(rebuilt)
        not_reached = student.heads[1:]
    weight = view.weight
    if settings.loss_on == "hidden":
        # Divided by the hidden share, so that lambda weighs a hidden pixel the same at any mask ratio.
        hidden = enlarge_mask(mask, weight.shape[-2:]).to(weight.dtype)
        weight = weight * hidden / hidden.mean().clamp_min(1.0 / hidden.numel())
    return cross_entropy(logits, view.label, weight) + zero_loss_through(not_reached, features)


def view_of(student: Segmentor, inputs: StepInputs, settings: MFMSection, kind: ForwardKind) -> View:
    """Return image, label and weight of a domain, the source's labels given; in HRDA of context or detail window."""
    if kind in (ForwardKind.MFM_SOURCE, ForwardKind.MFM_SOURCE_DETAIL):
        label = inputs.source_label.long()
        image, weight = inputs.source_image, torch.ones_like(label, dtype=torch.float32)
    else:
        assert inputs.pseudo is not None
        image, label, weight = inputs.target_image, inputs.pseudo.label, inputs.pseudo.weight
    if settings.view != "detail" and kind not in (ForwardKind.MFM_DETAIL, ForwardKind.MFM_SOURCE_DETAIL):
        return View(student.context(image), label, weight)
    assert isinstance(student, HRDASegmentor)
    box = draw_detail_box(student, inputs, kind)
    return View(box.crop(image), box.crop(label), box.crop(weight))


def draw_mask(batch: int, grid: tuple[int, int], mask_ratio: float, generator: torch.Generator) -> Tensor:
    """Draw which cells of each image are hidden: independently, so the share varies from image to image (paper).

    Args:
        batch: number of images, B.
        grid: rows and columns of the Rebuilder's grid.
        mask_ratio: probability with which a cell is hidden, 0.40 in the paper; 0 hides none, 1 hides all.
        generator: a CPU generator, so that the mask is the same on every device.

    Returns:
        bool [B, rows, cols] on the CPU; True means hidden.

    Raises:
        ConfigError: ``mask_ratio`` lies outside [0, 1].
    """
    if not 0 <= mask_ratio <= 1:
        raise ConfigError(f"mfm.mask_ratio must lie between 0 and 1, got {mask_ratio}")
    return torch.rand(batch, *grid, generator=generator) < mask_ratio


def keyed_masks(
    inputs: StepInputs, grid: tuple[int, int], mask_ratio: float, kind: ForwardKind = ForwardKind.MFM
) -> Tensor:
    """Draw bool [B, rows, cols] on the inputs' device, True = hidden; keyed by each sample's position and the pass."""
    masks = [
        draw_mask(1, grid, mask_ratio, torch_generator(inputs.seed, Stream.MFM_MASK, position, kind - ForwardKind.MFM))
        for position in inputs.positions
    ]
    return torch.cat(masks).to(inputs.target_image.device)


def rebuild(student: Segmentor, rebuilder: Rebuilder | None, features: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Return the encoder's maps with the masked blocks of those that the decoder reads replaced by rebuilt ones.

    Without a Rebuilder they are 0.
    """
    read = student.decoder_inputs
    visible = [features[index] for index in read]
    if rebuilder is None:
        rebuilt = [map_.masked_fill(enlarge_mask(mask, map_.shape[-2:]).unsqueeze(1), 0.0) for map_ in visible]
    else:
        rebuilt = rebuilder(features[-1], visible, mask)
    complete = list(features)
    for index, feature in zip(read, rebuilt, strict=True):
        complete[index] = feature
    return complete


def regression_loss(
    student: Segmentor,
    rebuilder: Rebuilder,
    view: View,
    features: list[Tensor],
    mask: Tensor,
    *,
    settings: MFMSection,
    teacher: Encode,
) -> Tensor:
    """Return the mean squared error of the rebuilt part against what was there, averaged over maps.

    The paper does not say how its regression is normalised. Here each position of the target has mean 0 and deviation
    1 over its channels, as masked autoencoders regress pixels.
    """
    if settings.reconstruction == "pixels":
        maps = targets = [F.pixel_unshuffle(view.image, PATCH)]  # [B, 3 x PATCH x PATCH, h, w]
    else:
        complete = teacher(view.image) if settings.reconstruction == "teacher_features" else features
        maps = [features[index] for index in student.decoder_inputs]
        targets = [complete[index] for index in student.decoder_inputs]
    rebuilt = rebuilder(features[-1], maps, mask)
    errors = [hidden_error(ours, theirs.detach(), mask) for ours, theirs in zip(rebuilt, targets, strict=True)]
    return torch.stack(errors).mean()


def hidden_error(rebuilt: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error of two maps [B, C, h, w] over what is hidden; 0 if nothing is."""
    normalised = F.layer_norm(target.float().movedim(1, -1), target.shape[1:2]).movedim(-1, 1)
    hidden = enlarge_mask(mask, target.shape[-2:]).unsqueeze(1)
    # Selected, not multiplied with: visible places hold the encoder's own values, of any size.
    error = torch.where(hidden, rebuilt.float() - normalised, 0.0).square()
    return error.sum() / (hidden.sum() * target.shape[1]).clamp_min(1)


def enlarge_mask(mask: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bring a grid mask [B, rows, cols] to another size, nearest cell: bool [B, H, W]."""
    return F.interpolate(mask.unsqueeze(1).float(), size, mode="nearest").squeeze(1).bool()
