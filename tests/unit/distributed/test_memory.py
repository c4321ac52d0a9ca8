"""memory.lean and memory.checkpoint_backbone: less is held at a time, and the step stays what it was."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.distributed.launch import Launch
from mfm_dist.distributed.running_statistics import running_statistics
from mfm_dist.distributed.start import deepspeed_config, start_engine
from mfm_dist.errors import ConfigError
from mfm_dist.optim import build_optimizer
from tests.helpers.classes import CLASSES
from tests.helpers.modules import SMALL, block

LEAN, CHECKPOINT = "memory.lean=true", "memory.checkpoint_backbone=true"
MIT = [*SMALL, "model.backbone=mit_b0", "model.backbone_options={drop_path_rate: 0.5}"]
"""Drop-path as well, the strongest consumer of random draws."""
EVERY_PIXEL = "self_training.pseudo_threshold=0"
"""A random teacher is sure of nothing; at the published threshold the pseudo-weight, and all it weighs, would be 0."""


@dataclass
class Step:
    """What two micro-batches leave behind before the optimiser steps."""

    losses: list[dict[str, Tensor]]
    gradients: dict[str, Tensor]
    statistics: list[Tensor]
    module: nn.Module
    most_held: int
    """Bytes saved for backward passes, at the most, at one time."""


def two_micro_batches(network: list[str], *overrides: str, weight: float = 0.5) -> Step:
    # One call of the encoder for each image, as with memory.lean: test_encode_once compares it with one for all.
    fixed = [EVERY_PIXEL, "train.global_batch=4", "train.encode_once=never"]
    config = load_config(None, [*network, *fixed, *overrides])
    module = build_train_module(config, CLASSES)
    engine = start_engine(config)
    engine.prepare(module, build_optimizer(module, config.optim))
    held = Held()
    with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
        losses = [engine.forward_backward(block(number), weight) for number in (3, 4)]
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(gradients) == sum(p.requires_grad for p in module.parameters())
    return Step(losses, gradients, running_statistics(module.student), module, held.most)


class Held:
    """Counts the bytes of tensors saved for a backward pass, from saving until the graph lets them go."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Saved:
        return Saved(tensor, self)

    @staticmethod
    def unpack(saved: Saved) -> Tensor:
        return saved.tensor


class Saved:
    def __init__(self, tensor: Tensor, held: Held) -> None:
        self.tensor, self.held, self.size = tensor, held, tensor.nbytes
        held.now += self.size
        held.most = max(held.most, held.now)

    def __del__(self) -> None:
        self.held.now -= self.size


def assert_same_step(ours: Step, plain: Step, *, bit_for_bit: bool) -> None:
    """Losses (so every random draw) and BatchNorm statistics in every bit; gradients too, or to rounding."""
    for our_losses, their_losses in zip(ours.losses, plain.losses, strict=True):
        assert our_losses.keys() == their_losses.keys()
        for name, loss in their_losses.items():
            # The total is a sum in another order.
            assert torch.equal(our_losses[name], loss) or (name == "total" and torch.isclose(our_losses[name], loss))
    assert all(torch.equal(a, b) for a, b in zip(ours.statistics, plain.statistics, strict=True))
    largest = max(float(gradient.abs().max()) for gradient in plain.gradients.values())
    assert largest > 1e-2
    for name, gradient in plain.gradients.items():
        difference = float((ours.gradients[name] - gradient).abs().max())
        assert difference <= (0.0 if bit_for_bit else 2e-6 * largest), name


@pytest.mark.parametrize("network", [SMALL, MIT], ids=["resnet", "mit"])
@pytest.mark.parametrize("overrides", [[CHECKPOINT], [LEAN], [LEAN, CHECKPOINT]], ids=["checkpoint", "lean", "both"])
def test_the_step_is_the_same_and_holds_less(network: list[str], overrides: list[str]) -> None:
    plain, ours = two_micro_batches(network), two_micro_batches(network, *overrides)
    assert_same_step(ours, plain, bit_for_bit=LEAN not in overrides)
    # One term of three at a time; the MFM term, with the Rebuilder, is about half of all.
    share = 0.6 if LEAN in overrides else 0.9
    assert ours.most_held < share * plain.most_held


@pytest.mark.parametrize(("weight", "update_bn"), [(0.0, "true"), (0.5, "false")])
def test_a_pass_that_must_not_count_in_batch_norm_does_not_count(weight: float, update_bn: str) -> None:
    """Its BatchNorm setting is put back before its backward, and so before the recomputation."""
    option = f"mfm.update_bn={update_bn}"
    plain = two_micro_batches(SMALL, option, weight=weight)
    both = two_micro_batches(SMALL, option, LEAN, CHECKPOINT, weight=weight)
    assert_same_step(both, plain, bit_for_bit=False)
    counted = two_micro_batches(SMALL, LEAN, CHECKPOINT)
    assert not all(torch.equal(a, b) for a, b in zip(counted.statistics, both.statistics, strict=True))


def test_the_teacher_is_asked_once_for_all_terms() -> None:
    config = load_config(None, [*SMALL, LEAN])
    module = build_train_module(config, CLASSES)
    engine = start_engine(config)
    engine.prepare(module, build_optimizer(module, config.optim))
    questions: list[nn.Module] = []
    assert module.teacher is not None
    module.teacher.register_forward_hook(lambda teacher, *_: questions.append(teacher))
    losses = engine.forward_backward(block(), 1.0)
    assert len(questions) == 1
    assert set(losses) == {"total", "source", "mixed", "mfm", "pseudo_weight"}


def test_a_term_alone_draws_what_it_draws_among_the_others() -> None:
    module = build_train_module(load_config(None, [*MIT, EVERY_PIXEL]), CLASSES)
    together = module(block(), 1.0).losses
    alone = {name: module(block(), 1.0, name).losses[name] for name in reversed(module.term_names)}
    assert module.term_names == ("source", "mixed", "mfm")
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_deepspeed_takes_the_backwards_of_a_lean_step_for_one_micro_batch() -> None:
    launch = Launch(world_size=2, rank=0, zero_stage=2)
    plain, lean = (load_config(None, [*SMALL, "train.global_batch=12", *extra]) for extra in ([], [LEAN]))
    assert deepspeed_config(plain, launch)["gradient_accumulation_steps"] == 3
    assert deepspeed_config(lean, launch)["gradient_accumulation_steps"] == 1


def test_an_encoder_without_blocks_is_a_mistake_in_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"memory\.checkpoint_backbone"):
        build_train_module(load_config(None, [*SMALL, CHECKPOINT, "model.backbone=vgg11"]), CLASSES)
