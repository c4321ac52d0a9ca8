"""Losses, pseudo-targets, ClassMix and the EMA schedule against slow references and published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.methods.losses import cross_entropy
from mfm_dist.methods.self_training import draw_class_masks, mix, pseudo_target, pseudo_weight, without_margins
from mfm_dist.schedules import ema_decay_at


def slow_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None) -> float:
    """Pixel by pixel, for logits already at the label's size."""
    batch, _, height, width = logits.shape
    total = 0.0
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                true = int(label[b, y, x])
                if true == IGNORE_INDEX:
                    continue
                scores = logits[b, :, y, x].double()
                loss = math.log(float(scores.exp().sum())) - float(scores[true])
                total += loss * (1.0 if weight is None else float(weight[b, y, x]))
    return total / (batch * height * width)


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_averages_over_all_pixels(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, 6, generator=generator)
    label = torch.randint(0, 5, (2, 4, 6), generator=generator)
    label[0, :2] = IGNORE_INDEX
    weight = torch.rand(2, 4, 6, generator=generator) if weighted else None
    assert float(cross_entropy(logits, label, weight)) == pytest.approx(slow_cross_entropy(logits, label, weight))


def test_cross_entropy_of_twelve_ignored_pixels_in_sixteen_is_a_quarter_of_torch() -> None:
    """UDA_FACTS 1: the mean is not taken over the valid pixels."""
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    label = torch.full((1, 4, 4), IGNORE_INDEX)
    label[0, 0] = torch.tensor([0, 1, 2, 1])
    of_torch = torch.nn.functional.cross_entropy(logits, label, ignore_index=IGNORE_INDEX)
    assert float(cross_entropy(logits, label)) == pytest.approx(float(of_torch) / 4, rel=1e-6)


def test_cross_entropy_enlarges_logits_and_is_zero_without_labels() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 8, 8), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_cross_entropy_is_computed_in_fp32() -> None:
    logits = torch.randn(1, 3, 4, 4).bfloat16()
    assert cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.long)).dtype == torch.float32


def test_pseudo_weight_is_the_confident_share_of_all_pixels_zero_in_margins() -> None:
    logits = torch.zeros(2, 3, 4, 4)
    logits[0, 1, :2] = 10.0  # 8 of 32 pixels are sure of class 1
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[:, -1] = False
    target = pseudo_target(logits, valid, threshold=0.968)
    assert target.label[0, :2].eq(1).all()
    assert torch.equal(target.weight[:, :-1], torch.full((2, 3, 4), 8 / 32))
    assert not target.weight[:, -1].any()


@pytest.mark.parametrize(("top", "bottom"), [(0, 0), (2, 3), (0, 1), (3, 0)])
def test_margins_are_rows_of_every_crop_and_the_share_is_taken_over_all_pixels(top: int, bottom: int) -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(2, 8, 4, generator=generator)
    padding = torch.rand(2, 8, 4, generator=generator) < 0.9
    weight = pseudo_weight(confidence, without_margins(padding, top, bottom), threshold=0.5)
    share = sum(float(value) >= 0.5 for value in confidence.flatten()) / confidence.numel()
    for b in range(2):
        for y in range(8):
            for x in range(4):
                counts = top <= y < 8 - bottom and bool(padding[b, y, x])
                assert float(weight[b, y, x]) == pytest.approx(share if counts else 0.0)


def test_pseudo_threshold_is_not_blurred_by_bfloat16() -> None:
    """0.966 rounds to 0.968 in bfloat16: the softmax must not run there."""
    probability = 0.966
    logits = torch.tensor([math.log(probability / (1 - probability)), 0.0]).view(1, 2, 1, 1)
    valid = torch.ones(1, 1, 1, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(pseudo_target(logits, valid, 0.968).weight) == 0.0


def test_ema_schedule_has_the_published_values() -> None:
    assert ema_decay_at(1, 0.999) == 0.5
    assert ema_decay_at(99, 0.999) == pytest.approx(0.99)
    assert ema_decay_at(999, 0.999) == pytest.approx(0.999)
    assert ema_decay_at(5000, 0.999) == 0.999


def test_early_ema_is_the_plain_mean_of_all_students() -> None:
    students = np.random.default_rng(0).normal(size=20)
    teacher = students[0]
    for update in range(1, 20):
        decay = ema_decay_at(update, 0.99)
        teacher = decay * teacher + (1 - decay) * students[update]
    assert teacher == pytest.approx(students.mean())


@pytest.mark.parametrize("count", range(1, 21))
def test_half_of_the_classes_rounded_up_are_drawn(count: int) -> None:
    label = torch.arange(count, dtype=torch.uint8).view(1, 1, count)
    ranks = torch.rand(1, 256, generator=torch.Generator().manual_seed(count))
    drawn = draw_class_masks(label, ranks, "batch")
    assert int(drawn.sum()) == math.ceil(count / 2)
    # Slow reference: sort the candidates by key and take the first half.
    expected = sorted(range(count), key=lambda c: float(ranks[0, c]))[: math.ceil(count / 2)]
    assert {c for c in range(count) if drawn[0, 0, c]} == set(expected)


def test_classes_come_from_the_micro_batch_or_from_the_image() -> None:
    label = torch.tensor([[[0, 1]], [[2, IGNORE_INDEX]]], dtype=torch.uint8)
    ranks = torch.ones(2, 256)
    ranks[:, [0, 1]] = 0.0  # the first two classes are drawn of four candidates, 255 among them
    by_batch = draw_class_masks(label, ranks, "batch")
    assert by_batch[0].all()
    assert not by_batch[1].any()  # both drawn classes are absent from the second image
    ranks[1, IGNORE_INDEX] = 0.0
    by_image = draw_class_masks(label, ranks, "image")
    assert by_image[0].sum() == 1
    assert by_image[1].tolist() == [[False, True]]  # 255 is a class like any other


def test_mix_is_a_plain_choice_by_pixel() -> None:
    mask = torch.tensor([[[True, False], [False, True]]])
    pasted, background = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    assert torch.equal(mix(mask, pasted, background), mask.float()[:, None].expand(1, 3, 2, 2))
    assert torch.equal(mix(mask, pasted[:, 0], background[:, 0]), mask.float())
