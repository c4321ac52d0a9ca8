"""Score the student on a labelled data set, over all ranks, with no image counted twice.

What is looked at where there are no labels stands in ``unlabelled``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mfm_dist.classes import IGNORE_INDEX, ClassSet
from mfm_dist.data.pipeline import EvaluationItem
from mfm_dist.data.reader import Sample
from mfm_dist.errors import BadSample
from mfm_dist.inference.overlays import save_overlay
from mfm_dist.inference.predict_labels import predict_labels, seen_size, windows_of
from mfm_dist.models.preprocessing import normalise
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.storage import write_atomically

FILLER = torch.zeros(3, 64, 64, dtype=torch.uint8)
"""Predicted in a turn without a sample, because under ZeRO-3 a forward is collective."""


class Ranks(Protocol):
    """What scoring needs of the engine; each method is collective, and gives a lone process what it has."""

    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Return the element-wise sum over ranks."""
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Return the element-wise mean over ranks."""
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum over ranks."""
        return values


class OneProcess(Ranks):
    """``Ranks`` without a launcher, for the commands that run after training."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Result of one evaluation; written as eval/step_XXXXXXXX.json."""

    step: int
    miou: float | None
    """Mean IoU in percent over the classes that occur in labels or predictions; None without labels."""
    iou: dict[str, float]
    """IoU in percent by class name; NaN (null in JSON) for a class that does not occur. Empty without labels."""
    images: int
    """Images scored, or looked at."""
    bad_samples: list[str]
    """Samples of this rank that could not be read; excluded, never replaced."""
    means: dict[str, float]
    """Mean IoU in percent over the classes of each set that was asked for, in both conventions (``means_over``)."""
    protocol: str
    """How they came about, for people."""
    source_miou: float | None = None
    """Mean IoU in percent on labelled images of the source (``data.source_validation``); None if none are scored."""
    unlabelled: dict[str, float] = field(default_factory=dict)
    """What there is to say of target images without labels (``unlabelled.FIGURES``); empty where they have some."""

    def to_json(self) -> str:
        """Return indented JSON text."""
        values = asdict(self)
        for part in ("iou", "means", "unlabelled"):
            values[part] = {name: value if value == value else None for name, value in values[part].items()}
        return json.dumps(values, indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the JSON file, whole or not at all, into a folder that is made if need be."""
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, self.to_json())

    def numbers(self) -> dict[str, float]:
        """Return what there is of ``eval/miou``, ``eval/<name>`` of ``means`` and ``eval/iou/<class>`` in percent,
        ``eval/source_miou``, and ``eval/<name>`` of ``unlabelled``; none that is NaN."""
        values = {"miou": self.miou, "source_miou": self.source_miou, **self.means, **self.unlabelled}
        values |= {f"iou/{name}": value for name, value in self.iou.items()}
        return {f"eval/{name}": value for name, value in values.items() if value is not None and value == value}

    def sentence(self) -> str:
        """Say the result in a line, for people."""
        said = f"target mIoU {self.miou:.2f} %" if self.miou is not None else "no target labels"
        said += "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in self.unlabelled.items())
        said += f" on {self.images} images"
        return said if self.source_miou is None else f"{said}; source mIoU {self.source_miou:.2f} %"

    def table(self) -> str:
        """Return one line a class, for people."""
        values = {**self.iou, "mean": math.nan if self.miou is None else self.miou, **self.means}
        return "\n".join(f"  {name:<14} {value:6.2f}" for name, value in values.items())


@torch.no_grad()
def evaluate(
    student: Segmentor,
    items: Iterable[EvaluationItem],
    ranks: Ranks,
    *,
    step: int,
    classes: ClassSet,
    precision: str = "fp32",
    class_sets: Sequence[str] = (),
    fit_into: tuple[int, int] | None = None,
    scale: Callable[[Tensor], Tensor] = normalise,
    overlays: int = 0,
    overlay_folder: Path | None = None,
    before_turn: Callable[[int], object] = lambda _: None,
) -> tuple[Scores, list[BadSample]]:
    """Score the student on this rank's items and sum over ranks; every rank gets the same scores.

    BatchNorm uses the mean over ranks of the running statistics, in a copy: each rank goes on with its own.

    Args:
        items: this rank's turns, as many on every rank; one without a sample predicts ``FILLER``.
        precision: what the forwards run in, to be said in the protocol.
        classes: of the labels, and of the student's logits.
        class_sets: groups of them to give means over, too.
        fit_into, scale: what the images are before they are predicted (``predict_labels``).
        overlays: how many of the data set's first images to save into ``overlay_folder``, by whichever rank has them.
        before_turn: called with the number of each turn, from 0. It may end the evaluation by raising, on all ranks
            in the same turn.
    """
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    scored = 0
    bad: list[BadSample] = []
    with evaluation_mode(student, ranks):
        for turn, item in enumerate(items):
            before_turn(turn)
            sample = item.found if isinstance(item.found, Sample) else None
            image, box = (FILLER, None) if sample is None else (sample.image, fit_into)
            forwards = agreed_forwards(student, seen_size(image, box), ranks)
            prediction = predict_labels(student, image, ranks.device, scale, forwards, box).cpu()
            if isinstance(item.found, BadSample):
                bad.append(item.found)
            if sample is None:
                continue
            assert sample.label is not None
            confusion += confusion_matrix(sample.label, prediction, len(classes))
            scored += 1
            if overlay_folder is not None and item.number < overlays:
                path = overlay_folder / f"{sample.key}.png"
                save_overlay(path, sample.image, sample.label, prediction, classes.palette)
    totals = ranks.sum(torch.cat([confusion.flatten(), torch.tensor([scored])]).to(ranks.device)).cpu()
    confusion = totals[:-1].reshape(confusion.shape)
    scores = Scores(
        step=step,
        miou=mean_iou_percent(confusion),
        iou=dict(zip(classes.names, iou_percent(confusion), strict=True)),
        images=int(totals[-1]),
        bad_samples=[str(sample) for sample in bad],
        means={
            name: value
            for key in class_sets
            for name, value in means_over(key, classes.indices(classes.groups[key]), confusion).items()
        },
        protocol=f"{protocol_of(student, fit_into, precision)}; label at its stored size; 255 not counted",
    )
    return scores, bad


def protocol_of(student: Segmentor, fit_into: tuple[int, int] | None, precision: str) -> str:
    """Say how the student predicts, for people."""
    window = student.window
    seen = "whole image" if window is None else f"mean logits of sliding windows of {window[0]}x{window[1]}"
    if fit_into is not None:
        seen += f", fitted into {fit_into[0]}x{fit_into[1]}, logits enlarged to its stored size"
    return f"student, eval mode, {precision}, {seen}, single scale, no flip"


def agreed_forwards(student: Segmentor, size: tuple[int, int], ranks: Ranks) -> int:
    """Return how many forwards every rank makes in this turn, those of the largest of their images. Collective.

    Under ZeRO-3 a forward is collective, and images of several sizes need several numbers of windows.
    """
    own = len(windows_of(student, size))
    if student.window is None:  # one for any image, so there is nothing to agree on
        return own
    return int(ranks.maximum(torch.tensor(own, device=ranks.device)))


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


def batch_norm_buffers(module: nn.Module) -> list[Tensor]:
    """Return the running means and variances of a module's BatchNorm layers, in a fixed order."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    return [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None]


@contextmanager
def evaluation_mode(student: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Put a module into evaluation mode for a while, with the all-rank mean of BatchNorm's statistics. Collective."""
    buffers, was_training = batch_norm_buffers(student), student.training
    own = [buffer.clone() for buffer in buffers]
    try:
        student.eval()
        for buffer in buffers:
            buffer.copy_(ranks.mean(buffer))
        yield
    finally:
        student.train(was_training)
        for buffer, before in zip(buffers, own, strict=True):
            buffer.copy_(before)
