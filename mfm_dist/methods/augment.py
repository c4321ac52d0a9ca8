"""The strong augmentation of mixed images: colour jitter and Gaussian blur, with keyed parameters.

Parameters are drawn on the host from a keyed generator, so no result is waited for and every world size draws the
same. Colour semantics are those of the kornia release that the published code of DAFormer, HRDA and MIC pins
(0.5.8), which differ from torchvision's: brightness adds, contrast multiplies, saturation and hue act in HSV.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_dist.config.schema import SelfTrainingSection
from mfm_dist.methods.fast_augment import ColourFactors, blur_batch, blur_weights, colour_maps, jitter_batch
from mfm_dist.models.preprocessing import channel_constants

Scope = Literal["image", "batch"]

BLUR_SIGMA = (0.15, 1.15)
"""Range of the blur's standard deviation in pixels (DACS)."""


class Shipped(NamedTuple):
    """What lies on the device already, so that augmenting waits for no copy."""

    drawn: Mapping[str, Tensor]
    """Of ``augmentation_tensors``."""
    mean: Tensor
    """[1, 3, 1, 1], of RGB in 0..255."""
    std: Tensor
    """[1, 3, 1, 1], likewise."""


def strong_augment(
    image: Tensor,
    settings: SelfTrainingSection,
    generator: np.random.Generator,
    scope: Scope = "image",
    *,
    shipped: Shipped | None = None,
) -> Tensor:
    """Jitter and blur a normalised batch [B, 3, H, W] into a new tensor.

    Whether to jitter and whether to blur is one draw for the whole micro-batch, the factors are drawn for each image.

    Args:
        scope: what the order of the colour changes and the blur's sigma are drawn for: each image (the mixed images
            of DACS and DAFormer) or the batch (the masked images of MIC).
        shipped: drawn by an equal generator; None: drawn and copied to the device here.
    """
    drawn = _draw_augmentation(settings, generator, len(image), scope)
    if shipped is None:
        tensors = {name: value.to(image.device) for name, value in _tensors(settings, drawn).items()}
        shipped = Shipped(tensors, *channel_constants(image.device))
    mean, std = shipped.mean, shipped.std
    if drawn.factors is not None:
        if settings.augment_form == "fast":
            image = jitter_batch(image, shipped.drawn["colours"], mean, std)
        else:
            rgb = (image * std + mean) / 255.0
            rgb = torch.stack([_jitter_one(one, factors) for one, factors in zip(rgb, drawn.factors, strict=True)])
            image = (rgb * 255.0 - mean) / std
    if drawn.sigmas is not None:
        if settings.augment_form == "fast":
            return blur_batch(image, shipped.drawn["blur"])
        image = torch.stack([gaussian_blur(one, sigma) for one, sigma in zip(image, drawn.sigmas, strict=True)])
    return image


def augmentation_tensors(
    settings: SelfTrainingSection, generator: np.random.Generator, count: int, scope: Scope = "image"
) -> dict[str, Tensor]:
    """Draw, on the CPU, the tensors that ``strong_augment`` needs on the device for ``count`` images."""
    return _tensors(settings, _draw_augmentation(settings, generator, count, scope))


class _Drawn(NamedTuple):
    """What is done to a micro-batch."""

    factors: list[ColourFactors] | None
    """Of each image; None: no jitter."""
    sigmas: np.ndarray | None
    """Of each image, in pixels; None: no blur."""


def _draw_augmentation(
    settings: SelfTrainingSection, generator: np.random.Generator, count: int, scope: Scope
) -> _Drawn:
    factors = sigmas = None
    jitters, blurs = generator.random(2) < (settings.jitter_prob, settings.blur_prob)
    if jitters:
        order = generator.permutation(4) if scope == "batch" else None
        factors = [_draw_factors(settings.jitter_strength, generator, order) for _ in range(count)]
    if blurs:
        sigmas = generator.uniform(*BLUR_SIGMA, size=1 if scope == "batch" else count)
        sigmas = np.broadcast_to(sigmas, count)
    return _Drawn(factors, sigmas)


def _tensors(settings: SelfTrainingSection, drawn: _Drawn) -> dict[str, Tensor]:
    """Return what the fast form computes with. The published one takes numbers, which need no copy."""
    tensors = {}
    if settings.augment_form == "fast":
        if drawn.factors is not None:
            tensors["colours"] = colour_maps(drawn.factors)
        if drawn.sigmas is not None:
            tensors["blur"] = blur_weights(drawn.sigmas)
    return tensors


