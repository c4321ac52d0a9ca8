"""Segmentation scores, running means, and line-by-line JSON files."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.storage import write_atomically as write_atomically


def confusion_matrix(label: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Pixels by true class (row) and predicted class (column), without ignored ones: int64 [C, C].

    Args:
        label: integer [..., H, W] with ``IGNORE_INDEX`` where unlabelled.
        prediction: integer, of the same shape, in 0..C-1.
    """
    counts = label != IGNORE_INDEX
    pairs = label[counts].long() * num_classes + prediction[counts].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def iou_percent(confusion: Tensor) -> list[float]:
    """IoU = TP / (TP + FP + FN) of each class in percent; NaN for a class neither labelled nor predicted."""
    true_positive = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return (100.0 * true_positive / union).tolist()


def mean_iou_percent(confusion: Tensor) -> float:
    """Mean of ``iou_percent`` over the classes that have one."""
    values = [value for value in iou_percent(confusion) if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


class RunningMean:
    """Means of named scalars since the last ``pop``, kept on the device so that adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one observation of every name."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count += 1

    def pop(self) -> tuple[list[str], Tensor]:
        """Names and the vector of their means; starts anew."""
        names = list(self._sums)
        means = torch.stack([self._sums[name] for name in names]) / max(self._count, 1)
        self._sums, self._count = {}, 0
        return names, means


def peak_memory_gib(device: torch.device) -> float:
    """Peak GPU memory of this process, or its peak resident memory on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class JsonLines:
    """A file of one JSON object a line, written through at once so that a kill loses nothing written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line. Numbers that are not finite become null, which JSON can hold."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:  # the last line of a killed run
                    continue

    def forget_after(self, step: int) -> None:
        """Drop lines of steps beyond ``step``: a resumed run writes them again."""
        if not self.path.exists():
            return
        kept = [json.dumps(record) + "\n" for record in self if record.get("step", 0) <= step]
        write_atomically(self.path, "".join(kept))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
