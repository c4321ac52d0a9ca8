"""A micro-batch that is captured once and replayed is the micro-batch itself, whatever the next one brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from mfm_dist.batch import UDABatch
from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.distributed import cuda_graph
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.launch import Launch, combination_problems, graph_problems
from mfm_dist.distributed.start import start_engine
from mfm_dist.errors import ConfigError
from mfm_dist.methods.base import Pass, StepInputs, Term
from mfm_dist.methods.dacs import DACS
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.optim import build_optimizer
from mfm_dist.schedules import ema_decay_at
from mfm_dist.train_module import TrainModule
from tests.helpers.classes import CLASSES
from tests.helpers.methods import EXTRA, METHODS
from tests.helpers.modules import block, config_with
from tests.helpers.recorded_graphs import RecordingEngine

SMALL = [*EXTRA, "data.crop=64", "optim.warmup_steps=0", "optim.lr=1e-3"]
# Few and small blocks: a black image through a random encoder is 0 before each LayerNorm, whose gradient is huge.
MIT = ["model.backbone=mit_b0", "model.backbone_options={drop_path_rate: 0.3, depths: [1, 1, 1, 1]}",
       "mic.mask_block_pixels=4", "mic.mask_ratio=0.3"]  # fmt: skip
"""An encoder that sees the images of all terms in one call."""
JITTER = "self_training.jitter_prob=1"
"""Each block its own; where some are not jittered, the mixed images of two blocks may lie otherwise in memory."""


@pytest.fixture(autouse=True)
def _one_block_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "WARM_UP", 1)


def module_with(*overrides: str) -> TrainModule:
    return build_train_module(config_with(*SMALL, *overrides), CLASSES)


def plain_engine(module: TrainModule) -> Engine:
    engine = start_engine(module.config)
    engine.prepare(module, build_optimizer(module, module.config.optim))
    return engine


def replaying_engine(module: TrainModule) -> RecordingEngine:
    module.config.train.cuda_graph = True
    engine = RecordingEngine(Accelerator(cpu=True), module.config)
    engine.prepare(module, build_optimizer(module, module.config.optim))
    return engine


def batch(number: int) -> UDABatch:
    """A micro-batch that has all that any method looks at, and padding."""
    few, valid = block(number + 100), torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(number)) > 0.1
    labelled = {"labelled_target_image": few.source_image, "labelled_target_label": few.source_label}
    return replace(block(number), target_valid=valid, **labelled)


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)]
    assert not different, different


def gradients(engine: Engine) -> dict[str, Tensor]:
    return {name: p.grad for name, p in engine.module.named_parameters() if p.grad is not None}


def assert_same_steps(replays: Engine, plain: Engine, steps: list[tuple[float, bool]]) -> None:
    """Losses, gradients, weights, statistics and the teacher in every bit, after each step of a lambda.

    Args:
        steps: lambda, and whether the step is measured.
    """
    number, kept = 3, []
    for step, (weight, measure) in enumerate(steps, start=1):
        for _ in range(plain.accumulation):
            losses = [engine.forward_backward(batch(number), weight, measure) for engine in (replays, plain)]
            kept.append(losses)
            assert_same(gradients(replays), gradients(plain))
            number += 1
        results = [engine.step() for engine in (replays, plain)]
        assert all(result.applied for result in results)
        assert torch.equal(results[0].map_norms, results[1].map_norms)
        if plain.module.teacher is not None:
            for engine in (replays, plain):
                engine.update_teacher(ema_decay_at(step, 0.9))
        assert_same(replays.module.state_dict(), plain.module.state_dict())
    for ours, theirs in kept:  # only now: they are read a step late
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_same_steps(name: str) -> None:
    overrides = [*MIT, JITTER, *METHODS[name]]
    replays = replaying_engine(module_with(*overrides))
    assert_same_steps(replays, plain_engine(module_with(*overrides)), [(0.7, False), (0.7, False), (0.2, False)])
    assert (replays.captures, replays.replays) == (1, 2)


@pytest.mark.parametrize("overrides", [[], ["train.precision=bf16", "memory.lean=true"]], ids=["fp32", "bf16, lean"])
def test_what_is_launched_otherwise_is_captured_by_itself(overrides: list[str]) -> None:
    """BatchNorm, which a lambda of 0 leaves alone; two micro-batches a step; a budget, and steps that are measured."""
    overrides = [*overrides, "train.global_batch=4", "mfm.gradient_budget=0.5", "rebuilder.variant=stable", JITTER]
    replays = replaying_engine(module_with(*overrides))
    assert replays.module.encodes_once is False
    steps = [(0.0, False), (0.7, False), (0.3, True), (0.0, False)]
    assert_same_steps(replays, plain_engine(module_with(*overrides)), steps)
    assert (replays.captures, replays.replays) == (3, 5)


def test_blocks_with_and_without_jitter_and_blur() -> None:
    overrides = [*MIT, "self_training.augment_form=fast", "self_training.jitter_prob=0.5"]
    replays = replaying_engine(module_with(*overrides))
    plain = plain_engine(module_with(*overrides))
    assert_same_steps(replays, plain, [(1.0, False)] * 7)
    assert (replays.captures, replays.replays) == (2, 5)
    for engine in (replays, plain):  # as a run that goes back or goes on
        for number, parameter in enumerate(engine.module.parameters()):
            engine.set_parameter(parameter, parameter * (1.0 + 0.01 * (number % 3)))
    assert_same_steps(replays, plain, [(1.0, False)] * 2)
    assert (replays.captures, replays.replays) == (2, 7)


class Planted(DACS):
    """Weighs a loss by a number of Python's own, which each block has of its own."""

    def terms(self) -> Mapping[str, Term]:
        return {**super().terms(), "mixed": self.planted_term}

    def planted_term(self, student: Segmentor, inputs: StepInputs) -> Pass:
        return super().mixed_term(student, inputs).weighted(inputs.block)


