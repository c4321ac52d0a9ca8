"""A compiled network gives what the plain one gives, Dropout's draws included."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from mfm_dist.build import build_train_module
from mfm_dist.models.hrda import HRDASegmentor
from tests.helpers.classes import CLASSES
from tests.helpers.modules import block, config_with

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
HRDA = ["method.name=hrda", "hrda.attention_options={width: 8}", "data.crop=64", "model.decoder_options={width: 8}"]


def test_a_run_compiles_every_network_and_of_the_rebuilder_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: set[nn.Module] = set()
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.add(module))
    module = build_train_module(config_with(*HRDA, "train.compile=true"), CLASSES)
    assert module.teacher is not None
    assert module.initial_encoder is not None
    expected = {module.initial_encoder.backbone}
    for segmentor in (module.student, module.teacher.segmentor):
        assert isinstance(segmentor, HRDASegmentor)
        expected |= {segmentor.backbone, segmentor.decoder, segmentor.attention}
    assert module.rebuilder is not None
    assert compiled == expected | set(module.rebuilder.blocks)
    left_out = set(module.parameters()) - {p for part in compiled for p in part.parameters()}
    assert left_out == set(module.rebuilder.parameters()) - set(module.rebuilder.blocks.parameters())


@NEEDS_COMPILER
@pytest.mark.campaign
def test_a_compiled_step_of_hrda_is_the_plain_one() -> None:
    outputs = []
    for compiles in (False, True):
        module = build_train_module(config_with(*HRDA, f"train.compile={compiles}"), CLASSES)
        output = module(block(), 1.0)
        output.total.backward()
        outputs.append((output.losses, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}))
    (plain, gradients), (compiled, theirs) = outputs
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (theirs[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name


@NEEDS_COMPILER
def test_it_is_the_same_function() -> None:
    options = ["model.backbone=test_resnet", "model.backbone_options={out_indices: [4]}"]
    outputs = []
    for compiles in (False, True):
        student = build_train_module(config_with(*options, f"train.compile={compiles}"), CLASSES).student
        assert student.training
        torch.manual_seed(1)
        features = [torch.randn(2, student.backbone.channels[0], 4, 4)]
        outputs.append((student.decoder(features), student.state_dict()))
    (plain, weights), (compiled, theirs) = outputs
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(theirs, weights)
