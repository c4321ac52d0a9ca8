"""Scoring the student on a labelled data set, over all ranks, with no image counted twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mfm_dist.batch import BadSample
from mfm_dist.classes import CLASS_NAMES
from mfm_dist.data.pipeline import EvaluationItem
from mfm_dist.inference import predict_labels
from mfm_dist.metrics import confusion_matrix, iou_percent, mean_iou_percent, write_atomically
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.pictures import save_overlay

PROTOCOL = "student, eval mode, fp32, whole image, single scale, no flip; label at its stored size; 255 not counted"


class Ranks(Protocol):
    """What scoring needs of the engine; a lone process has its own below."""

    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks."""

    def mean(self, values: Tensor) -> Tensor:
        """Element-wise mean over ranks."""


class OneProcess:
    """``Ranks`` without a launcher, for the commands that run after training."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def sum(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Result of one evaluation; written as eval/step_XXXXXXXX.json."""

    step: int
    miou: float
    """Mean IoU in percent over the classes that occur in labels or predictions."""
    iou: dict[str, float]
    """IoU in percent by class name; NaN (null in JSON) for a class that does not occur."""
    images: int
    """Images scored."""
    bad_samples: list[str] = field(default_factory=list)
    """Samples of this rank that could not be read; excluded, never replaced."""
    protocol: str = PROTOCOL

    def to_json(self) -> str:
        """Indented JSON text."""
        values = asdict(self)
        values["iou"] = {name: value if value == value else None for name, value in self.iou.items()}
        return json.dumps(values, indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the JSON file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.to_json())

    def numbers(self) -> dict[str, float]:
        """``eval/miou`` and ``eval/iou/<class>`` in percent, of the classes that occur."""
        scored = {f"eval/iou/{name}": value for name, value in self.iou.items() if value == value}
        return {"eval/miou": self.miou, **scored}

    def table(self) -> str:
        """One line a class, for people."""
        lines = [f"  {name:<14} {value:6.2f}" for name, value in self.iou.items()]
        return "\n".join([*lines, f"  {'mean':<14} {self.miou:6.2f}"])


@torch.no_grad()
def evaluate(
    student: Segmentor,
    items: Iterable[EvaluationItem],
    ranks: Ranks,
    *,
    step: int,
    overlays: int = 0,
    overlay_folder: Path | None = None,
    before_turn: Callable[[int], object] = lambda _: None,
) -> tuple[Scores, list[BadSample]]:
    """Score the student on this rank's items and sum over ranks; every rank gets the same scores.

    BatchNorm uses the mean over ranks of the running statistics, in a copy: each rank goes on with its own.

    Args:
        items: this rank's turns, as many on every rank. In a turn without a sample a forward still runs, because
            under ZeRO-3 it is collective.
        overlays: how many of the data set's first images to save into ``overlay_folder``, by whichever rank has them.
        before_turn: called with the number of each turn, from 0. It may end the evaluation by raising, on all ranks
            in the same turn.
    """
    confusion = torch.zeros(len(CLASS_NAMES), len(CLASS_NAMES), dtype=torch.int64)
    scored = 0
    bad: list[BadSample] = []
    with evaluation_mode(student), mean_batch_norm(student, ranks):
        for turn, item in enumerate(items):
            before_turn(turn)
            if item.sample is None:
                predict_labels(student, torch.zeros(3, 64, 64, dtype=torch.uint8), ranks.device)
                bad.extend([item.bad] if item.bad is not None else [])
                continue
            assert item.sample.label is not None
            assert item.number is not None
            prediction = predict_labels(student, item.sample.image, ranks.device).cpu()
            confusion += confusion_matrix(item.sample.label, prediction, len(CLASS_NAMES))
            scored += 1
            if overlay_folder is not None and item.number < overlays:
                path = overlay_folder / f"{item.sample.key}.png"
                save_overlay(path, item.sample.image, item.sample.label, prediction)
    totals = ranks.sum(torch.cat([confusion.flatten(), torch.tensor([scored])]).to(ranks.device)).cpu()
    confusion = totals[:-1].reshape(confusion.shape)
    scores = Scores(
        step=step,
        miou=mean_iou_percent(confusion),
        iou=dict(zip(CLASS_NAMES, iou_percent(confusion), strict=True)),
        images=int(totals[-1]),
        bad_samples=[str(sample) for sample in bad],
    )
    return scores, bad


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """``module.eval()`` for a while."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def batch_norm_buffers(module: nn.Module) -> list[Tensor]:
    """Running means and variances of a module's BatchNorm layers, in a fixed order."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    return [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None]


@contextmanager
def mean_batch_norm(module: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Put the all-rank mean of the running statistics in place for a while. Collective."""
    buffers = batch_norm_buffers(module)
    own = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        buffer.copy_(ranks.mean(buffer))
    try:
        yield
    finally:
        for buffer, before in zip(buffers, own, strict=True):
            buffer.copy_(before)
