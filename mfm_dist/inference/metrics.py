"""Scores of a prediction against its label: what is counted of each image, and what follows from the sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX

BOUNDARY_WIDTH = 0.005
"""Width of a boundary as a share of the image's diagonal: that of Cheng et al. 2021 (arXiv 2103.16562, and their code)
for Cityscapes; for COCO they take 0.02."""


@dataclass(kw_only=True)
class Counts:
    """What is summed over images and ranks, and all that scores are made of."""

    confusion: Tensor
    """int64 [C, C] (``confusion_matrix``)."""
    boundary: Tensor
    """int64 [3, C] (``boundary_counts``)."""
    images: int = 0

    @classmethod
    def of_nothing(cls, num_classes: int, device: torch.device | None = None) -> Counts:
        """Return the counts of no image, on the device that will count."""
        confusion, boundary = (torch.zeros(rows, num_classes, dtype=torch.int64) for rows in (num_classes, 3))
        return cls(confusion=confusion.to(device), boundary=boundary.to(device))

    def add(self, label: Tensor, prediction: Tensor) -> None:
        """Count one image, where its label and prediction are."""
        count = len(self.confusion)
        self.confusion += confusion_matrix(label, prediction, count)
        self.boundary += boundary_counts(label, prediction, count)
        self.images += 1

    def summed(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> Counts:
        """Return the sum over ranks, of which each has its own. Collective."""
        images = self.confusion.new_tensor([self.images])
        own = torch.cat([self.confusion.flatten(), self.boundary.flatten(), images])
        *parts, images = sum_over_ranks(own).split([self.confusion.numel(), self.boundary.numel(), 1])
        return Counts(confusion=parts[0].view_as(self.confusion), boundary=parts[1].view_as(self.boundary),
                      images=int(images))  # fmt: skip


def pair_counts(first: Tensor, second: Tensor, num_classes: int) -> Tensor:
    """Count pixels by their values in two maps, whatever is no class as class C: int64 [C + 1, C + 1].

    Args:
        first, second: integers of one shape, 0..C-1 or ``IGNORE_INDEX``.
    """
    kinds = num_classes + 1
    # The narrowest type that holds a pair: on a CPU its bytes are the time.
    pair = torch.int16 if kinds**2 <= 2**15 else torch.int32
    pairs = first.clamp(max=num_classes).to(pair) * kinds + second.clamp(max=num_classes).to(pair)
    return torch.bincount(pairs.flatten(), minlength=kinds**2).view(kinds, kinds)


def confusion_matrix(label: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true class (row) and predicted class (column), without ignored ones: int64 [C, C].

    Args:
        label: integer [..., H, W] with ``IGNORE_INDEX`` where unlabelled.
        prediction: integer, of the same shape, in 0..C-1.
    """
    return pair_counts(label, prediction, num_classes)[:num_classes, :num_classes]


def boundary_counts(label: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Count what Boundary IoU is made of, by class: int64 [3, C], boundary pixels of label, of prediction, of both.

    The boundary of a class are those of its pixels that lie within a width of its contour, and the edge of the image is
    contour, too (Cheng et al. 2021). Ignored pixels are taken out of both, so they end a class in the same places.

    Args:
        label: integer [H, W] with ``IGNORE_INDEX`` where unlabelled.
        prediction: integer [H, W] in 0..C-1.
    """
    label, prediction = label.byte(), prediction.byte()
    prediction = prediction | _all_bits(label == IGNORE_INDEX)
    width = boundary_width(label.shape[0], label.shape[1])
    of_label, of_prediction = (each | _all_bits(~near_contour(each, width)) for each in (label, prediction))
    pairs = pair_counts(of_label, of_prediction, num_classes)
    return torch.stack([pairs.sum(1), pairs.sum(0), pairs.diagonal()])[:, :num_classes]


def _all_bits(where: Tensor) -> Tensor:
    """Return ``IGNORE_INDEX``, which has all bits set, where a boolean is true and 0 elsewhere: uint8."""
    return -where.view(torch.uint8)


def boundary_width(height: int, width: int) -> int:
    """Return the width of a boundary in pixels, at least 1."""
    return max(1, round(BOUNDARY_WIDTH * math.hypot(height, width)))


def near_contour(label: Tensor, width: int) -> Tensor:
    """Tell which pixels of a label map [H, W] lie within ``width`` pixels of another value or of the edge: bool.

    Pixels that are left of their class by ``width`` erosions with a 3 x 3 square, as the authors' code has it, are
    those around which a square of 2 ``width`` + 1 pixels holds one value: no 2 x 2 pixels of it differ.

    Args:
        label: uint8.
    """
    if min(label.shape) <= 2 * width:  # every pixel is near the edge
        return torch.ones_like(label, dtype=torch.bool)
    across, down = label[:, 1:] ^ label[:, :-1], label[1:] ^ label[:-1]
    differing = across[1:] | across[:-1] | down[:, 1:]  # [H - 1, W - 1], not 0 where 2 x 2 pixels differ
    near = _any_in_squares(differing, 2 * width).clamp(max=1).view(torch.bool)  # a comparison takes ten times as long
    return F.pad(near, [width] * 4, value=True)


def _any_in_squares(values: Tensor, side: int) -> Tensor:
    """Join the bits in every square of ``side`` pixels, by windows that double: [H - side + 1, W - side + 1]."""
    for dim in (0, 1):
        length = 1
        while length < side:
            step = min(length, side - length)
            left = values.shape[dim] - step
            values = values.narrow(dim, 0, left) | values.narrow(dim, step, left)
            length += step
    return values


def iou_percent(confusion: Tensor) -> list[float]:
    """Return IoU = TP / (TP + FP + FN) of each class in percent; NaN for a class neither labelled nor predicted."""
    true_positive = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return (100.0 * true_positive / union).tolist()


def boundary_iou_percent(counts: Tensor) -> list[float]:
    """Return the Boundary IoU of each class in percent, from summed ``boundary_counts``; NaN as in ``iou_percent``."""
    of_label, of_prediction, both = counts.double()
    return (100.0 * both / (of_label + of_prediction - both)).tolist()


def mean_of_known(values: Sequence[float]) -> float:
    """Return the mean of the values that are no NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def mean_iou_percent(confusion: Tensor, classes: Sequence[int] | None = None) -> float:
    """Return the mean of ``iou_percent`` over the classes that have one, all or some of them."""
    iou = iou_percent(confusion)
    return mean_of_known(iou if classes is None else [iou[index] for index in classes])


def means_over(group: str, classes: list[int], confusion: Tensor) -> dict[str, float]:
    """Return the mean IoU in percent over some classes, in the two conventions of the literature on SYNTHIA.

    ``miou_<group>`` (DAFormer, HRDA, MIC) counts every labelled pixel: those of other classes are false positives of
    what is predicted there. ``miou_<group>_others_ignored`` leaves pixels labelled with other classes out. Classes
    that do not occur are in no mean.
    """
    known = torch.zeros_like(confusion)
    known[classes] = confusion[classes]
    return {
        f"miou_{group}": mean_iou_percent(confusion, classes),
        f"miou_{group}_others_ignored": mean_iou_percent(known, classes),
    }