def test_a_value_of_the_captured_block_is_found() -> None:
    engines = []
    for make in (replaying_engine, plain_engine):
        module = module_with(*MIT, JITTER)
        module.method = Planted(module.config.self_training)
        engines.append(make(module))
    assert_same_steps(*engines, [(1.0, False), (1.0, False)])
    for engine in engines:
        engine.forward_backward(batch(5), 1.0)
    with pytest.raises(AssertionError, match="student"):
        assert_same(gradients(engines[0]), gradients(engines[1]))


@pytest.mark.parametrize("option", ["proj_drop_rate: 0.1", "attn_drop_rate: 0.1"])
def test_networks_that_draw_by_themselves_are_refused(option: str) -> None:
    engine = replaying_engine(module_with("model.backbone=mit_b0", f"model.backbone_options={{{option}}}"))
    with pytest.raises(ConfigError, match="draw random numbers by torch's own generator"):
        engine.forward_backward(block(), 1.0)


def test_what_cannot_be_captured_is_refused_with_the_reason() -> None:
    on = ["train.cuda_graph=true", "memory.checkpoint_backbone=true", "debug.check_gradients=true"]
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*on, "memory.checkpoint_rebuilder=true"])
    assert len(caught.value.problems) == 3
    assert all("train.cuda_graph" in problem and "turn one off" in problem for problem in caught.value.problems)
    config = load_config(None, ["train.cuda_graph=true"])
    assert graph_problems(config, Launch(1, 0, None), visible=1) == []
    assert graph_problems(load_config(None), Launch(2, 0, 3), visible=0) == []
    (cpu,) = graph_problems(config, Launch(2, 0, None, use_cpu=True), visible=2)
    assert "needs a GPU" in cpu
    (zero,) = combination_problems(config, Launch(2, 0, 2))
    assert "under ZeRO" in zero
    with pytest.raises(ConfigError, match=r"train\.cuda_graph needs a GPU"):
        start_engine(config)
