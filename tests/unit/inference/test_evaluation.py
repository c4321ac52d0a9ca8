"""Scores count every readable image once, whatever the world size, and leave the student as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_dist.build import build_student
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.data.geometry import resize_box
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import ShardReader
from mfm_dist.distributed.running_statistics import running_statistics
from mfm_dist.inference.evaluation import (
    OneProcess,
    Scores,
    evaluate,
    evaluation_mode,
)
from mfm_dist.inference.metrics import confusion_matrix, mean_iou_percent
from mfm_dist.inference.predict_labels import most_probable, predict_labels
from mfm_dist.models.preprocessing import normalise
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.run.signals import Stopped
from tests.helpers.classes import CLASSES
from tests.helpers.runs import tiny_overrides


class Collected(OneProcess):
    """Stands for one rank of several: keeps what it would sum."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.summed: list[Tensor] = []

    def sum(self, values: Tensor) -> Tensor:
        self.summed.append(values)
        return values


def test_scores_are_those_of_one_confusion_matrix_over_all_images(tiny_config: RunConfig, scenes: Path) -> None:
    student = build_student(tiny_config, CLASSES)
    reader = ShardReader(scenes / "camera_val")
    scores, bad = evaluate(student, EvaluationSet(reader, rank=0, world_size=1), Collected(), step=3, classes=CLASSES)
    student.eval()
    confusion = torch.zeros(19, 19, dtype=torch.int64)
    for number in range(len(reader)):
        sample = reader.read(number)
        assert sample.label is not None
        prediction = predict_labels(student, sample.image, torch.device("cpu"))
        confusion += confusion_matrix(sample.label, prediction, 19)
    assert scores.miou == pytest.approx(mean_iou_percent(confusion))
    assert (scores.images, scores.step, bad) == (5, 3, [])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_sum_to_the_same_confusion_with_equal_numbers_of_forwards(
    world_size: int, tiny_config: RunConfig, scenes: Path
) -> None:
    student = build_student(tiny_config, CLASSES)
    reader = ShardReader(scenes / "camera_val")
    forwards: list[int] = []
    student.register_forward_hook(lambda *_: forwards.append(1))
    alone = Collected()
    evaluate(student, EvaluationSet(reader, rank=0, world_size=1), alone, step=0, classes=CLASSES)
    total, counts = torch.zeros_like(alone.summed[0]), []
    for rank in range(world_size):
        forwards.clear()
        ranks = Collected()
        evaluate(student, EvaluationSet(reader, rank=rank, world_size=world_size), ranks, step=0, classes=CLASSES)
        total += ranks.summed[0]
        counts.append(len(forwards))
    assert torch.equal(total, alone.summed[0])
    assert len(set(counts)) == 1


def test_batch_norm_is_averaged_in_a_copy() -> None:
    layer = nn.BatchNorm2d(2)
    assert layer.running_mean is not None

    class Halving(OneProcess):
        def mean(self, values: Tensor) -> Tensor:
            return values / 2

    layer.running_mean.fill_(4.0)
    with evaluation_mode(layer, Halving()):
        assert layer.running_mean.tolist() == [2.0, 2.0]
    assert layer.running_mean.tolist() == [4.0, 4.0]


def test_the_most_probable_class_is_argmax() -> None:
    """Also among equals and where a value is no number."""
    values = torch.rand(19, 30, 40, generator=torch.Generator().manual_seed(0))
    values[2:5, 20] = 2.0
    values[3, :5], values[7, 3:8] = torch.nan, torch.nan
    assert torch.equal(most_probable(values), values.argmax(dim=0))


def test_training_mode_and_statistics_survive(tiny_config: RunConfig, scenes: Path) -> None:
    student = build_student(tiny_config, CLASSES).train()
    before = [b.clone() for b in running_statistics(student)]
    evaluate(
        student,
        EvaluationSet(ShardReader(scenes / "camera_val"), rank=0, world_size=1),
        Collected(),
        step=0,
        classes=CLASSES,
    )
    assert student.training
    assert all(torch.equal(a, b) for a, b in zip(before, running_statistics(student), strict=True))


def test_an_evaluation_that_is_broken_off_leaves_the_student_as_it_was(tiny_config: RunConfig, scenes: Path) -> None:
    class Halving(Collected):
        def mean(self, values: Tensor) -> Tensor:
            return values / 2

    student = build_student(tiny_config, CLASSES).train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    turns: list[int] = []

    def stop_at_two(turn: int) -> None:
        turns.append(turn)
        if turn == 2:
            raise Stopped

    items = EvaluationSet(ShardReader(scenes / "camera_val"), rank=0, world_size=1)
    with pytest.raises(Stopped):
        evaluate(student, items, Halving(), step=0, classes=CLASSES, before_turn=stop_at_two)
    assert turns == [0, 1, 2]
    assert student.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_a_mean_of_nothing_is_null_in_the_file() -> None:
    """NaN is no JSON."""
    empty = {"miou": math.nan, "boundary_miou": math.nan, "source_miou": math.nan, "iou": {"road": math.nan}}
    scores = Scores(step=3, images=0, bad_samples=[], means={"miou_x": math.nan}, protocol="", **empty)
    found = json.loads(scores.to_json(), parse_constant=pytest.fail)
    assert [found[name] for name in ("miou", "boundary_miou", "source_miou")] == [None] * 3


