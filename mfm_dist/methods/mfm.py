"""Masked Feature Modeling (arXiv 2509.13801): the auxiliary term that attaches to any method.

``masked_features_loss`` is the term itself, for any loop. ``mfm_pass`` hands it what a training step has; with default
settings that is the paper's term, and every other branch is a row of one of its ablation tables, an ingredient of the
stable variant, or a view under HRDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_dist.config.schema import MFMSection
from mfm_dist.errors import ConfigError
from mfm_dist.methods.base import ForwardKind, Loss, Maps, Pass, StepInputs
from mfm_dist.methods.gradients import frozen, zero_gradient, zero_loss_through
from mfm_dist.methods.hrda import drawn_box
from mfm_dist.methods.losses import cross_entropy, pixel_cross_entropy
from mfm_dist.models.hrda import HRDASegmentor
from mfm_dist.models.rebuilder import Rebuilder, hidden_places
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.models.windows import DrawnWindow
from mfm_dist.rng import Keyed, Stream, torch_generator

PATCH = 4
"""Side in pixels of the patches that ``mfm.reconstruction: pixels`` regresses, the stride of the finest encoder map."""

DETAIL_OF = {ForwardKind.MFM: ForwardKind.MFM_DETAIL, ForwardKind.MFM_SOURCE: ForwardKind.MFM_SOURCE_DETAIL}
"""Key of the draws for the detail window of each pass."""

Encode = Callable[[Tensor], list[Tensor]]
"""From an image [B, 3, H, W] to encoder maps."""
Decode = Callable[[list[Tensor]], Tensor]
"""From maps to logits [B, C, h, w]."""
Rebuild = Callable[[Tensor, list[Tensor], Tensor], list[Tensor]]
"""From the last map, the maps to rebuild and a mask to rebuilt maps; a ``Rebuilder`` is one."""


def masked_features_loss(
    rebuilder: Rebuild,
    features: list[Tensor],
    decode: Decode,
    mask: Tensor,
    label: Tensor,
    weight: Tensor,
    *,
    loss_on: Literal["all", "hidden"] = "all",
) -> Tensor:
    """Compute L_mfm: hide part of an image's features, rebuild it, and classify the result (MFM, section 3).

    f_r = R(f); the loss is the cross-entropy of D(f_r) with the label, each pixel weighed, averaged over all pixels.
    Encoder, decoder and Rebuilder all receive gradients.

    Args:
        rebuilder: a ``Rebuilder`` made for these maps.
        features: the encoder's maps that the decoder reads, fine to coarse, i-th [B, channels[i], h_i, w_i], of the
            clean image; the last one is what the Rebuilder sees.
        decode: the decoder.
        mask: bool [B, rows, cols] over the Rebuilder's grid, True = hidden (``draw_mask``), on any device.
        label: integer [B, H, W], of the teacher for a target image; ``IGNORE_INDEX`` counts for nothing.
        weight: float [B, H, W], the teacher's pseudo-weight (MFM).
        loss_on: pixels that count: every one (MFM), or the hidden ones. Their loss is divided by their share of the
            micro-batch, so that lambda weighs a hidden pixel the same at any mask ratio.
    """
    logits = decode(rebuilder(features[-1], features, mask))
    if loss_on == "hidden":
        hidden = hidden_places(mask, weight).to(weight.dtype)
        weight = weight * hidden / hidden.mean().clamp_min(1.0 / hidden.numel())
    return cross_entropy(logits, label, weight)


def hide(last_feature: Tensor, features: list[Tensor], mask: Tensor) -> list[Tensor]:  # noqa: ARG001 - as a Rebuilder
    """Set the hidden part of maps to 0 and rebuild nothing (MFM, row "mask without rebuilding")."""
    return [map_.masked_fill(hidden_places(mask, map_).unsqueeze(1), 0.0) for map_ in features]


def passes_of(settings: MFMSection) -> list[ForwardKind]:
    """List the forwards of the term, each with the weight lambda: source before target."""
    target, source = ForwardKind.MFM, ForwardKind.MFM_SOURCE
    return {"target": [target], "source": [source], "both": [source, target]}[settings.domain]


class View(NamedTuple):
    """What the term looks at."""

    image: Tensor
    """float32 [B, 3, h, w], clean: neither mixed nor augmented."""
    label: Tensor
    """int64 [B, H, W]."""
    weight: Tensor
    """float32 [B, H, W]."""


def mfm_pass(
    student: Segmentor,
    rebuilder: Rebuilder | None,
    inputs: StepInputs,
    settings: MFMSection,
    *,
    weight: float | Tensor,
    detail_weight: float,
    teacher: Encode,
    kind: ForwardKind = ForwardKind.MFM,
    measured: dict[str, Tensor] | None = None,
) -> Pass:
    """Compute L_mfm of a step: the clean target image, its features in part hidden, classified as the teacher does.

    Args:
        rebuilder: None where hidden features stay empty.
        weight: lambda.
        detail_weight: HRDA's weight of the detail window's loss, for ``mfm.view: fused``.
        teacher: the teacher's encoder, without gradients.
        kind: one of ``passes_of(settings)``.
        measured: takes the loss where hidden and where visible, and what the Rebuilder measures, of the last pass where
            there are two (``mfm.domain: both``) and of none that regresses; None for neither.
    """
    view, mask = view_of(inputs, kind), inputs.drawn(kind.label)["mask"]
    if settings.reconstruction != "classes":
        assert rebuilder is not None
        seen_whole = view._replace(image=student.context(view.image))

        def regress(maps: Maps) -> dict[str, Loss]:
            features = next(maps)
            loss = regression_loss(student, rebuilder, seen_whole, features, mask, settings=settings, teacher=teacher)
            return {kind.label: Loss(loss + zero_loss_through(student.heads, features), weight)}

        return Pass([seen_whole.image], regress)

    way: Rebuild = hide
    if rebuilder is not None:
        way = partial(rebuilder, num_hidden=hidden_cells(rebuilder.grid, settings))
    classify: ClassifyRebuilt = partial(classify_rebuilt, student, way, settings=settings)
    images, seen_of = [student.context(view.image)], partial(classify, view=view, mask=mask, decode=student.decode)
    if settings.view != "context":
        assert isinstance(student, HRDASegmentor)
        box = drawn_box(inputs, kind)
        window = View(*(box.crop(part) for part in view))
        if settings.view == "detail":
            view, images = window, [window.image]
            seen_of = partial(classify, view=window, mask=mask, decode=student.decode)
        else:
            masks = (mask, inputs.drawn(DETAIL_OF[kind].label)["mask"])
            images.append(window.image)
            seen_of = partial(
                classify_fused, student, classify, view=view, window=window, masks=masks, box=box, weight=detail_weight
            )

    def losses(maps: Maps) -> dict[str, Loss]:
        with measuring(rebuilder if measured is not None else None) as found:
            seen = seen_of(*maps)
        if measured is not None:
            by_place = losses_by_place(seen.logits, view, mask)
            measured.update({f"{kind.label}/{name}": loss for name, loss in by_place.items()})
            measured.update({f"rebuilder/{name}": value for name, value in found.items()})
        reached = 0 if settings.trained_parts == "encoder" else len(student.heads) if settings.view == "fused" else 1
        return {kind.label: Loss(seen.loss + zero_loss_through(student.heads[reached:], seen.features), weight)}

    return Pass(images, losses)


def measuring(rebuilder: Rebuilder | None) -> AbstractContextManager[dict[str, Tensor]]:
    """Measure the forwards of a Rebuilder in here; nothing of none."""
    return nullcontext({}) if rebuilder is None else rebuilder.measuring()


class Seen(NamedTuple):
    """What the term makes of one view."""

    loss: Tensor
    logits: Tensor
    """[B, C, h, w]."""
    features: list[Tensor]
    """All encoder maps, before anything was hidden."""


class ClassifyRebuilt(Protocol):
    """From the encoder maps of a view, its mask and a decoder to what the term makes of it."""

    def __call__(self, features: list[Tensor], *, view: View, mask: Tensor, decode: Decode) -> Seen: ...


def classify_rebuilt(
    student: Segmentor,
    rebuilder: Rebuild,
    features: list[Tensor],
    *,
    view: View,
    mask: Tensor,
    decode: Decode,
    settings: MFMSection,
) -> Seen:
    """Hide a part of a view's maps, rebuild it, and classify all maps by ``decode``; train what the settings say."""
    maps = features
    if settings.trained_parts == "decoder":
        maps = [zero_gradient(feature) for feature in features]
    read, logits = student.decoder_inputs, []

    def decode_all(rebuilt: list[Tensor]) -> Tensor:
        with frozen(nn.ModuleList(student.heads)) if settings.trained_parts == "encoder" else nullcontext():
            logits.append(decode(completed(maps, read, rebuilt)))
        return logits[0]

    visible = [maps[index] for index in read]
    loss = masked_features_loss(rebuilder, visible, decode_all, mask, view.label, view.weight, loss_on=settings.loss_on)
    return Seen(loss, logits[0], features)


