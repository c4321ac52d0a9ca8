"""Segmentation scores from counts of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX


def confusion_matrix(label: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true class (row) and predicted class (column), without ignored ones: int64 [C, C].

    Args:
        label: integer [..., H, W] with ``IGNORE_INDEX`` where unlabelled.
        prediction: integer, of the same shape, in 0..C-1.
    """
    counts = label != IGNORE_INDEX
    pairs = label[counts].long() * num_classes + prediction[counts].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def iou_percent(confusion: Tensor) -> list[float]:
    """Return IoU = TP / (TP + FP + FN) of each class in percent; NaN for a class neither labelled nor predicted."""
    true_positive = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return (100.0 * true_positive / union).tolist()


def mean_iou_percent(confusion: Tensor, classes: Sequence[int] | None = None) -> float:
    """Return the mean of ``iou_percent`` over the classes that have one, all or some of them."""
    iou = iou_percent(confusion)
    chosen = iou if classes is None else [iou[index] for index in classes]
    values = [value for value in chosen if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan
