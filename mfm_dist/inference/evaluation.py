"""Score the student on a labelled data set, over all ranks, with no image counted twice.

What is looked at where there are no labels stands in ``unlabelled``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mfm_dist.classes import ClassSet
from mfm_dist.data.pipeline import EvaluationItem
from mfm_dist.data.reader import Sample
from mfm_dist.distributed.running_statistics import running_statistics
from mfm_dist.errors import BadSample
from mfm_dist.inference.metrics import (
    Counts,
    boundary_iou_percent,
    iou_percent,
    mean_iou_percent,
    mean_of_known,
    means_over,
)
from mfm_dist.inference.overlays import save_overlay
from mfm_dist.inference.predict_labels import predict_logits, seen_size, windows_of
from mfm_dist.inference.views import SINGLE, Views
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
    """Mean IoU in percent over the classes that occur in labels or predictions; None without labels, NaN (null in JSON)
    where no pixel has one."""
    iou: dict[str, float]
    """IoU in percent by class name; NaN (null in JSON) for a class that does not occur. Empty without labels."""
    boundary_miou: float | None = None
    """Mean Boundary IoU in percent (``metrics.boundary_counts``), over the classes that have one."""
    boundary_iou: dict[str, float] = field(default_factory=dict)
    """Boundary IoU in percent by class name, as ``iou``."""
    confusion: list[list[int]] = field(default_factory=list)
    """Pixels by true class (row) and predicted class (column), in the order of ``iou``."""
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
        for part in ("iou", "boundary_iou", "means", "unlabelled"):
            values[part] = {name: _or_none(value) for name, value in values[part].items()}
        for part in ("miou", "boundary_miou", "source_miou"):
            values[part] = _or_none(values[part])
        text = json.dumps(values, indent=2)
        # A row of the matrix in a line.
        return re.sub(r"\[[\d\s,]+\]", lambda row: "[" + " ".join(row[0][1:-1].split()) + "]", text) + "\n"

    def save(self, path: Path) -> None:
        """Write the JSON file, whole or not at all, into a folder that is made if need be."""
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, self.to_json())

    def numbers(self) -> dict[str, float]:
        """Return what there is of ``eval/miou``, ``eval/boundary_miou``, ``eval/<name>`` of ``means``,
        ``eval/iou/<class>`` and ``eval/source_miou`` in percent, and ``eval/<name>`` of ``unlabelled``; none is NaN."""
        values = {"miou": self.miou, "boundary_miou": self.boundary_miou, "source_miou": self.source_miou}
        values |= {**self.means, **self.unlabelled}
        values |= {f"iou/{name}": value for name, value in self.iou.items()}
        return {f"eval/{name}": value for name, value in values.items() if value is not None and value == value}

    def sentence(self) -> str:
        """Say the result in a line, for people."""
        said = f"target mIoU {self.miou:.2f} %" if self.miou is not None else "no target labels"
        said += "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in self.unlabelled.items())
        said += f" on {self.images} images"
        return said if self.source_miou is None else f"{said}; source mIoU {self.source_miou:.2f} %"

    def table(self) -> str:
        """Return one line a class, IoU and Boundary IoU, for people."""
        mean, boundary_mean = (math.nan if one is None else one for one in (self.miou, self.boundary_miou))
        boundary = {**self.boundary_iou, "mean": boundary_mean}
        lines = [f"  {'':<14} {'IoU':>6} {'boundary':>9}"]
        for name, value in {**self.iou, "mean": mean, **self.means}.items():
            lines.append(f"  {name:<14} {value:6.2f}" + (f" {boundary[name]:9.2f}" if name in boundary else ""))
        return "\n".join(lines)


class Turn(NamedTuple):
    """What a rank does in one turn of an evaluation."""

    number: int
    """Of the image in the data set."""
    sample: Sample | None
    """None where there is nothing, or nothing readable."""
    image: Tensor
    """What is predicted: that of the sample, or ``FILLER``."""
    box: tuple[int, int] | None
    """What it is fitted into first."""


def turns_of(
    items: Iterable[EvaluationItem],
    fit_into: tuple[int, int] | None,
    before_turn: Callable[[int], object],
    bad: list[BadSample],
) -> Iterator[Turn]:
    """Yield this rank's turns, one for each item, and add what cannot be read to ``bad``."""
    for turn, item in enumerate(items):
        before_turn(turn)
        if isinstance(item.found, BadSample):
            bad.append(item.found)
        if isinstance(item.found, Sample):
            yield Turn(item.number, item.found, item.found.image, fit_into)
        else:
            yield Turn(item.number, None, FILLER, None)


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
    views: Views = SINGLE,
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
        fit_into, scale: what the images are before they are predicted (``predict_logits``).
        views: in which each is predicted.
        overlays: how many of the data set's first images to save into ``overlay_folder``, by whichever rank has them.
        before_turn: called with the number of each turn, from 0. It may end all by raising, on all ranks in the same.
    """
    counts = Counts.of_nothing(len(classes), ranks.device)
    bad: list[BadSample] = []

    def logits_of(image: Tensor, box: tuple[int, int] | None) -> Tensor:
        forwards = agreed_forwards(student, seen_size(image, box), ranks)
        return predict_logits(student, image, ranks.device, scale, forwards, box)

    with evaluation_mode(student, ranks):
        for number, sample, image, box in turns_of(items, fit_into, before_turn, bad):
            prediction = views.predict(image, box, logits_of).byte()
            if sample is None:
                continue
            assert sample.label is not None
            counts.add(sample.label.to(ranks.device), prediction)
            if overlay_folder is not None and number < overlays:
                save_overlay(overlay_folder / f"{sample.key}.png", sample.image, sample.label, prediction, classes)
    counts = counts.summed(lambda own: ranks.sum(own).cpu())
    boundary_iou = boundary_iou_percent(counts.boundary)
    scores = Scores(
        step=step,
        miou=mean_iou_percent(counts.confusion),
        iou=dict(zip(classes.names, iou_percent(counts.confusion), strict=True)),
        boundary_miou=mean_of_known(boundary_iou),
        boundary_iou=dict(zip(classes.names, boundary_iou, strict=True)),
        confusion=counts.confusion.tolist(),
        means={
            name: value
            for key in class_sets
            for name, value in means_over(key, classes.indices(classes.groups[key]), counts.confusion).items()
        },
        images=counts.images,
        bad_samples=[str(sample) for sample in bad],
        protocol=f"{protocol_of(student, fit_into, precision, views)}; label at its stored size; 255 not counted",
    )
    return scores, bad


def protocol_of(student: Segmentor, fit_into: tuple[int, int] | None, precision: str, views: Views = SINGLE) -> str:
    """Say how the student predicts, for people."""
    window = student.window
    seen = "whole image" if window is None else f"mean logits of sliding windows of {window[0]}x{window[1]}"
    if fit_into is not None:
        seen += f", fitted into {fit_into[0]}x{fit_into[1]}, logits enlarged to its stored size"
    return f"student, eval mode, {precision}, {seen}, {views}"


def agreed_forwards(student: Segmentor, size: tuple[int, int], ranks: Ranks) -> int:
    """Return how many forwards every rank makes in this turn, those of the largest of their images. Collective.

    Under ZeRO-3 a forward is collective, and images of several sizes need several numbers of windows.
    """
    own = len(windows_of(student, size))
    if student.window is None:  # one for any image, so there is nothing to agree on
        return own
    return int(ranks.maximum(torch.tensor(own, device=ranks.device)))


def _or_none(value: float | None) -> float | None:
    """Return what JSON can hold: NaN, of a class or a set without labelled pixels, is none."""
    return None if value is None or value != value else value


@contextmanager
def evaluation_mode(student: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Put a module into evaluation mode for a while, with the all-rank mean of BatchNorm's statistics. Collective."""
    buffers, was_training = running_statistics(student), student.training
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
