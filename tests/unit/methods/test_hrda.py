"""HRDA's detail window and its loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfm_dist.build import build_train_module
from mfm_dist.methods.base import ForwardKind
from mfm_dist.methods.hrda import classify_at_two_resolutions, detail_box, drawn_box
from mfm_dist.methods.losses import cross_entropy
from mfm_dist.models.hrda import HRDASegmentor, TwoResolutions
from mfm_dist.models.preprocessing import normalise
from mfm_dist.models.windows import DrawnWindow
from mfm_dist.rng import keyed_generator
from mfm_dist.train_module import TrainModule
from tests.helpers.classes import CLASSES
from tests.helpers.modules import block, config_with


def hrda(*overrides: str) -> TrainModule:
    options = ["method.name=hrda", "hrda.attention_options={width: 8}", "mfm.enabled=false", "data.crop=64"]
    return build_train_module(config_with(*options, *overrides), CLASSES)


def both(student: HRDASegmentor, image: Tensor, box: DrawnWindow) -> TwoResolutions:
    return student.decode_crops(map(student.encode, (student.context(image), box.crop(image))), box)


def test_offsets_are_the_multiples_of_eight_up_to_504() -> None:
    boxes = [detail_box((1024, 1024), (512, 512), 8, keyed_generator(0, 16, n)) for n in range(4000)]
    for side in ([box.top for box in boxes], [box.left for box in boxes]):
        assert set(side) == set(range(0, 505, 8))
    assert {(box.height, box.width) for box in boxes} == {(512, 512)}
    assert {box.top for box in (detail_box((32, 64), (32, 32), 8, keyed_generator(0, 16, n)) for n in range(9))} == {0}


def test_each_pass_of_each_block_has_a_window_of_its_own() -> None:
    module = hrda()
    assert isinstance(module.student, HRDASegmentor)

    def boxes(number: int) -> list[object]:
        inputs = module.step_inputs(block(number))
        drawn = (drawn_box(inputs, kind) for kind in ForwardKind)
        return [(int(box.rows[0]), int(box.columns[0])) for box in drawn]

    drawn = [tuple(boxes(number)) for number in range(8)]
    assert drawn == [tuple(boxes(number)) for number in range(8)]
    assert len(set(drawn)) == 8
    assert len({box for row in drawn for box in row}) > 8


@pytest.mark.parametrize("weight", [0.1, 0.4])
def test_the_source_loss_is_fused_and_detail_in_their_shares(weight: float) -> None:
    module = hrda(f"hrda.detail_loss_weight={weight}", "daformer.feature_distance_weight=0")
    module.student.eval()  # no dropout and no batch statistics: forwards can be repeated
    student, batch = module.student, block()
    assert isinstance(student, HRDASegmentor)
    inputs = module.step_inputs(batch)
    box = drawn_box(inputs, ForwardKind.SOURCE)
    seen = both(student, normalise(batch.source_image), box)
    label = batch.source_label
    top, left = int(box.rows[0]), int(box.columns[0])
    detail = label[:, top : top + 32, left : left + 32]
    expected = (1 - weight) * cross_entropy(seen.fused, label) + weight * cross_entropy(seen.detail, detail)
    assert torch.allclose(module(batch, 0.0, "source").total, expected)


def test_the_window_weighs_pixels_as_the_crop_does() -> None:
    module = hrda()
    module.student.eval()  # no dropout and no batch statistics: forwards can be repeated
    student, batch = module.student, block()
    assert isinstance(student, HRDASegmentor)
    inputs = module.step_inputs(batch)
    image, label = normalise(batch.source_image), batch.source_label
    weight = torch.rand(label.shape, generator=torch.Generator().manual_seed(0)) ** 4  # uneven everywhere
    weight[:, :, :40] = 0.0
    passed = classify_at_two_resolutions(student, inputs, ForwardKind.MIXED, image, label, weight, detail_weight=0.1)
    losses = passed.losses(map(student.encode, passed.images))
    box = drawn_box(inputs, ForwardKind.MIXED)
    top, left = int(box.rows[0]), int(box.columns[0])
    rows, columns = slice(top, top + 32), slice(left, left + 32)
    seen = both(student, image, box)
    fused = cross_entropy(seen.fused, label, weight)
    detail = cross_entropy(seen.detail, label[:, rows, columns], weight[:, rows, columns])
    assert torch.allclose(losses["mixed"].value, fused)
    assert torch.allclose(losses["mixed_detail"].value, detail)
    assert (losses["mixed"].weight, losses["mixed_detail"].weight) == (0.9, 0.1)
    assert detail > 0.0


def test_the_teacher_slides_and_the_distance_is_on_the_context() -> None:
    module = hrda()
    assert module.teacher is not None
    assert isinstance(module.teacher.segmentor, HRDASegmentor)
    inputs = module.step_inputs(block())
    assert inputs.initial_feature is not None
    assert inputs.initial_feature.shape[-2:] == (1, 1)  # stride 32 of the context's 32 pixels
    assert inputs.pseudo is not None
    with torch.no_grad():
        logits = module.teacher(inputs.target_image)
    assert torch.equal(inputs.pseudo.label, logits.argmax(1))
