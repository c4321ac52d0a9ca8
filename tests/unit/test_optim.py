"""Learning rates, lambda's ramp and parameter groups against published numbers."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import MFMSection, OptimSection
from mfm_dist.errors import ConfigError
from mfm_dist.models.pyramid import PyramidDecoder
from mfm_dist.optim import build_optimizer, parameter_groups
from mfm_dist.schedules import (
    averaged_norms,
    learning_rate_factor,
    mfm_weight,
    within_budget,
)
from tests.helpers.classes import CLASSES


@pytest.mark.parametrize(
    ("step", "rate"), [(49, 1.9577e-6), (99, 3.9503e-6), (750, 2.9438e-5), (1500, 5.775e-5), (20_000, 3.0e-5)]
)
def test_learning_rate_has_the_published_values(step: int, rate: float) -> None:
    """UDA_FACTS 3.3: as in the logs of the published runs."""
    factor = learning_rate_factor(step, steps=40_000, warmup_steps=1500, warmup_ratio=1e-6)
    assert 6e-5 * factor == pytest.approx(rate, rel=3e-5)  # as many digits as the logs show


def test_learning_rate_without_warmup_decays_to_zero() -> None:
    factors = [learning_rate_factor(step, steps=4, warmup_steps=0, warmup_ratio=1e-6) for step in range(5)]
    assert factors == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_lambda_is_constant_by_default_and_ramps_on_request() -> None:
    assert {mfm_weight(step, MFMSection()) for step in (0, 1, 39_999)} == {1.0}
    ramped = MFMSection(loss_weight=2.0, ramp_from=10, ramp_to=20)
    assert [mfm_weight(step, ramped) for step in (0, 10, 15, 20, 99)] == [0.0, 0.0, 1.0, 2.0, 2.0]
    assert [mfm_weight(step, MFMSection(ramp_from=5, ramp_to=5)) for step in (4, 5)] == [0.0, 1.0]


def test_the_budget_lowers_lambda_to_a_share_of_the_methods_gradient() -> None:
    assert within_budget(2.0, [], 0.5) == 2.0  # nothing seen yet
    assert within_budget(2.0, [4.0, 0.5], 0.5) == 2.0  # 2 x .5 is within half of 4
    assert within_budget(2.0, [4.0, 8.0], 0.5) == 0.25  # .25 x 8 is half of 4
    assert within_budget(2.0, [4.0, 8.0], 0.0) == 2.0  # off
    assert within_budget(0.0, [4.0, 8.0], 0.5) == 0.0
    assert within_budget(2.0, [4.0, 0.0], 0.5) == 2.0


def test_norms_are_averaged_as_those_of_a_weight_of_one() -> None:
    first = averaged_norms([], [4.0, 2.0], 0.5)
    assert first == [4.0, 4.0]
    assert averaged_norms(first, [14.0, 2.0], 1.0) == pytest.approx([5.0, 3.8])
    assert averaged_norms(first, [14.0, 0.0], 0.0) == first  # a term that is off says nothing


def test_a_scaled_rate_is_of_wide_matrices_alone() -> None:
    network = ["model.backbone=test_resnet", "model.decoder=deeplabv2", "mfm.enabled=true", "rebuilder.heads=2"]
    module = build_train_module(
        load_config(None, [*network, "rebuilder.variant=stable", "rebuilder.width=64"]), CLASSES
    )
    assert module.rebuilder is not None
    plain = {group["name"]: group for group in parameter_groups(module, OptimSection())}
    assert set(plain) == {"encoder", "decoder", "rebuilder", "rebuilder_norm"}
    groups = {g["name"]: g for g in parameter_groups(module, OptimSection(rebuilder_base_width=16))}
    assert groups["rebuilder_wide"]["base_lr"] == pytest.approx(2e-4 / 4)
    assert groups["rebuilder_wide"]["eps"] == pytest.approx(1e-8 / 4)
    assert groups["rebuilder"]["base_lr"] == groups["rebuilder_norm"]["base_lr"] == 2e-4
    wide = {id(p) for p in module.rebuilder.wide_matrices()}
    assert {id(p) for p in groups["rebuilder_wide"]["params"]} == wide
    both = [*groups["rebuilder"]["params"], *groups["rebuilder_wide"]["params"]]
    assert {id(p) for p in both} == {id(p) for p in plain["rebuilder"]["params"]}
    narrow = {g["name"]: g for g in parameter_groups(module, OptimSection(rebuilder_base_width=512))}
    assert narrow["rebuilder_wide"]["base_lr"] == 2e-4, "no Rebuilder learns faster than it is told"
    assert {group["part"] for group in groups.values()} == {"encoder", "decoder", "rebuilder"}


def test_groups_hold_every_trainable_parameter_once_with_its_own_rate_and_decay() -> None:
    config = load_config(None, ["model.backbone=mit_b0", "mfm.enabled=true", "rebuilder.width=32", "rebuilder.heads=2"])
    module = build_train_module(config, CLASSES)
    groups = {group["name"]: group for group in parameter_groups(module, OptimSection())}
    rates = {name: group["base_lr"] for name, group in groups.items()}
    assert rates["encoder"] == rates["encoder_norm"] == 6e-5
    assert rates["decoder"] == pytest.approx(6e-4)
    assert rates["rebuilder"] == rates["rebuilder_norm"] == 2e-4
    grouped = [p for group in groups.values() for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in module.parameters() if p.requires_grad}
    assert not set(grouped) & set(module.teacher.parameters())  # type: ignore[union-attr]
    assert all(group["weight_decay"] == (0.0 if name.endswith("_norm") else 0.01) for name, group in groups.items())
    # BatchNorm decays (as published), LayerNorm does not.
    batch_norms = [p for m in module.student.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert set(batch_norms) <= set(groups["decoder"]["params"])
    layer_norms = [p for m in module.student.backbone.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    assert set(layer_norms) == set(groups["encoder_norm"]["params"])


SMALL_VIT = [
    "model.backbone=vit_small_patch14_dinov2",
    "model.backbone_options={embed_dim: 16, depth: 3, num_heads: 2, img_size: 64, patch_size: 16, pyramid: true, "
    "dynamic_img_size: true}",
    "model.decoder_options={width: 8}",
]


def test_a_pyramid_learns_as_the_decoder_does() -> None:
    module = build_train_module(load_config(None, SMALL_VIT), CLASSES)
    backbone, decoder = module.student.backbone, module.student.decoder
    assert isinstance(decoder, PyramidDecoder)
    grouped = [(p, g["base_lr"]) for g in parameter_groups(module, OptimSection(lr=1.0)) for p in g["params"]]
    rates = dict(grouped)
    assert len(grouped) == len(rates)
    assert set(rates) == set(module.student.parameters())
    assert {rates[p] for p in backbone.parameters()} == {1.0}
    assert {rates[p] for p in decoder.pyramid.parameters()} == {10.0}


def test_layers_learn_the_slower_the_earlier_they_are_and_count_as_one_part() -> None:
    module = build_train_module(load_config(None, SMALL_VIT), CLASSES)
    groups = parameter_groups(module, OptimSection(lr=1.0, layer_decay=0.5))
    rates = {p: group["base_lr"] for group in groups for p in group["params"]}
    assert set(rates) == set(module.student.parameters())
    assert sum(len(group["params"]) for group in groups) == len(rates)
    for name, parameter in module.student.backbone.net.model.named_parameters():
        number = re.match(r"blocks\.(\d)", name)
        expected = {"0": 0.25, "1": 0.5, "2": 1.0}[number[1]] if number else 1.0 if name.startswith("norm") else 0.125
        assert rates[parameter] == expected, name
    assert {(group["part"], group["name"].removesuffix("_norm")) for group in groups} == {
        ("encoder", "encoder"),
        ("decoder", "decoder"),
    }
    assert [g["base_lr"] for g in groups if g["name"] == "encoder"] == [0.125, 0.25, 0.5, 1.0], "the last is logged"
    (plain, without) = (parameter_groups(module, OptimSection(layer_decay=decay)) for decay in (1.0, 0.999))
    assert [g["name"] for g in plain] == ["encoder", "encoder_norm", "decoder", "decoder_norm"]
    assert len(without) == 9  # four layers, of which the embedding has no LayerNorm, and two groups of the decoder


def test_what_is_frozen_is_in_no_group() -> None:
    module = build_train_module(load_config(None, [*SMALL_VIT, "model.freeze=true"]), CLASSES)
    groups = parameter_groups(module, OptimSection(layer_decay=0.5))
    assert {group["part"] for group in groups} == {"decoder"}
    grouped = {p for group in groups for p in group["params"]}
    assert grouped == set(module.student.decoder.parameters())


def test_an_encoder_without_blocks_has_no_layers_to_slow() -> None:
    config = load_config(None, ["model.backbone=regnetx_002", "optim.layer_decay=0.9", "model.decoder=deeplabv2"])
    with torch.device("meta"), pytest.raises(ConfigError, match=r"optim\.layer_decay: regnetx_002 has no blocks"):
        build_train_module(config, CLASSES)


def test_optimisers() -> None:
    module = build_train_module(load_config(None, ["model.backbone=test_resnet", "model.decoder=deeplabv2"]), CLASSES)
    adamw = build_optimizer(module, OptimSection())
    assert adamw.defaults["betas"] == (0.9, 0.999)
    assert adamw.defaults["eps"] == 1e-8
    assert build_optimizer(module, OptimSection(name="sgd")).defaults["momentum"] == 0.9
