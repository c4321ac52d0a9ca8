"""Colour jitter and blur against slow references, and their drawn decisions."""

from __future__ import annotations

import colorsys
import math
from typing import Literal

import numpy as np
import pytest
import torch

from mfm_dist.config.schema import SelfTrainingSection
from mfm_dist.methods.augment import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur_kernel_size,
    gaussian_blur,
    hsv_to_rgb,
    rgb_to_hsv,
    strong_augment,
)
from mfm_dist.models.preprocessing import normalise
from mfm_dist.rng import Stream, keyed_generator


@pytest.fixture
def rgb() -> torch.Tensor:
    image = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))
    image[:, 0, 0] = 0.5  # grey: no hue
    image[:, 0, 1] = 0.0  # black: no saturation either
    return image


def test_hsv_agrees_with_colorsys_pixel_by_pixel(rgb: torch.Tensor) -> None:
    hue, saturation, value = rgb_to_hsv(rgb)
    for y in range(rgb.shape[1]):
        for x in range(rgb.shape[2]):
            expected = colorsys.rgb_to_hsv(*rgb[:, y, x].tolist())
            assert (float(hue[y, x]), float(saturation[y, x]), float(value[y, x])) == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(hsv_to_rgb(hue, saturation, value), rgb, atol=1e-6)


def test_colour_changes_follow_the_old_kornia_semantics(rgb: torch.Tensor) -> None:
    assert torch.equal(adjust_brightness(rgb, 1.2), (rgb + 0.2).clamp(0, 1))  # additive
    assert torch.equal(adjust_contrast(rgb, 0.8), rgb * 0.8)  # about zero, not about the mean
    y, x = 3, 2
    h, s, v = colorsys.rgb_to_hsv(*rgb[:, y, x].tolist())
    assert adjust_saturation(rgb, 0.7)[:, y, x].tolist() == pytest.approx(colorsys.hsv_to_rgb(h, 0.7 * s, v), abs=1e-5)
    turned = colorsys.hsv_to_rgb((h + 0.15) % 1, s, v)
    assert adjust_hue(rgb, 0.15)[:, y, x].tolist() == pytest.approx(turned, abs=1e-5)


def test_blur_kernel_sizes_are_the_published_ones() -> None:
    assert [blur_kernel_size(side) for side in (512, 768, 1024)] == [51, 77, 103]


@pytest.mark.parametrize("sigma", [0.15, 0.7, 1.15])
def test_blur_equals_the_full_kernel_with_reflection(sigma: float) -> None:
    image = torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float32)

    def blur_rows(rows: np.ndarray) -> np.ndarray:
        radius = blur_kernel_size(rows.shape[-1]) // 2
        weights = np.array([math.exp(-0.5 * (k / sigma) ** 2) for k in range(-radius, radius + 1)])
        weights /= weights.sum()
        padded = np.pad(rows, ((0, 0), (0, 0), (radius, radius)), mode="reflect")
        return np.stack([(padded[..., i : i + 2 * radius + 1] * weights).sum(-1) for i in range(rows.shape[-1])], -1)

    slow = blur_rows(blur_rows(image.numpy().astype(np.float64)).swapaxes(1, 2)).swapaxes(1, 2)
    assert np.abs(gaussian_blur(image, sigma).numpy() - slow).max() < 1e-6


def test_decisions_have_the_published_chances() -> None:
    """Jitter runs with probability 0.8, although the option of the code base that coined it says 0.2."""
    settings = SelfTrainingSection()
    draws = np.stack([keyed_generator(0, Stream.STRONG_AUGMENT, block).random(2) for block in range(4000)])
    jittered, blurred = (draws < (settings.jitter_prob, settings.blur_prob)).mean(axis=0)
    assert jittered == pytest.approx(0.8, abs=0.03)
    assert blurred == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_each_decision_has_its_own_chance(scope: Literal["image", "batch"]) -> None:
    """Blur leaves a plain image as it is, jitter keeps rows of one colour apart from their neighbours."""
    plain = normalise(torch.full((2, 3, 32, 32), 90, dtype=torch.uint8))
    stripes = normalise((torch.arange(32) % 2 * 200).to(torch.uint8).view(1, 1, 32, 1).expand(2, 3, 32, 32))

    def augmented(image: torch.Tensor, jitter: float, blur: float) -> torch.Tensor:
        settings = SelfTrainingSection(jitter_prob=jitter, blur_prob=blur)
        return strong_augment(image, settings, keyed_generator(0, Stream.STRONG_AUGMENT, 5), scope)

    assert not torch.allclose(augmented(plain, 1, 0), plain, atol=1e-2)
    assert len(augmented(stripes, 1, 0)[0, 0, :, 0].unique()) == 2
    assert torch.allclose(augmented(plain, 0, 1), plain, atol=1e-5)
    assert not torch.allclose(augmented(stripes, 0, 1), stripes, atol=1e-2)


def test_augmentation_is_keyed_and_leaves_its_input_alone() -> None:
    image = normalise(torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(2)).to(torch.uint8))
    before = image.clone()
    always = SelfTrainingSection(jitter_prob=1.0, blur_prob=1.0)
    first, again, other = (
        strong_augment(image, always, keyed_generator(0, Stream.STRONG_AUGMENT, block)) for block in (5, 5, 6)
    )
    assert torch.equal(image, before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    never = SelfTrainingSection(jitter_prob=0.0, blur_prob=0.0)
    assert torch.equal(strong_augment(image, never, keyed_generator(0, Stream.STRONG_AUGMENT, 5)), image)


def test_normalise_uses_the_imagenet_constants() -> None:
    image = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(124 - 123.675) / 58.395, (116 - 116.28) / 57.12, (104 - 103.53) / 57.375]
    assert normalise(image).flatten().tolist() == pytest.approx(expected, abs=1e-6)
