"""Scores against pixel sets and erosions spelled out; what is summed is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.inference.metrics import (
    Counts,
    boundary_iou_percent,
    boundary_width,
    confusion_matrix,
    iou_percent,
    mean_iou_percent,
    means_over,
)
from tests.helpers.classes import CLASSES


def test_confusion_and_iou_against_pixel_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (3, 7, 9), generator=generator)
    prediction = torch.randint(0, 5, (3, 7, 9), generator=generator)
    label[label == 3] = 2  # class 3 is predicted but never labelled
    prediction[prediction == 4] = 0
    label[label == 4] = 0  # class 4 occurs nowhere
    label[0, 0] = IGNORE_INDEX
    scores = iou_percent(confusion_matrix(label, prediction, 5))
    counts = label.flatten() != IGNORE_INDEX
    for c in range(4):
        labelled = {i for i, (v, k) in enumerate(zip(label.flatten(), counts, strict=True)) if k and v == c}
        predicted = {i for i, (v, k) in enumerate(zip(prediction.flatten(), counts, strict=True)) if k and v == c}
        assert scores[c] == pytest.approx(100 * len(labelled & predicted) / len(labelled | predicted))
    assert scores[3] == 0.0
    assert math.isnan(scores[4])
    assert mean_iou_percent(confusion_matrix(label, prediction, 5)) == pytest.approx(sum(scores[:4]) / 4)


@pytest.mark.parametrize("num_classes", [1, 19, 180, 181, 255])
def test_counts_of_any_number_of_classes_in_any_type(num_classes: int) -> None:
    """Pairs of 181 classes and more do not fit 16 bits."""
    generator = torch.Generator().manual_seed(0)
    label, prediction = torch.randint(0, num_classes, (2, 40, 50), generator=generator)
    label[:, ::7] = IGNORE_INDEX
    confusion = [[0] * num_classes for _ in range(num_classes)]
    for true, predicted in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if true != IGNORE_INDEX:
            confusion[true][predicted] += 1
    assert confusion_matrix(label, prediction, num_classes).tolist() == confusion
    assert confusion_matrix(label.byte(), prediction.byte(), num_classes).tolist() == confusion


def eroded(mask: list[list[bool]]) -> list[list[bool]]:
    """One erosion with a square of 3 x 3 pixels; what lies outside of the image is not of the mask."""
    height, width = len(mask), len(mask[0])

    def inside(row: int, column: int) -> bool:
        return 0 <= row < height and 0 <= column < width and mask[row][column]

    steps = (-1, 0, 1)
    return [
        [all(inside(row + down, column + right) for down in steps for right in steps) for column in range(width)]
        for row in range(height)
    ]


def boundary(mask: list[list[bool]], width: int) -> set[tuple[int, int]]:
    """Pixels of a mask that ``width`` erosions take away, as in the authors' ``mask_to_boundary``."""
    kept = mask
    for _ in range(width):
        kept = eroded(kept)
    return {
        (row, column)
        for row, line in enumerate(mask)
        for column, of_mask in enumerate(line)
        if of_mask and not kept[row][column]
    }


