"""A pyramid of maps from a ViT's tokens: sizes, reach and parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mfm_dist.errors import ConfigError
from mfm_dist.models.backbone import Backbone
from mfm_dist.models.pyramid import SimplePyramid


@pytest.mark.parametrize(("rows", "cols", "patch"), [(64, 96, 16), (80, 112, 16), (16, 16, 16), (56, 42, 14)])
def test_sizes_round_up(rows: int, cols: int, patch: int) -> None:
    pyramid = SimplePyramid(8, patch)
    assert pyramid.strides == {16: (4, 8, 16, 32), 14: (3.5, 7, 14, 28)}[patch]
    maps = pyramid(torch.randn(2, 8, rows // patch, cols // patch))
    for feature, stride in zip(maps, pyramid.strides, strict=True):
        assert feature.shape == (2, 256, math.ceil(rows / stride), math.ceil(cols / stride))


def test_a_place_depends_on_its_neighbourhood_only() -> None:
    torch.manual_seed(0)
    pyramid = SimplePyramid(8, 16)
    feature = torch.randn(1, 8, 8, 8)
    changed = feature.clone()
    changed[..., 0, 0] += 1
    for before, after, reach in zip(pyramid(feature), pyramid(changed), (5, 3, 2, 2), strict=True):
        differs = (before != after).any(1)[0]
        assert differs[0, 0]
        assert not differs[reach:].any()
        assert not differs[:, reach:].any()


def test_parameters_written_out() -> None:
    c, w = 384, 256
    half, quarter = c // 2, c // 4
    doublings = (c * half * 4 + half) + 2 * half + (half * quarter * 4 + quarter) + (c * half * 4 + half)
    outputs = sum(width * w + 2 * w + w * w * 9 + 2 * w for width in (quarter, half, c, c))
    assert sum(p.numel() for p in SimplePyramid(c, 16).parameters()) == doublings + outputs


def test_its_norms_have_the_epsilon_of_torch() -> None:
    norms = [module for module in SimplePyramid(8, 16).modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 9
    assert {norm.eps for norm in norms} == {1e-5}


def test_pyramid_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="pyramid must be true or false"):
        Backbone("test_vit", options={"pyramid": "yes"})
