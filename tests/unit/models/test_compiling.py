"""A compiled network gives what the plain one gives, Dropout's draws included."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from mfm_dist.build import build_train_module
from mfm_dist.models.compiling import compile_segmentor
from mfm_dist.models.hrda import HRDASegmentor
from mfm_dist.models.segmentor import build_segmentor
from tests.helpers.modules import block, config_with

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
HRDA = ["method.name=hrda", "hrda.attention_options={width: 8}", "data.crop=64", "model.decoder_options={width: 8}"]


def test_a_run_translates_every_network_but_the_rebuilder(monkeypatch: pytest.MonkeyPatch) -> None:
    translated: set[nn.Module] = set()
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: translated.add(module))
    module = build_train_module(config_with(*HRDA, "train.compile=true"))
    assert module.teacher is not None
    assert module.initial_encoder is not None
    expected = {module.initial_encoder.backbone}
    for segmentor in (module.student, module.teacher.segmentor):
        assert isinstance(segmentor, HRDASegmentor)
        expected |= {segmentor.backbone, segmentor.decoder, segmentor.attention}
    assert translated == expected
    left_out = set(module.parameters()) - {p for part in translated for p in part.parameters()}
    assert left_out == set(module.rebuilder.parameters())  # type: ignore[union-attr]


@NEEDS_COMPILER
@pytest.mark.campaign
def test_a_compiled_step_of_hrda_is_the_plain_one() -> None:
    outputs = []
    for compiles in (False, True):
        module = build_train_module(config_with(*HRDA, f"train.compile={compiles}"))
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
    segmentor = build_segmentor(
        backbone="test_resnet",
        decoder="daformer",
        num_classes=5,
        backbone_options={"out_indices": [4]},
        decoder_options={"width": 8},
    )
    features = [torch.randn(2, segmentor.backbone.channels[0], 4, 4)]
    names = set(segmentor.state_dict())
    torch.manual_seed(1)
    plain = segmentor.decoder(features)
    compile_segmentor(segmentor)
    torch.manual_seed(1)
    translated = segmentor.decoder(features)
    torch.testing.assert_close(translated, plain)
    assert set(segmentor.state_dict()) == names