def test_the_sets_asked_for_are_in_the_results(tiny_config: RunConfig, scenes: Path) -> None:
    items = EvaluationSet(ShardReader(scenes / "camera_val"), rank=0, world_size=1)
    scores, _ = evaluate(
        build_student(tiny_config, CLASSES), items, Collected(), step=0, classes=CLASSES, class_sets=("synthia16",)
    )
    assert set(scores.means) == {"miou_synthia16", "miou_synthia16_others_ignored"}
    assert json.loads(scores.to_json())["means"] == pytest.approx(scores.means)
    assert scores.numbers()["eval/miou_synthia16"] == scores.means["miou_synthia16"]
    assert "miou_synthia16 " in scores.table()


def hrda_student(scenes: Path) -> Segmentor:
    options = ["method.name=hrda", "hrda.attention_options={width: 8}", "data.crop=32"]
    return build_student(load_config(None, [*tiny_overrides(scenes, Path("unused")), *options]), CLASSES)


def test_a_resized_image_is_scored_at_the_size_of_its_label(tiny_config: RunConfig, scenes: Path) -> None:
    """UDA_FACTS 8: the image fitted into the box, logits to the label's size, arg-max there."""
    student = build_student(tiny_config, CLASSES)
    reader = ShardReader(scenes / "camera_val")
    items = [EvaluationSet(reader, rank=0, world_size=1) for _ in range(2)]
    stored = evaluate(student, items[0], Collected(), step=0, classes=CLASSES)[0]
    scores = evaluate(student, items[1], Collected(), step=0, classes=CLASSES, fit_into=(100, 96))[0]
    student.eval()
    confusion = torch.zeros(19, 19, dtype=torch.int64)
    for number in range(len(reader)):
        sample = reader.read(number)
        assert sample.label is not None
        small = resize_box(sample.image, (50, 100), (slice(0, 50), slice(0, 100)))
        with torch.no_grad():
            logits = student(normalise(small[None]))
        prediction = F.interpolate(logits, (64, 128), mode="bilinear").argmax(1)[0]
        assert torch.equal(predict_labels(student, sample.image, torch.device("cpu"), fit_into=(100, 96)), prediction)
        confusion += confusion_matrix(sample.label, prediction, 19)
    assert scores.miou == pytest.approx(mean_iou_percent(confusion))
    assert scores.miou != stored.miou
    assert "whole image, fitted into 100x96, logits enlarged to its stored size" in scores.protocol
    assert "fitted" not in stored.protocol


def test_a_segmentor_with_a_window_predicts_by_the_mean_of_half_overlapping_ones(scenes: Path) -> None:
    student = hrda_student(scenes)
    student.eval()
    image = ShardReader(scenes / "camera_val").read(0).image[:, :32, :72]
    scaled = normalise(image[None])
    total, count = torch.zeros(1, 19, 32, 72), torch.zeros(72)
    with torch.no_grad():
        for left in (0, 16, 32, 40):
            total[..., left : left + 32] += student(scaled[..., left : left + 32])
            count[left : left + 32] += 1
        expected = (total / count).argmax(dim=1)[0]
    assert torch.equal(predict_labels(student, image, torch.device("cpu")), expected)


def test_ranks_with_images_of_several_sizes_make_as_many_forwards(scenes: Path) -> None:
    """Another rank's image needs 24 windows in every turn: here as many forwards run, and the scores stay."""

    class WithALargeImageElsewhere(Collected):
        def maximum(self, values: Tensor) -> Tensor:
            return values.clamp_min(24)

    student = hrda_student(scenes)
    forwards: list[int] = []
    student.register_forward_hook(lambda *_: forwards.append(1))
    items = EvaluationSet(ShardReader(scenes / "camera_val"), rank=0, world_size=2)
    alone, among = (
        evaluate(student, items, ranks, step=0, classes=CLASSES)[0]
        for ranks in (Collected(), WithALargeImageElsewhere())
    )
    own = 3 * 7  # 64 x 128 in windows of 32, half overlapping
    assert len(forwards) == 3 * own + 3 * 24
    assert alone.to_json() == among.to_json()
    assert "sliding windows of 32x32" in alone.protocol


def test_ranks_agree_on_the_windows_of_the_resized_image(scenes: Path) -> None:
    class Asked(Collected):
        def maximum(self, values: Tensor) -> Tensor:
            asked.append(int(values))
            return values

    asked: list[int] = []
    forwards: list[int] = []
    student = hrda_student(scenes)
    student.register_forward_hook(lambda *_: forwards.append(1))
    items = EvaluationSet(ShardReader(scenes / "camera_val"), rank=1, world_size=2)
    evaluate(student, items, Asked(), step=0, classes=CLASSES, fit_into=(32, 64))
    # Two images, which are 32 x 64 when they are seen in windows of 32, and a turn without one: 64 x 64.
    assert asked == [3, 3, 9]
    assert len(forwards) == sum(asked)