def blobs(seed: int, size: tuple[int, int], cell: int) -> Tensor:
    """Random classes 0 to 3 in squares of ``cell`` pixels."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 4, (-(-size[0] // cell), -(-size[1] // cell)), generator=generator)
    return small.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[: size[0], : size[1]]


def test_boundary_iou_is_that_of_cheng_2021() -> None:
    """Two images of other sizes and so other widths, one with ignored pixels; class 4 occurs nowhere."""
    sizes = ((180, 250), (6, 140), (400, 15))  # widths 2, 1 and 2; nothing is far from the edge in the second
    assert [boundary_width(*size) for size in sizes] == [2, 1, 2]
    counts = Counts.of_nothing(5)
    of_label, of_prediction, of_both = ([0] * 5 for _ in range(3))
    for number, size in enumerate(sizes):
        label, prediction = blobs(number, size, 12), blobs(number, size, 12).roll(3, 1)
        label[:, 3:9] = IGNORE_INDEX if number == 0 else label[:, 3:9]
        counts.add(label, prediction)
        counted = label != IGNORE_INDEX
        for index in range(4):
            true = boundary(((label == index) & counted).tolist(), boundary_width(*size))
            found = boundary(((prediction == index) & counted).tolist(), boundary_width(*size))
            of_label[index] += len(true)
            of_prediction[index] += len(found)
            of_both[index] += len(true & found)
    assert counts.boundary.tolist() == [of_label, of_prediction, of_both]
    scores = boundary_iou_percent(counts.boundary)
    for index in range(4):
        union = of_label[index] + of_prediction[index] - of_both[index]
        assert 0 < of_both[index] < union
        assert scores[index] == pytest.approx(100 * of_both[index] / union)
    assert math.isnan(scores[4])


def test_what_ranks_counted_is_summed() -> None:
    generator = torch.Generator().manual_seed(0)
    alone, ranks = Counts.of_nothing(4), [Counts.of_nothing(4) for _ in range(2)]
    for number in range(3):
        label, prediction = torch.randint(0, 4, (2, 20, 30), generator=generator)
        for counts in (alone, ranks[number % 2]):
            counts.add(label, prediction)
    of_others: list[Tensor] = []
    ranks[0].summed(lambda own: of_others.append(own) or own)  # type: ignore[func-returns-value]
    total = ranks[1].summed(lambda own: own + of_others[0])
    assert torch.equal(total.confusion, alone.confusion)
    assert torch.equal(total.boundary, alone.boundary)
    assert total.images == 3


ABSENT = ("terrain", "truck", "train")
"""Not in SYNTHIA."""


def slow_means(label: Tensor, prediction: Tensor, names: list[str], *, ignore_others: bool) -> float:
    """Class by class from the pixels: hits over the union."""
    keep = {CLASSES.names.index(name) for name in names}
    counted = [
        (int(true), int(guess))
        for true, guess in zip(label.flatten(), prediction.flatten(), strict=True)
        if int(true) != IGNORE_INDEX and (not ignore_others or int(true) in keep)
    ]
    values = []
    for index in keep:
        hits = sum(true == guess == index for true, guess in counted)
        union = sum(index in (true, guess) for true, guess in counted)
        if union:
            values.append(100 * hits / union)
    return sum(values) / len(values)


def some_pixels() -> tuple[Tensor, Tensor]:
    """A label, ignored pixels in it, and a prediction that is right half of the time."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 19, (40, 50), generator=generator)
    guess = torch.randint(0, 19, (40, 50), generator=generator)
    prediction = torch.where(torch.rand(40, 50, generator=generator) < 0.5, label, guess)
    label[:3] = IGNORE_INDEX
    return label, prediction


@pytest.mark.parametrize(("group", "left_out"), [("synthia16", ()), ("synthia13", ("wall", "fence", "pole"))])
def test_means_for_synthia_in_both_conventions(group: str, left_out: tuple[str, ...]) -> None:
    label, prediction = some_pixels()
    names = [name for name in CLASSES.names if name not in (*ABSENT, *left_out)]
    assert len(names) == int(group.removeprefix("synthia"))
    means = means_over(group, CLASSES.indices(CLASSES.groups[group]), confusion_matrix(label, prediction, 19))
    assert means == {
        f"miou_{group}": pytest.approx(slow_means(label, prediction, names, ignore_others=False)),
        f"miou_{group}_others_ignored": pytest.approx(slow_means(label, prediction, names, ignore_others=True)),
    }
    assert means[f"miou_{group}"] < means[f"miou_{group}_others_ignored"]


def test_the_mean_over_16_is_19_sixteenths_of_that_over_19_where_nothing_absent_is_predicted() -> None:
    """UDA_FACTS 8: the three classes score 0 in the mean over 19."""
    label, prediction = some_pixels()
    for name in ABSENT:
        prediction[prediction == CLASSES.names.index(name)] = 0
    confusion = confusion_matrix(label, prediction, 19)
    shared = CLASSES.indices(CLASSES.groups["synthia16"])
    assert means_over("synthia16", shared, confusion)["miou_synthia16"] == pytest.approx(
        mean_iou_percent(confusion) * 19 / 16
    )
