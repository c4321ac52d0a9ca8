"""The folded jitter and the batched blur against the published ones, whose draws they share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mfm_dist.config.schema import SelfTrainingSection
from mfm_dist.methods.augment import gaussian_blur, strong_augment
from mfm_dist.methods.fast_augment import ColourFactors, blur_batch, blur_weights, colour_map
from mfm_dist.models.preprocessing import IMAGE_STD, normalise
from mfm_dist.rng import Stream, keyed_generator
from mfm_dist.scenes import Gap, render_scene

ALWAYS = SelfTrainingSection(jitter_prob=1.0, blur_prob=0.0)
STD = torch.tensor(IMAGE_STD).view(1, 3, 1, 1)


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    """Normalised pictures [4, 3, 64, 128] of both domains."""
    pictures = [
        render_scene(seed=0, domain=domain, split="train", index=index, height=64, width=128, gap=Gap()).image
        for domain in ("game", "camera")
        for index in range(2)
    ]
    return normalise(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))


def grey_levels(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return ((one - other) * STD).abs()


def test_one_change_at_a_time_is_what_its_name_says() -> None:
    rgb = np.array([0.5, 0.3, 0.2])
    for factors, expected in (
        (ColourFactors(1.1, 1, 1, 0, (0, 1, 2, 3)), rgb + 0.1),
        (ColourFactors(1, 0.8, 1, 0, (0, 1, 2, 3)), rgb * 0.8),
        (ColourFactors(1.1, 0.8, 1, 0, (1, 0, 2, 3)), rgb * 0.8 + 0.1),  # in the drawn order
        (ColourFactors(1.1, 0.8, 1, 0, (0, 1, 2, 3)), (rgb + 0.1) * 0.8),
    ):
        matrix, offset = colour_map(factors)
        assert matrix @ rgb + offset == pytest.approx(expected, abs=1e-6)
    matrix, offset = colour_map(ColourFactors(1, 1, 0.0, 0, (0, 1, 2, 3)))
    assert np.ptp(matrix @ rgb + offset) == pytest.approx(0, abs=1e-3)  # without colour
    grey = colour_map(ColourFactors(1, 1, 1.2, 0.15, (2, 3, 0, 1)))[0] @ np.full(3, 0.4)
    assert grey == pytest.approx(0.4, abs=1e-3)  # grey stays grey


def test_hue_turns_the_way_of_the_published_form() -> None:
    red = np.array([0.8, 0.2, 0.2])
    turned = colour_map(ColourFactors(1, 1, 1, 1 / 6, (0, 1, 2, 3)))[0] @ red
    assert turned[1] > turned[2]  # towards yellow
    back = colour_map(ColourFactors(1, 1, 1, -1 / 6, (0, 1, 2, 3)))[0] @ red
    assert back[2] > back[1]  # towards magenta


def test_pictures_are_near_the_published_ones(scenes: torch.Tensor) -> None:
    """On the scenes, with the published strength: 6 grey levels on average, where the jitter itself changes 29."""
    apart, changed = [], []
    for block in range(20):
        published, fast = (
            strong_augment(scenes, replace(ALWAYS, augment_form=form), keyed_generator(0, Stream.STRONG_AUGMENT, block))
            for form in ("published", "fast")
        )
        apart.append(grey_levels(published, fast).mean())
        changed.append(grey_levels(published, scenes).mean())
    assert torch.stack(apart).mean() < 7
    assert torch.stack(apart).mean() < torch.stack(changed).mean() / 4


def test_colours_stay_in_their_range(scenes: torch.Tensor) -> None:
    settings = replace(ALWAYS, augment_form="fast", jitter_strength=0.9)
    found = strong_augment(scenes, settings, keyed_generator(0, Stream.STRONG_AUGMENT, 0))
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    levels = found * STD + mean
    assert levels.min() >= -1e-3
    assert levels.max() <= 255.001


def test_every_image_has_its_own_draws_as_in_the_published_form(scenes: torch.Tensor) -> None:
    settings = replace(ALWAYS, augment_form="fast")
    same = scenes[:1].expand(3, -1, -1, -1)
    found = strong_augment(same, settings, keyed_generator(0, Stream.STRONG_AUGMENT, 0))
    assert not torch.allclose(found[0], found[1])
    alone = strong_augment(same[:1], settings, keyed_generator(0, Stream.STRONG_AUGMENT, 0))
    assert torch.allclose(found[:1], alone, atol=1e-5)


def test_the_batched_blur_is_the_blur_of_each_image(scenes: torch.Tensor) -> None:
    sigmas = np.array([0.15, 0.6, 1.0, 1.15])
    found = blur_batch(scenes, blur_weights(sigmas))
    expected = torch.stack([gaussian_blur(one, sigma) for one, sigma in zip(scenes, sigmas, strict=True)])
    assert grey_levels(found, expected).max() < 0.5
