"""The probabilities of several views of an image are averaged, against resizing and mirroring by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_dist.build import build_student
from mfm_dist.config.schema import RunConfig
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import ShardReader
from mfm_dist.inference.evaluation import OneProcess, evaluate
from mfm_dist.inference.metrics import confusion_matrix, mean_iou_percent
from mfm_dist.inference.views import Views
from mfm_dist.models.preprocessing import normalise
from mfm_dist.models.segmentor import Segmentor
from tests.helpers.classes import CLASSES


def slow_prediction(student: Segmentor, image: Tensor, sizes: list[tuple[int, int]], *, flip: bool) -> Tensor:
    """Resize, mirror, predict, mirror back, enlarge, average; one view after another."""
    probabilities = []
    for size in sizes:
        resized = F.interpolate(image[None].float(), size, mode="bilinear")
        for mirrored in [False, True] if flip else [False]:
            seen = torch.flip(resized, [3]) if mirrored else resized
            logits = F.interpolate(student(normalise(seen)), image.shape[1:], mode="bilinear")
            probability = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
            probabilities.append(torch.flip(probability, [3]) if mirrored else probability)
    return torch.stack(probabilities).mean(dim=0).argmax(dim=1)[0]


@pytest.mark.parametrize("fit_into", [None, (32, 96)])
def test_views_are_averaged(fit_into: tuple[int, int] | None, tiny_config: RunConfig, scenes: Path) -> None:
    student, reader = build_student(tiny_config, CLASSES), ShardReader(scenes / "camera_val")
    base = (64, 128) if fit_into is None else (32, 64)
    sizes = [(int(base[0] * scale), int(base[1] * scale)) for scale in (0.5, 1.0, 1.75)]
    student.eval()
    confusion = torch.zeros(19, 19, dtype=torch.int64)
    with torch.no_grad():
        for number in range(len(reader)):
            sample = reader.read(number)
            assert sample.label is not None
            predicted = slow_prediction(student, sample.image, sizes, flip=True)
            confusion += confusion_matrix(sample.label, predicted, 19)
    found, single = (
        evaluate(
            student,
            EvaluationSet(reader, rank=0, world_size=1),
            OneProcess(),
            step=0,
            classes=CLASSES,
            fit_into=fit_into,
            views=views,
        )[0]
        for views in (Views(scales=(0.5, 1.0, 1.75), flip=True), Views())
    )
    assert found.miou == pytest.approx(mean_iou_percent(confusion), abs=0.02)  # a pixel or two may be tied
    assert found.miou != pytest.approx(single.miou, abs=0.02)
    assert found.protocol == single.protocol.replace(
        "single scale, no flip", "mean probability over scales 0.5, 1, 1.75 and their mirror images"
    )