def _draw_factors(strength: float, generator: np.random.Generator, order: np.ndarray | None) -> ColourFactors:
    """Draw what changes one image, in this order, or else in a drawn one."""
    brightness, contrast, saturation = generator.uniform(1 - strength, 1 + strength, size=3)
    turn = generator.uniform(-strength, strength)
    drawn = generator.permutation(4) if order is None else order
    return ColourFactors(brightness, contrast, saturation, turn, tuple(drawn.tolist()))


def _jitter_one(rgb: Tensor, factors: ColourFactors) -> Tensor:
    """Make the four colour changes on one image [3, H, W] in 0..1."""
    changes = (
        lambda x: adjust_brightness(x, factors.brightness),
        lambda x: adjust_contrast(x, factors.contrast),
        lambda x: adjust_saturation(x, factors.saturation),
        lambda x: adjust_hue(x, factors.turn),
    )
    for kind in factors.order:
        rgb = changes[kind](rgb)
    return rgb


def adjust_brightness(rgb: Tensor, factor: float) -> Tensor:
    """Add ``factor - 1`` to [..., 3, H, W] in 0..1 and clamp (kornia 0.5.8: additive)."""
    return (rgb + (factor - 1.0)).clamp(0, 1)


def adjust_contrast(rgb: Tensor, factor: float) -> Tensor:
    """Multiply [..., 3, H, W] in 0..1 by ``factor`` and clamp (kornia 0.5.8: not around the mean)."""
    return (rgb * factor).clamp(0, 1)


def adjust_saturation(rgb: Tensor, factor: float) -> Tensor:
    """Multiply S of HSV by ``factor``, clamped to 0..1."""
    hue, saturation, value = rgb_to_hsv(rgb)
    return hsv_to_rgb(hue, (saturation * factor).clamp(0, 1), value)


def adjust_hue(rgb: Tensor, turn: float) -> Tensor:
    """Turn H of HSV by ``turn`` of a full circle."""
    hue, saturation, value = rgb_to_hsv(rgb)
    return hsv_to_rgb((hue + turn) % 1.0, saturation, value)


def rgb_to_hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn [..., 3, H, W] in 0..1 into hue (in turns), saturation and value, each [..., H, W]."""
    value, brightest = rgb.max(dim=-3)
    span = value - rgb.amin(dim=-3)
    differences = rgb.roll(-1, -3) - rgb.roll(-2, -3)  # green - blue, blue - red, red - green
    sectors = differences / torch.where(span > 0, span, 1.0).unsqueeze(-3) + _channel_map(0.0, 6.0, rgb)
    hue = (sectors % 6.0).gather(-3, brightest.unsqueeze(-3)).squeeze(-3) / 6.0
    saturation = torch.where(value > 0, span / torch.where(value > 0, value, 1.0), 0.0)
    return torch.where(span > 0, hue, 0.0), saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Invert ``rgb_to_hsv``: three maps [..., H, W] to [..., 3, H, W]."""
    sectors = (_channel_map(5.0, -1.0, hue) + hue.unsqueeze(-3) * 6.0) % 6.0
    depth = torch.minimum(sectors, 4.0 - sectors).clamp(0, 1)
    return value.unsqueeze(-3) * (1.0 - saturation.unsqueeze(-3) * depth)


def _channel_map(first: float, end: float, like: Tensor) -> Tensor:
    """Return where red, green and blue begin on the circle of six sectors, two apart: [3, 1, 1]."""
    return torch.arange(first, end, math.copysign(2.0, end - first), device=like.device).view(3, 1, 1)


def blur_kernel_size(side: int) -> int:
    """Return an odd kernel size, a tenth of a side in pixels (DACS: 51 for 512, 77 for 768, 103 for 1024)."""
    tenth = math.ceil(0.1 * side)
    return math.floor(tenth - 0.5 + tenth % 2)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur one image [3, H, W] by a separable Gaussian with reflected borders."""
    blurred = image.unsqueeze(0)
    for side_index, side in ((-2, image.shape[-2]), (-1, image.shape[-1])):
        size = blur_kernel_size(side)
        # Beyond 8 sigma a weight is below 1e-14: cutting the published size there changes no bit of a float32 sum.
        radius = min(size // 2, math.ceil(8 * sigma))
        offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float32)
        weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
        weights = (weights / weights.sum()).to(image.dtype)
        padding = (radius, radius, 0, 0) if side_index == -1 else (0, 0, radius, radius)
        shape = (1, -1) if side_index == -1 else (-1, 1)
        kernel = weights.view(1, 1, *shape).expand(3, 1, *shape)
        with torch.autocast(image.device.type, enabled=False):
            blurred = F.conv2d(F.pad(blurred, padding, mode="reflect"), kernel, groups=3)
    return blurred.squeeze(0)