def classify_fused(
    student: HRDASegmentor,
    classify: ClassifyRebuilt,
    context: list[Tensor],
    detail: list[Tensor],
    *,
    view: View,
    window: View,
    masks: tuple[Tensor, Tensor],
    box: DrawnWindow,
    weight: float,
) -> Seen:
    """Rebuild context and detail, fuse them as HRDA does, and take HRDA's loss: 1 - w of the fused, w of the detail.

    Args:
        context, detail: encoder maps of both.
        window: what ``box`` shows of ``view``.
        masks: of the context and of the window.
        weight: w.
    """
    close = classify(detail, view=window, mask=masks[1], decode=partial(student.decode, number=1))

    def decode_fused(maps: list[Tensor]) -> Tensor:
        return student.fuse_window(student.decode(maps), student.attend(maps), close.logits, box)

    fused = classify(context, view=view, mask=masks[0], decode=decode_fused)
    return fused._replace(loss=(1.0 - weight) * fused.loss + weight * close.loss)


@torch.no_grad()
def losses_by_place(logits: Tensor, view: View, mask: Tensor) -> dict[str, Tensor]:
    """Average the weighed cross-entropy of logits [B, C, h, w] over hidden and over visible pixels; 0 of none."""
    errors = pixel_cross_entropy(logits.detach(), view.label) * view.weight
    hidden = hidden_places(mask, errors)
    places = {"loss_hidden": hidden, "loss_visible": ~hidden}
    return {name: (errors * place).sum() / place.sum().clamp_min(1) for name, place in places.items()}


