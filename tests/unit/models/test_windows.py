"""Windows that slide over an image, against the published numbers and a slow average."""

from __future__ import annotations

import pytest
import torch

from mfm_dist.models.windows import DrawnWindow, Window, average_windows, sliding_boxes


def spans(length: int, window: int, step: int) -> list[tuple[int, int]]:
    return [(box.left, box.left + box.width) for box in sliding_boxes((1, length), (1, window), (1, step))]


def test_windows_are_where_the_published_rule_puts_them() -> None:
    assert spans(2048, 1024, 512) == [(0, 1024), (512, 1536), (1024, 2048)]
    assert spans(1080, 1024, 512) == [(0, 1024), (56, 1080)]
    assert spans(1024, 1024, 512) == [(0, 1024)]
    assert spans(700, 1024, 512) == [(0, 700)]
    assert len(sliding_boxes((1024, 1024), (512, 512), (256, 256))) == 9
    assert len(sliding_boxes((1024, 2048), (1024, 1024), (512, 512))) == 3


@pytest.mark.parametrize("size", [(7, 9), (4, 4), (3, 11), (8, 5)])
def test_the_average_is_that_of_all_windows_over_a_place(size: tuple[int, int]) -> None:
    boxes = sliding_boxes(size, (4, 4), (2, 2))
    generator = torch.Generator().manual_seed(0)
    patches = [torch.randn(2, 3, box.height, box.width, generator=generator) for box in boxes]
    averaged = average_windows(patches, boxes, size)
    for y in range(size[0]):
        for x in range(size[1]):
            over = [
                patch[..., y - box.top, x - box.left]
                for patch, box in zip(patches, boxes, strict=True)
                if box.top <= y < box.top + box.height and box.left <= x < box.left + box.width
            ]
            assert over
            assert torch.allclose(averaged[..., y, x], torch.stack(over).mean(0), atol=1e-6)


def test_what_is_cropped_and_pasted_is_the_image_inside_and_zero_outside() -> None:
    image, box = torch.randn(2, 3, 8, 10), Window(2, 4, 4, 5)
    pasted = box.paste(box.crop(image), (8, 10))
    inside = torch.zeros(8, 10, dtype=torch.bool)
    inside[2:6, 4:9] = True
    assert torch.equal(pasted, torch.where(inside, image, torch.zeros(())))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_window_whose_place_lies_on_the_device_is_the_window(layout: torch.memory_format) -> None:
    """Values, gradients and layout in memory, which decides how convolutions round."""
    window = Window(2, 4, 4, 6)
    drawn = DrawnWindow(**window.indices())
    found = []
    for box in (window, drawn):
        image = torch.arange(480.0).view(2, 3, 8, 10).to(memory_format=layout).requires_grad_()
        cropped = box.crop(image)
        pasted = box.paste(cropped * cropped, (8, 10))
        pasted.square().sum().backward()
        small = box.scaled_down(2)
        found.append((cropped.contiguous(memory_format=layout), pasted, image.grad, small.crop(image)))
        assert pasted.is_contiguous(memory_format=layout)
        assert torch.equal(box.crop(torch.arange(80).view(1, 8, 10)), torch.arange(80).view(1, 8, 10)[:, 2:6, 4:10])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert drawn.crop(image).is_contiguous(memory_format=layout)


def test_a_box_off_the_coarser_grid_is_our_own_mistake() -> None:
    assert Window(16, 8, 32, 32).scaled_down(8) == Window(2, 1, 4, 4)
    with pytest.raises(AssertionError):
        Window(4, 8, 32, 32).scaled_down(8)
