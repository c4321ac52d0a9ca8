"""Crops against slow definitions: where they lie, what moves together, and how small images are padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.transforms import CROP_TRIES, PAD_COLOUR, central_crop, source_crop, target_crop


def rng(index: int) -> np.random.Generator:
    return np.random.default_rng(index)


def coordinates(height: int, width: int) -> Tensor:
    """uint8 [3, H, W] whose pixel says where it came from: row, column, and 7."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None].expand(height, width)
    return torch.stack([rows, columns, torch.full_like(rows, 7)])


def is_varied_slow(label: Tensor) -> bool:
    """The rule word for word, on the strided label."""
    valid = [int(value) for value in label[::4, ::4].flatten() if value != IGNORE_INDEX]
    shares = [valid.count(value) / len(valid) for value in set(valid)]
    return len(shares) > 1 and max(shares) < 0.75


def test_target_crop_is_a_box_of_the_image_perhaps_mirrored() -> None:
    image = coordinates(40, 60)
    mirrored = []
    for index in range(60):
        crop, valid = target_crop(image, (16, 24), rng(index))
        assert crop.shape == (3, 16, 24)
        assert crop.dtype == torch.uint8
        assert valid.shape == (16, 24)
        assert valid.all()
        mirrored.append(bool(crop[1, 0, 0] > crop[1, 0, -1]))
        straight = crop.flip(-1) if mirrored[-1] else crop
        top, left = int(straight[0, 0, 0]), int(straight[1, 0, 0])
        assert torch.equal(straight, image[:, top : top + 16, left : left + 24])
    assert 15 < sum(mirrored) < 45


def test_every_box_can_be_drawn() -> None:
    image = coordinates(5, 6)
    corners = set()
    for index in range(200):
        crop, _ = target_crop(image, (4, 4), rng(index))
        corners.add((int(crop[0].min()), int(crop[1].min())))
    assert corners == {(top, left) for top in range(2) for left in range(3)}


def test_equal_keys_give_equal_crops() -> None:
    image, label = coordinates(40, 60), coordinates(40, 60)[1] % 19
    for index in range(5):
        first, second = (source_crop(image, label, (16, 16), rng(index)) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_image_and_label_are_cropped_and_mirrored_together() -> None:
    image = coordinates(40, 60)
    label = image[0] % 10 + image[1] % 9
    for index in range(30):
        crop, cropped_label = source_crop(image, label, (16, 24), rng(index))
        assert torch.equal(cropped_label, crop[0] % 10 + crop[1] % 9)


def test_a_source_crop_avoids_uniform_places_where_it_can() -> None:
    label = torch.zeros(64, 256, dtype=torch.uint8)
    label[:, 128:] = torch.arange(128, dtype=torch.uint8) // 8 % 19  # the right half has many classes
    image = coordinates(64, 256)
    kept = [source_crop(image, label, (32, 32), rng(index))[1] for index in range(100)]
    plain = [target_crop(label.expand(3, -1, -1), (32, 32), rng(index))[0][0] for index in range(100)]
    assert all(is_varied_slow(crop) for crop in kept)
    assert sum(is_varied_slow(crop) for crop in plain) < 80


def test_the_first_varied_box_is_taken() -> None:
    """Against the published loop written plainly: test, draw again, at most 10 times, the last box unchecked."""
    generator = np.random.default_rng(5)
    label = torch.from_numpy(generator.choice([0, 1, IGNORE_INDEX], p=[0.8, 0.15, 0.05], size=(8, 8)).astype(np.uint8))
    label = label.repeat_interleave(8, 0).repeat_interleave(8, 1)
    image = coordinates(64, 64)
    for index in range(50):
        draws = rng(index)

        def box(draws: np.random.Generator = draws) -> tuple[int, int]:
            return int(draws.integers(64 - 24 + 1)), int(draws.integers(64 - 24 + 1))

        top, left = box()
        for _ in range(CROP_TRIES):
            if is_varied_slow(label[top : top + 24, left : left + 24]):
                break
            top, left = box()
        expected = image[:, top : top + 24, left : left + 24]
        expected = expected.flip(-1) if draws.random() < 0.5 else expected
        assert torch.equal(source_crop(image, label, (24, 24), rng(index))[0], expected)


@pytest.mark.parametrize("value", [3, IGNORE_INDEX])
def test_a_uniform_or_unlabelled_image_still_gives_a_crop(value: int) -> None:
    label = torch.full((40, 60), value, dtype=torch.uint8)
    _, crop = source_crop(coordinates(40, 60), label, (16, 16), rng(0))
    assert crop.shape == (16, 16)
    assert (crop == value).all()


@pytest.mark.parametrize(("height", "width"), [(10, 60), (40, 10), (10, 10)])
def test_a_small_image_is_padded_with_the_mean_and_marked_invalid(height: int, width: int) -> None:
    image = coordinates(height, width)
    label = image[1] % 19
    inside = (slice(0, min(height, 16)), slice(0, min(width, 24)))
    outside = torch.ones(16, 24, dtype=torch.bool)
    outside[inside] = False
    crop, valid = target_crop(image, (16, 24), rng(1))
    source, source_label = source_crop(image, label, (16, 24), rng(1))
    assert torch.equal(valid, ~outside)
    for padded in (crop, source):
        assert padded.shape == (3, 16, 24)
        assert (padded[:, outside] == torch.tensor(PAD_COLOUR)[:, None]).all()
        assert (padded[2][inside] == 7).all()
    assert (source_label[outside] == IGNORE_INDEX).all()
    assert torch.equal(source_label[inside], source[1][inside] % 19)
    middle, middle_label, middle_valid = central_crop(image, label, (16, 24))
    assert torch.equal(middle_valid, ~outside)
    assert (middle[:, outside] == torch.tensor(PAD_COLOUR)[:, None]).all()
    assert (middle_label[outside] == IGNORE_INDEX).all()
    assert torch.equal(middle_label[inside], middle[1][inside] % 19)


def test_a_central_crop_has_the_middle_of_image_label_and_margins() -> None:
    image = coordinates(40, 60)
    crop, label, valid = central_crop(image, image[1], (16, 24), margins=(13, 0, 0, 20))
    assert torch.equal(crop, image[:, 12:28, 18:42])
    assert torch.equal(label, image[1, 12:28, 18:42])
    expected = torch.ones(16, 24, dtype=torch.bool)
    expected[0], expected[:, 22:] = False, False  # row 12 and columns from 40 on
    assert torch.equal(valid, expected)
    halved, halved_label, _ = central_crop(image, image[1], (16, 24), box=(20, 30))
    assert torch.equal(halved_label, image[1, ::2, ::2][2:18, 3:27])
    assert (halved[1].int() - halved_label.int()).abs().max() <= 1


def test_padding_is_zero_after_normalisation() -> None:
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    assert ((torch.tensor(PAD_COLOUR) - mean) / std).abs().max() < 0.01
