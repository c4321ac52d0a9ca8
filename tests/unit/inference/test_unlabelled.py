"""What is seen of target images without labels is what its names say, at any world size, and is called no accuracy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.config.validate import problems
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import Sample, ShardReader
from mfm_dist.errors import BadSample
from mfm_dist.inference.evaluation import OneProcess, Scores
from mfm_dist.inference.unlabelled import FIGURES, figures_of, look_at_unlabelled
from mfm_dist.models.preprocessing import normalise
from mfm_dist.train_module import TrainModule
from tests.helpers.classes import CLASSES
from tests.helpers.shards import ShardFolder, damage

SEEN = 5
"""Images looked at; three ranks share them unevenly."""


SURE = 0.3
"""Threshold of the teacher."""


class Collected(OneProcess):
    """Stands for one rank of several: keeps what it would sum, and gives what all have summed, if that is known."""

    def __init__(self, total: Tensor | None = None) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.total = total
        self.summed: list[Tensor] = []

    def sum(self, values: Tensor) -> Tensor:
        self.summed.append(values)
        return values if self.total is None else self.total


@pytest.fixture
def target(shard_folder: ShardFolder) -> Path:
    """Seven images without labels, the fourth of them damaged."""
    folder = shard_folder("target", count=7, labelled=False, height=40, width=72)
    damage(folder, 3)
    return folder


@pytest.fixture
def module(tiny_config: RunConfig) -> TrainModule:
    """A student, and a teacher that differs from it, both somewhat sure of what they see."""
    module = build_train_module(tiny_config, CLASSES)
    generator = torch.Generator().manual_seed(0)
    assert module.teacher is not None
    for parameter in module.teacher.parameters():
        parameter.data += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    for network in (module.student, module.teacher.segmentor):
        weight, _ = list(network.decoder.parameters())[-2:]  # of what gives the logits
        weight.data *= 200
    return module


def look(module: TrainModule, target: Path, ranks: OneProcess, rank: int = 0, world_size: int = 1) -> Scores:
    items = EvaluationSet(ShardReader(target), rank=rank, world_size=world_size, most=SEEN, with_label=False)
    assert module.teacher is not None
    return look_at_unlabelled(
        module.student, module.teacher.segmentor, items, ranks, step=7, classes=CLASSES, threshold=SURE
    )[0]


@torch.no_grad()
def slow_figures(module: TrainModule, image: Tensor) -> list[float]:
    """Pixel by pixel, in plain numbers."""
    assert module.teacher is not None
    module.student.eval()
    both = [network(normalise(image[None]))[0].double() for network in (module.student, module.teacher)]
    sums, pixels = [0.0] * 4, 0
    for student, teacher in zip(*(logits.flatten(1).T.tolist() for logits in both), strict=True):
        p, q = ([math.exp(value) / sum(map(math.exp, logits)) for value in logits] for logits in (student, teacher))
        agreed, sure = p.index(max(p)) == q.index(max(q)), max(q) >= SURE
        entropy = -sum(one * math.log(one) for one in p) / math.log(len(p))
        sums = [total + value for total, value in zip(sums, (agreed, sure, entropy, max(p)), strict=True)]
        pixels += 1
    return [total / pixels for total in sums]


def test_figures_are_means_over_readable_images(module: TrainModule, target: Path) -> None:
    scores = look(module, target, Collected())
    samples = [ShardReader(target).read(number, with_label=False) for number in range(SEEN)]
    images = [sample.image for sample in samples if isinstance(sample, Sample)]
    slow = np.mean([slow_figures(module, image) for image in images], axis=0)
    assert list(scores.unlabelled) == list(FIGURES)
    # fp32 against fp64; a pixel that is as near to the threshold, or to another class, may fall to the other side.
    assert list(scores.unlabelled.values()) == pytest.approx(slow.tolist(), abs=1e-3)
    assert all(0 < value < 1 for value in slow), slow
    assert (scores.images, len(scores.bad_samples), scores.step) == (4, 1, 7)
    assert (scores.miou, scores.iou, scores.means) == (None, {}, {})
    assert "sample_0003" in scores.bad_samples[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_get_the_same_bits_and_make_as_many_forwards(world_size: int, module: TrainModule, target: Path) -> None:
    assert module.teacher is not None
    forwards: list[int] = []
    for network in (module.student, module.teacher.segmentor):
        network.register_forward_hook(lambda *_: forwards.append(1))
    alone, total, counts = look(module, target, Collected()), torch.tensor(0.0), []
    for rank in range(world_size):
        forwards.clear()
        ranks = Collected()
        look(module, target, ranks, rank, world_size)
        total = total + ranks.summed[0]
        counts.append(len(forwards))
    assert set(counts) == {2 * -(-SEEN // world_size)}
    assert look(module, target, Collected(total), 0, world_size).unlabelled == alone.unlabelled


def test_the_ends_of_the_scale() -> None:
    """All classes alike: entropy 1; one class alone: entropy 0, and the same of a set of one class."""
    even = figures_of(torch.zeros(4, 2, 3), torch.zeros(4, 2, 3), 0.25)
    assert even == pytest.approx({"entropy": 1, "confidence": 0.25, "agreement": 1, "pseudo_weight": 1})
    sure, other = torch.zeros(4, 2, 3), torch.zeros(4, 2, 3)
    sure[1], other[2] = 1000.0, 1000.0
    assert figures_of(sure, other, 0.9) == {"entropy": 0, "confidence": 1, "agreement": 0, "pseudo_weight": 1}
    assert figures_of(torch.zeros(1, 2, 3), None, 0.9) == {"entropy": 0, "confidence": 1}


def test_without_a_teacher_there_is_nothing_to_agree_with(module: TrainModule, target: Path, tmp_path: Path) -> None:
    items = EvaluationSet(ShardReader(target), rank=0, world_size=1, most=2, with_label=False)
    scores, bad = look_at_unlabelled(
        module.student, None, items, Collected(), step=0, classes=CLASSES, threshold=0.5, overlays=1,
        overlay_folder=tmp_path / "pictures",
    )  # fmt: skip
    assert list(scores.unlabelled) == ["entropy", "confidence"]
    assert bad == []
    assert scores.numbers() == {f"eval/{name}": value for name, value in scores.unlabelled.items()}
    assert json.loads(scores.to_json())["miou"] is None
    (picture,) = (tmp_path / "pictures").iterdir()
    with Image.open(picture) as panels:
        assert panels.width == 2 * 72 + 4  # the image and what the student sees in it
        assert panels.height > 40  # a legend


def test_all_images_bad_leave_no_number(module: TrainModule, shard_folder: ShardFolder) -> None:
    folder = shard_folder("bad", count=1, labelled=False)
    damage(folder, 0)
    assert isinstance(ShardReader(folder).read(0, with_label=False), BadSample)
    scores = look(module, folder, Collected())
    assert set(json.loads(scores.to_json())["unlabelled"].values()) == {None}
    assert scores.numbers() == {}


def test_a_stream_cannot_be_looked_at() -> None:
    config = load_config(None, ["data.validation=null"])
    assert problems(config) == []
    config.data.target, config.data.stream_samples, config.data.source_validation = "s3://a", 5, "s3://b"
    assert [problem.partition(" ")[0] for problem in problems(config)] == [
        "data.source_validation",
        "data.validation=null",
    ]
