"""Scores count every readable image once, whatever the world size, and leave the student as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mfm_dist.build import build_student
from mfm_dist.config.schema import RunConfig
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import ShardReader
from mfm_dist.evaluation import OneProcess, batch_norm_buffers, evaluate, mean_batch_norm
from mfm_dist.inference import predict_labels
from mfm_dist.metrics import confusion_matrix, mean_iou_percent
from mfm_dist.stopping import Stopped


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
    student = build_student(tiny_config)
    reader = ShardReader(scenes / "camera_val")
    scores, bad = evaluate(student, EvaluationSet(reader, rank=0, world_size=1), Collected(), step=3)
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
    student = build_student(tiny_config)
    reader = ShardReader(scenes / "camera_val")
    forwards: list[int] = []
    student.register_forward_hook(lambda *_: forwards.append(1))
    alone = Collected()
    evaluate(student, EvaluationSet(reader, rank=0, world_size=1), alone, step=0)
    total, counts = torch.zeros_like(alone.summed[0]), []
    for rank in range(world_size):
        forwards.clear()
        ranks = Collected()
        evaluate(student, EvaluationSet(reader, rank=rank, world_size=world_size), ranks, step=0)
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
    with mean_batch_norm(layer, Halving()):
        assert layer.running_mean.tolist() == [2.0, 2.0]
    assert layer.running_mean.tolist() == [4.0, 4.0]


def test_training_mode_and_statistics_survive(tiny_config: RunConfig, scenes: Path) -> None:
    student = build_student(tiny_config).train()
    before = [b.clone() for b in batch_norm_buffers(student)]
    evaluate(student, EvaluationSet(ShardReader(scenes / "camera_val"), rank=0, world_size=1), Collected(), step=0)
    assert student.training
    assert all(torch.equal(a, b) for a, b in zip(before, batch_norm_buffers(student), strict=True))


def test_an_evaluation_that_is_broken_off_leaves_the_student_as_it_was(tiny_config: RunConfig, scenes: Path) -> None:
    class Halving(Collected):
        def mean(self, values: Tensor) -> Tensor:
            return values / 2

    student = build_student(tiny_config).train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    turns: list[int] = []

    def stop_at_two(turn: int) -> None:
        turns.append(turn)
        if turn == 2:
            raise Stopped

    items = EvaluationSet(ShardReader(scenes / "camera_val"), rank=0, world_size=1)
    with pytest.raises(Stopped):
        evaluate(student, items, Halving(), step=0, before_turn=stop_at_two)
    assert turns == [0, 1, 2]
    assert student.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
