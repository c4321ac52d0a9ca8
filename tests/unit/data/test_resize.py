"""Resizing before the crop, against resizing everything and cutting afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mfm_dist.data.geometry import resize_box, resize_label
from mfm_dist.data.transforms import Resize, source_crop, target_crop
from mfm_dist.rng import Stream, keyed_generator


@pytest.mark.parametrize(
    ("stored", "box", "expected"),
    [
        ((1052, 1914), (720, 1280), (704, 1280)),  # GTA (UDA_FACTS of mmcv's rule)
        ((1052, 1914), (1440, 2560), (1407, 2560)),
        ((1046, 1914), (720, 1280), (700, 1280)),
        ((760, 1280), (760, 1280), (760, 1280)),  # SYNTHIA
        ((1024, 2048), (512, 1024), (512, 1024)),  # Cityscapes
        ((1080, 1920), (540, 960), (540, 960)),  # ACDC
        ((1024, 2048), None, (1024, 2048)),
    ],
)
def test_published_sizes(stored: tuple[int, int], box: tuple[int, int] | None, expected: tuple[int, int]) -> None:
    assert Resize(box=box).size(stored, np.random.default_rng(0)) == expected


def picture(height: int, width: int) -> torch.Tensor:
    """uint8 [3, H, W], as a decoder leaves it."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return pixels.permute(2, 0, 1)


@pytest.mark.parametrize("size", [(70, 96), (61, 89), (140, 151), (33, 200), (70, 50)])
def test_a_resized_box_is_the_box_of_the_resized_image(size: tuple[int, int]) -> None:
    image = picture(70, 96)
    whole = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]
    for top, left in ((0, 0), (size[0] - 20, size[1] - 30), (7, 11)):
        box = (slice(top, top + 20), slice(left, left + 30))
        found = resize_box(image, size, box).float()
        assert found.shape == whole[:, box[0], box[1]].shape
        assert (found - whole[:, box[0], box[1]]).abs().max() <= 0.5 + 1e-3  # rounding to whole numbers


def test_labels_take_the_nearest_pixel_by_the_floor_rule() -> None:
    label = torch.randint(0, 19, (105, 191), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = resize_label(label, (70, 128))
    rows, columns = np.arange(70) * 105 // 70, np.floor(np.arange(128) * (191 / 128)).astype(int)
    assert np.array_equal(found.numpy(), label.numpy()[rows][:, columns])


def test_image_and_label_of_a_crop_stay_aligned() -> None:
    label = (torch.arange(60)[:, None] // 7 + torch.arange(80)[None] // 9).to(torch.uint8) % 19
    image = label.expand(3, -1, -1) * 10
    resize = Resize(box=(45, 61), scale=(0.8, 1.6))
    for position in range(40):
        found = source_crop(
            image.contiguous(), label, (24, 32), keyed_generator(0, Stream.SOURCE_CROP, position), resize=resize
        )
        assert found[0].shape == (3, 24, 32)
        assert found[1].shape == (24, 32)
        inside = found[1] != 255
        differs = ((found[0][0].float() / 10 - found[1].float()).abs() > 1.01)[inside]
        assert differs.float().mean() < 0.35  # nearest and bilinear part at the borders of 8-pixel blocks


def test_the_scale_is_drawn_for_each_position_and_changes_nothing_when_it_is_one() -> None:
    sizes = {Resize(scale=(0.5, 2.0)).size((64, 64), keyed_generator(0, 3, position)) for position in range(20)}
    assert len(sizes) > 15
    image = picture(40, 60)
    one, other = (
        target_crop(image, (20, 20), keyed_generator(0, 4, 9), resize=resize)[0]
        for resize in (Resize(), Resize(box=(40, 60)))
    )
    assert torch.equal(one, other)


def test_margins_follow_resize_crop_and_flip_and_padding_is_not_valid() -> None:
    """A picture whose pixels say whether they lie inside the margins."""
    inside = torch.zeros(40, 80, dtype=torch.uint8)
    inside[4:30, 6:73] = 255
    image = inside.expand(3, -1, -1).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    flips = set()
    for position in range(30):
        draws = keyed_generator(0, Stream.TARGET_CROP, position)
        found, valid = target_crop(image, (24, 100), draws, resize=Resize(box=(20, 40)), margins=(4, 10, 6, 7))
        assert not valid[20:].any()
        assert not valid[:, 40:].any()
        assert torch.equal(found[0] > 127, valid | (found[0] == 124) & (found[0] > 127))
        assert 0.9 < valid.sum() / (13 * 33.5) < 1.1
        flips.add(bool(valid[:, 1].any()))
    assert flips == {False}
    stored, valid = target_crop(image, (40, 80), keyed_generator(0, 4, 0), margins=(4, 10, 6, 7))
    assert torch.equal(valid, stored[0] == 255)
