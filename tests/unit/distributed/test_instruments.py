"""What a log line measures of MFM, each against the obvious way to find it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mfm_dist.build import build_train_module
from mfm_dist.config.schema import MFMSection
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.start import start_engine
from mfm_dist.methods.mfm import keyed_masks, rebuild
from mfm_dist.models.rebuilder import hidden_places
from mfm_dist.optim import build_optimizer
from mfm_dist.run.logging import StepLog
from mfm_dist.train_module import TrainModule
from tests.helpers.classes import CLASSES
from tests.helpers.modules import block, config_with

SURE = "self_training.pseudo_threshold=0"


def module_with(*overrides: str) -> TrainModule:
    return build_train_module(config_with(SURE, *overrides), CLASSES)


def engine_of(module: TrainModule) -> Engine:
    engine = start_engine(module.config)
    engine.prepare(module, build_optimizer(module, module.config.optim))
    return engine


@pytest.mark.parametrize("loss_on", ["all", "hidden"])
def test_the_loss_where_hidden_and_where_visible(loss_on: str) -> None:
    module = module_with(f"mfm.loss_on={loss_on}", "method.name=source_only")
    module.student.eval()
    measured = module(block(), 1.0, measure=True).measured
    inputs = module.step_inputs(block())
    assert inputs.pseudo is not None
    features = module.student.encode(inputs.target_image)
    mask = keyed_masks(inputs, (4, 4), MFMSection())
    logits = module.student.decode(rebuild(module.student, module.rebuilder, features, mask))
    label = inputs.pseudo.label
    errors = F.cross_entropy(F.interpolate(logits, label.shape[1:], mode="bilinear"), label, reduction="none")
    hidden = hidden_places(mask, label)
    assert float(measured["mfm/loss_hidden"]) == pytest.approx(float(errors[hidden].mean()), rel=1e-5)
    assert float(measured["mfm/loss_visible"]) == pytest.approx(float(errors[~hidden].mean()), rel=1e-5)


def test_nothing_is_measured_unless_asked_and_measuring_changes_no_bit() -> None:
    outputs = []
    for measure in (False, True):
        module = module_with("rebuilder.variant=stable", "mfm.gradient_budget=0")
        output = module(block(), 1.0, measure=measure)
        output.total.backward()
        outputs.append((output, {n: p.grad for n, p in module.named_parameters() if p.requires_grad}))
    (plain, gradients), (other, theirs) = outputs
    assert plain.measured == {}
    assert sorted(other.measured) == [
        "mfm/loss_hidden", "mfm/loss_visible", "rebuilder/max_logit", "rebuilder/token_variation",
    ]  # fmt: skip
    assert torch.equal(plain.total, other.total)
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("lean", [False, True])
def test_gradients_at_the_last_map_are_those_of_each_term(lean: bool) -> None:
    """Of DACS: source and mixed image on one side, the target's, times lambda, on the other."""
    weight = 0.5
    overrides = ["train.global_batch=4", "train.micro_batch=2", f"memory.lean={lean}"]
    module = module_with(*overrides)
    engine = engine_of(module)
    for number in (3, 4):
        engine.forward_backward(block(number), weight, measure=True)
    norms = engine.step().map_norms

    module, squares = module_with(*overrides), [0.0, 0.0]
    for number in (3, 4):
        maps: list[torch.Tensor] = []
        module.student.backbone.register_forward_hook(lambda _m, _i, out, maps=maps: maps.append(out[-1]))
        total = module(block(number), weight).total / 2
        trained = [map_ for map_ in maps if map_.requires_grad]
        assert len(trained) == 3  # source, mixed, target
        found = torch.autograd.grad(total, trained)
        for place, gradient in zip((0, 0, 1), found, strict=True):
            squares[place] += float(gradient.square().sum())
    assert norms.tolist() == pytest.approx([square**0.5 for square in squares], rel=1e-4)


def test_without_measuring_or_a_budget_no_map_is_watched() -> None:
    module = module_with()
    engine = engine_of(module)
    engine.forward_backward(block(), 1.0)
    assert engine.step().map_norms.tolist() == [0.0, 0.0]
    module = module_with("mfm.gradient_budget=0.5")
    engine = engine_of(module)
    engine.forward_backward(block(), 1.0)
    assert engine.step().map_norms.gt(0).all()


def test_the_update_is_how_far_the_weights_went() -> None:
    overrides = ["rebuilder.variant=stable", "optim.weight_decay=0", "train.micro_batch=2"]
    module = module_with(*overrides)
    engine = engine_of(module)
    assert module.rebuilder is not None
    assert engine.update_squares("rebuilder").tolist() == [0.0, 0.0, 0.0]
    log = StepLog(engine, images_per_step=4)
    for number in (3, 4, 5):
        before = [p.detach().clone() for p in module.rebuilder.parameters()]
        log.add(engine.forward_backward(block(number), 1.0, measure=True))
        log.measured_step(1.0, engine.step().map_norms)
    record: dict[str, Any] = log.record(3)
    after = list(module.rebuilder.parameters())
    moved = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)) ** 0.5
    size = sum(float(a.square().sum()) for a in after) ** 0.5
    assert record["rebuilder/update_over_weight"] == pytest.approx(moved / size, rel=1e-3)
    rates = {id(p): group["lr"] for group in engine.optimizer.param_groups for p in group["params"]}
    steps = [(a - b) / rates[id(a)] for a, b in zip(after, before, strict=True)]
    rms = (sum(float(s.square().sum()) for s in steps) / sum(s.numel() for s in steps)) ** 0.5
    assert record["rebuilder/update_rms"] == pytest.approx(rms, rel=1e-2)
    assert record["mfm/lambda_eff"] == 1.0
    assert record["mfm/grad_ratio"] > 0
