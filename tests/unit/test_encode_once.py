"""All images of a step in one call of the encoder: the same step as one call for each, which is the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mfm_dist.batch import UDABatch
from mfm_dist.build import build_train_module
from mfm_dist.errors import ConfigError
from mfm_dist.methods.base import Pass, StepInputs
from mfm_dist.train_module import TrainModule
from tests.helpers.classes import CLASSES
from tests.helpers.methods import EXTRA, METHODS
from tests.helpers.modules import block, config_with

MIT = ["model.backbone=mit_b0", "model.backbone_options={drop_path_rate: 0.3}", "data.crop=64", "mfm.domain=both"]
"""An encoder without BatchNorm, and half of its blocks dropped at the end."""


def built(*overrides: str, once: str = "auto") -> TrainModule:
    # Few and small blocks: a black image through a random encoder is 0 before each LayerNorm, whose gradient is huge.
    fixed = [*MIT, *EXTRA, "mic.mask_block_pixels=4", "mic.mask_ratio=0.3", f"train.encode_once={once}"]
    return build_train_module(config_with(*fixed, *overrides), CLASSES)


def batch() -> UDABatch:
    """A micro-batch that has all that any method looks at."""
    few = block(4)
    return replace(block(), labelled_target_image=few.source_image, labelled_target_label=few.source_label)


def step(module: TrainModule) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses, and gradients by name."""
    output = module(batch(), 0.7)
    output.total.backward()
    return output.losses, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_equal_steps(one: TrainModule, other: TrainModule) -> None:
    (losses, gradients), (expected, references) = step(one), step(other)
    assert losses.keys() == expected.keys()
    assert gradients.keys() == references.keys()
    for name, loss in losses.items():
        assert float(loss) == pytest.approx(float(expected[name]), rel=1e-6), name
    for name, gradient in gradients.items():
        reference = references[name]
        # A shift before a BatchNorm has no gradient but the rounding of one.
        assert (gradient - reference).norm() <= 2e-5 * reference.norm() + 1e-7, name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_same_step(name: str) -> None:
    once, each = built(*METHODS[name]), built(*METHODS[name], once="never")
    assert (once.encodes_once, each.encodes_once) == (True, False)
    assert_equal_steps(once, each)


def test_activations_computed_again_see_the_same_dropout() -> None:
    again, kept = built("memory.checkpoint_backbone=true"), built()
    assert_equal_steps(again, kept)


def counted(module: TrainModule) -> list[int]:
    """Images of each call of the student's encoder in a step."""
    seen: list[int] = []
    hook = module.student.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    module(block(), 1.0)
    hook.remove()
    return seen


def test_hrda_encodes_context_and_detail_of_all_terms_in_one_call() -> None:
    assert counted(built("method.name=hrda", "mfm.view=fused")) == [16]  # four terms, two images a domain, two views
    assert counted(built("method.name=dacs", once="never")) == [2, 2, 2, 2]


def test_in_float64_the_maps_of_the_encoder_are_equal() -> None:
    module = built("method.name=mic", "mic.base_method=dacs").double()
    inputs = module.step_inputs(block())
    passes = {name: term(module.student, inputs) for name, term in module.terms(1.0).items()}
    passes = {name: Pass([image.double() for image in seen.images], seen.losses) for name, seen in passes.items()}
    together = module.encode_together(passes, inputs)
    for name, seen in passes.items():
        for maps, alone in zip(together[name], module.encode_alone(name, seen, inputs), strict=True):
            for one, other in zip(maps, alone, strict=True):
                assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def swapped(encode: Callable[..., Any]) -> Callable[..., Any]:
    def encode_swapped(passes: dict[str, Pass], inputs: StepInputs) -> dict[str, Any]:
        maps = encode(passes, inputs)
        maps["source"], maps["mixed"] = maps["mixed"], maps["source"]
        return maps

    return encode_swapped


def test_two_passes_that_are_swapped_are_noticed() -> None:
    once = built("method.name=dacs")
    once.encode_together = swapped(once.encode_together)  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        assert_equal_steps(once, built("method.name=dacs", once="never"))


def test_each_image_of_each_pass_has_dropout_of_its_own_and_the_block_decides() -> None:
    module = built("method.name=hrda")
    one, other = module.step_inputs(block(3)), module.step_inputs(block(4))
    shape = (len(module.term_names), 2, 4)
    assert one.dropout.shape[:3] == shape
    rows = {tuple(row.tolist()) for row in one.dropout.flatten(0, 2)}
    assert len(rows) == one.dropout.flatten(0, 2).shape[0]
    assert not torch.equal(one.dropout, other.dropout)
    assert torch.equal(one.dropout, module.step_inputs(block(3)).dropout)
    kept = (one.dropout > 0).float().mean(dim=(0, 1, 2))
    assert kept[0] > kept[len(module.encoder_dropouts) - 1]  # stochastic depth drops more, the deeper
    assert one.dropout.max() == pytest.approx(1 / 0.7)


def test_where_the_encoder_looks_at_the_batch_it_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="encode_once=always: the encoder test_resnet has BatchNorm"):
        build_train_module(config_with("train.encode_once=always"), CLASSES)
    assert not build_train_module(config_with(), CLASSES).encodes_once
    assert build_train_module(config_with("model.freeze=true", "mfm.enabled=false"), CLASSES).encodes_once
    with pytest.raises(ConfigError, match=r"encode_once=always: memory\.lean holds the activations of one term"):
        built("memory.lean=true", once="always")
    assert not built("memory.lean=true").encodes_once