def view_of(inputs: StepInputs, kind: ForwardKind) -> View:
    """Return image, label and weight of a domain, the source's labels given."""
    if kind == ForwardKind.MFM_SOURCE:
        label = inputs.source_label.long()
        return View(inputs.source_image, label, torch.ones_like(label, dtype=torch.float32))
    assert inputs.pseudo is not None
    return View(inputs.target_image, inputs.pseudo.label, inputs.pseudo.weight)


def draw_mask(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: float,
    generator: torch.Generator,
    *,
    block: int = 1,
    exact: bool = False,
) -> Tensor:
    """Draw which cells of each image are hidden.

    Args:
        batch: number of images, B.
        grid: rows and columns of the Rebuilder's grid.
        mask_ratio: share of the cells to hide, 0.40 in the paper; 0 hides none, 1 hides all.
        generator: a CPU generator, so that the mask is the same on every device.
        block: side, in cells, of the squares that are hidden together; 1 in the paper, whose cells are 4 x 4 features.
        exact: hide the nearest whole number of blocks in every image. Otherwise each block is hidden independently,
            so that the share varies from image to image (paper).

    Returns:
        bool [B, rows, cols] on the CPU; True means hidden.

    Raises:
        ConfigError: ``mask_ratio`` lies outside [0, 1], or ``block`` does not divide the grid.
    """
    rows, cols = grid
    if not 0 <= mask_ratio <= 1:
        raise ConfigError(f"mfm.mask_ratio must lie between 0 and 1, got {mask_ratio}")
    if block < 1 or rows % block or cols % block:
        raise ConfigError(f"mfm.mask_block_cells={block} does not divide rebuilder.grid={rows}x{cols}")
    draws = torch.rand(batch, rows // block, cols // block, generator=generator)
    if exact:
        place = draws.flatten(1).argsort(dim=1).argsort(dim=1)  # of each block in a random order
        hidden = (place < exact_count(place.shape[1], mask_ratio)).view_as(draws)
    else:
        hidden = draws < mask_ratio
    return hidden.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)


def exact_count(blocks: int, mask_ratio: float) -> int:
    """Return how many of so many blocks an exact mask hides."""
    return round(mask_ratio * blocks)


def hidden_cells(grid: tuple[int, int], settings: MFMSection) -> int | None:
    """Return how many cells of a grid the settings hide in every image; None where that varies."""
    if settings.mask != "exact":
        return None
    area = settings.mask_block_cells**2
    return area * exact_count(grid[0] * grid[1] // area, settings.mask_ratio)


def mask_draws(key: Keyed, grid: tuple[int, int], settings: MFMSection) -> dict[str, Tensor]:
    """Draw the masks of all passes of the term, and of their detail windows where these are seen too."""
    kinds = passes_of(settings)
    if settings.view == "fused":
        kinds += [DETAIL_OF[kind] for kind in kinds]
    return {f"{kind.label}/mask": keyed_masks(key, grid, settings, kind) for kind in kinds}


def keyed_masks(key: Keyed, grid: tuple[int, int], settings: MFMSection, kind: ForwardKind = ForwardKind.MFM) -> Tensor:
    """Draw bool [B, rows, cols] on the CPU, True = hidden; keyed by each sample's position and the pass."""
    masks = [
        mask_of(settings, grid, torch_generator(key.seed, Stream.MFM_MASK, position, kind - ForwardKind.MFM))
        for position in key.positions
    ]
    return torch.cat(masks)


def mask_of(settings: MFMSection, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw the mask of one image as the settings say: bool [1, rows, cols]."""
    exact = settings.mask == "exact"
    return draw_mask(1, grid, settings.mask_ratio, generator, block=settings.mask_block_cells, exact=exact)


def rebuild(student: Segmentor, rebuilder: Rebuild, features: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Return the encoder's maps with the masked blocks of those that the decoder reads replaced by rebuilt ones."""
    read = student.decoder_inputs
    return completed(features, read, rebuilder(features[-1], [features[index] for index in read], mask))


def completed(features: list[Tensor], read: Sequence[int], rebuilt: list[Tensor]) -> list[Tensor]:
    """Return all maps, with ``rebuilt`` in the places of those that are ``read``."""
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
    hidden = hidden_places(mask, target).unsqueeze(1)
    # Selected, not multiplied with: visible places hold the encoder's own values, of any size.
    error = torch.where(hidden, rebuilt.float() - normalised, 0.0).square()
    return error.sum() / (hidden.sum() * target.shape[1]).clamp_min(1)
