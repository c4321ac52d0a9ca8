"""The mixed batch pixel by pixel, and its loss."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mfm_dist.build import build_train_module
from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.config.schema import SelfTrainingSection
from mfm_dist.methods.augment import strong_augment
from mfm_dist.methods.base import StepInputs
from mfm_dist.methods.dacs import mix_draws, mixed_batch, with_mixed_image
from mfm_dist.methods.losses import cross_entropy
from mfm_dist.methods.self_training import PseudoTarget, without_margins
from mfm_dist.rng import Stream, keyed_generator
from tests.helpers.classes import CLASSES
from tests.helpers.modules import block, config_with, inputs_with

SEED, SIDE, SHARE = 3, 16, 0.375
PLAIN = SelfTrainingSection(jitter_prob=0.0, blur_prob=0.0)


def inputs_of(number: int = 5) -> StepInputs:
    """Two different images of each domain, with ignored source pixels and a pseudo-weight that has margins."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, SIDE, SIDE)
    label = torch.randint(0, 6, shape, generator=generator, dtype=torch.uint8)
    label[torch.rand(shape, generator=generator) < 0.2] = IGNORE_INDEX
    valid = without_margins(torch.ones(shape, dtype=torch.bool), 2, 3)
    return inputs_with(
        source_image=torch.randn(2, 3, SIDE, SIDE, generator=generator),
        source_label=label,
        target_image=torch.randn(2, 3, SIDE, SIDE, generator=generator),
        pseudo=PseudoTarget(
            label=torch.randint(6, 19, shape, generator=generator),
            weight=SHARE * valid,
            confidence=torch.rand(shape, generator=generator),
            valid=valid,
        ),
        seed=SEED,
        block=number,
        positions=range(2 * number, 2 * number + 2),
    )


def mixed(inputs: StepInputs, settings: SelfTrainingSection) -> tuple[Tensor, Tensor, Tensor]:
    return mixed_batch(with_mixed_image(replace(inputs, draws=mix_draws(inputs, settings)), settings))


def drawn_classes(inputs: StepInputs) -> list[set[int]]:
    """For each image: half of the micro-batch's label values, rounded up, those whose drawn numbers are least."""
    ranks = keyed_generator(inputs.seed, Stream.CLASS_MIX, inputs.block).random((2, 256))
    there = sorted({int(value) for value in inputs.source_label.flatten()})
    assert IGNORE_INDEX in there
    return [set(sorted(there, key=lambda c: float(own[c]))[: math.ceil(len(there) / 2)]) for own in ranks]


def slowly_mixed(inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel by pixel: the source with weight 1 where its class was drawn, else the target with its pseudo-weight."""
    assert inputs.pseudo is not None
    image, label, weight = torch.empty(2, 3, SIDE, SIDE), torch.empty(2, SIDE, SIDE).long(), torch.empty(2, SIDE, SIDE)
    for b, drawn in enumerate(drawn_classes(inputs)):
        for y, x in np.ndindex(SIDE, SIDE):
            pasted = int(inputs.source_label[b, y, x]) in drawn
            image[b, :, y, x] = (inputs.source_image if pasted else inputs.target_image)[b, :, y, x]
            label[b, y, x] = inputs.source_label[b, y, x] if pasted else inputs.pseudo.label[b, y, x]
            in_margin = y < 2 or y >= SIDE - 3
            weight[b, y, x] = 1.0 if pasted else 0.0 if in_margin else SHARE
    return image, label, weight


@pytest.mark.parametrize("number", [0, 5, 6])
def test_half_of_the_classes_are_pasted_with_weight_one(number: int) -> None:
    inputs = inputs_of(number)
    image, label, weight = mixed(inputs, PLAIN)
    slow_image, slow_label, slow_weight = slowly_mixed(inputs)
    assert torch.equal(image, slow_image)
    assert torch.equal(label, slow_label)
    assert torch.equal(weight, slow_weight)
    assert set(weight.unique().tolist()) == {0.0, SHARE, 1.0}
    assert (label == IGNORE_INDEX).any() == any(IGNORE_INDEX in drawn for drawn in drawn_classes(inputs))


def test_each_block_has_a_draw_of_its_own() -> None:
    labels = [mixed(inputs_of(number), PLAIN)[1] for number in (5, 5, 6)]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_augmentation_changes_the_mixed_image_alone_by_the_draw_of_its_block() -> None:
    always = SelfTrainingSection(jitter_prob=1.0, blur_prob=1.0)
    plain = mixed(inputs_of(), PLAIN)
    image, label, weight = mixed(inputs_of(), always)
    assert torch.equal(label, plain[1])
    assert torch.equal(weight, plain[2])
    expected = strong_augment(plain[0], always, keyed_generator(SEED, Stream.STRONG_AUGMENT, 5))
    assert torch.equal(image, expected)
    assert not torch.equal(image, plain[0])
    # The same pixels in another block look otherwise, whatever its classes: everything of the source is pasted here.
    alike = [replace(inputs_of(number), source_label=torch.zeros(2, SIDE, SIDE).byte()) for number in (5, 6)]
    assert torch.equal(mixed(alike[0], PLAIN)[0], mixed(alike[1], PLAIN)[0])
    assert not torch.equal(mixed(alike[0], always)[0], mixed(alike[1], always)[0])


def test_the_mixed_loss_is_that_of_the_mixed_batch() -> None:
    module = build_train_module(config_with("mfm.enabled=false"), CLASSES)
    module.student.eval()  # no dropout and no batch statistics: forwards can be repeated
    inputs = module.step_inputs(block())
    assert inputs.pseudo is not None
    # A random teacher is sure of nothing, so that at the published threshold the pseudo-weight is 0.
    inputs = replace(inputs, pseudo=replace(inputs.pseudo, weight=torch.full_like(inputs.pseudo.weight, SHARE)))
    loss = module(block(), 0.0, "mixed", inputs).losses["mixed"].item()
    image, label, weight = mixed_batch(inputs)
    logits = module.student(image)
    assert loss == pytest.approx(cross_entropy(logits, label, weight).item(), rel=1e-6)
    assert loss != pytest.approx(cross_entropy(logits, label).item(), rel=1e-2)
