"""Look at target images without labels, over all ranks: what there is to say of a run that nothing can score.

None of it is an accuracy: a student that has collapsed to one class agrees with its teacher, and is sure of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mfm_dist.classes import ClassSet
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.errors import BadSample
from mfm_dist.inference.evaluation import Ranks, Scores, agreed_forwards, evaluation_mode, protocol_of, turns_of
from mfm_dist.inference.overlays import save_overlay
from mfm_dist.inference.predict_labels import predict_logits, seen_size
from mfm_dist.models.preprocessing import normalise
from mfm_dist.models.segmentor import Segmentor

FIGURES = {
    "agreement": "share of pixels to which student and teacher give the same class",
    "pseudo_weight": "share of pixels of which the teacher is sure",
    "entropy": "mean entropy of the student, as a share of the largest possible, log C",
    "confidence": "mean probability of the student's class",
}
"""What is measured of an image, each from 0 to 1, in words. The first two need a teacher."""


@torch.no_grad()
def look_at_unlabelled(
    student: Segmentor,
    teacher: Segmentor | None,
    items: EvaluationSet,
    ranks: Ranks,
    *,
    step: int,
    classes: ClassSet,
    threshold: float,
    precision: str = "fp32",
    fit_into: tuple[int, int] | None = None,
    overlays: int = 0,
    overlay_folder: Path | None = None,
    before_turn: Callable[[int], object] = lambda _: None,
) -> tuple[Scores, list[BadSample]]:
    """Measure ``FIGURES`` on this rank's images and take their means over all; every rank gets the same.

    An image counts as much as any other, whatever its size. The student is in the mode that ``evaluate`` scores, the
    teacher in its own, in which it makes pseudo-labels: BatchNorm uses the statistics of the image.

    Args:
        teacher: None where there is none, and nothing to agree with.
        items: this rank's turns, as many on every rank; one without a sample predicts ``FILLER``.
        threshold: probability from which the teacher is sure (``self_training.pseudo_threshold``).
        precision, classes, fit_into, overlays, overlay_folder, before_turn: as in ``evaluate``.
    """
    names = [name for name in FIGURES if teacher is not None or name not in ("agreement", "pseudo_weight")]
    # A row for each image, filled by the one rank that has it: so the means are the same at any world size, to the bit.
    table = torch.zeros(items.samples, 1 + len(names), dtype=torch.float64)
    bad: list[BadSample] = []
    with evaluation_mode(student, ranks):
        for number, sample, image, box in turns_of(items, fit_into, before_turn, bad):
            logits, taught = logits_of(student, teacher, image, box, ranks)
            if sample is None:
                continue
            found = figures_of(logits, taught, threshold)
            table[number] = torch.tensor([1.0, *(found[name] for name in names)], dtype=torch.float64)
            if overlay_folder is not None and number < overlays:
                path = overlay_folder / f"{sample.key}.png"
                save_overlay(path, sample.image, None, logits.argmax(dim=0).cpu(), classes)
    table = ranks.sum(table.to(ranks.device)).cpu()
    table = table[table[:, 0] > 0]
    scores = Scores(
        step=step,
        miou=None,
        iou={},
        images=len(table),
        bad_samples=[str(sample) for sample in bad],
        means={},
        protocol=f"no labels, nothing is scored; mean over images; {protocol_of(student, fit_into, precision)}",
        unlabelled=dict(zip(names, table[:, 1:].mean(dim=0).tolist(), strict=True)),
    )
    return scores, bad


def logits_of(
    student: Segmentor, teacher: Segmentor | None, image: Tensor, box: tuple[int, int] | None, ranks: Ranks
) -> tuple[Tensor, Tensor | None]:
    """Return what both say of an image, fp32 [C, H, W] each, in as many forwards as other ranks make. Collective."""
    forwards = agreed_forwards(student, seen_size(image, box), ranks)
    logits = predict_logits(student, image, ranks.device, normalise, forwards, box)[0]
    if teacher is None:
        return logits, None
    return logits, predict_logits(teacher, image, ranks.device, twice, forwards, box)[0]


def figures_of(student: Tensor, teacher: Tensor | None, threshold: float) -> dict[str, float]:
    """Measure ``FIGURES`` of one image, without the first two where there is no teacher.

    Args:
        student, teacher: logits, fp32 [C, H, W].
        threshold: probability from which the teacher is sure.
    """
    log_probability = student.log_softmax(dim=0)
    probability = log_probability.exp()
    # A single class leaves nothing to be unsure of.
    entropy = -(probability * log_probability).sum(dim=0) / (math.log(len(student)) or 1.0)
    found = {"entropy": _mean(entropy), "confidence": _mean(probability.amax(dim=0))}
    if teacher is not None:
        confidence, label = teacher.softmax(dim=0).max(dim=0)
        found |= {"agreement": _mean(label == student.argmax(dim=0)), "pseudo_weight": _mean(confidence >= threshold)}
    return found


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def twice(image: Tensor) -> Tensor:
    """Normalise an image [1, 3, H, W] and put a copy beside it, [2, 3, H, W].

    Batch statistics stay those of the image. Of a single one, a decoder that pools it into one value has none.
    """
    return normalise(image).expand(2, -1, -1, -1)
