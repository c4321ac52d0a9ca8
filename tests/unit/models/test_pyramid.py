"""A pyramid of maps from a ViT's tokens: sizes, reach, parameters, and strides that are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mfm_dist.errors import ConfigError
from mfm_dist.models.backbone import Backbone
from mfm_dist.models.pyramid import SimplePyramid


@pytest.mark.parametrize(("rows", "cols"), [(64, 96), (65, 97), (16, 1)])
def test_sizes_round_up(rows: int, cols: int) -> None:
    pyramid = SimplePyramid(8, 16)
    assert pyramid.strides == (4, 8, 16, 32)
    maps = pyramid(torch.randn(2, 8, -(-rows // 16), -(-cols // 16)), (rows, cols))
    for feature, stride in zip(maps, pyramid.strides, strict=True):
        assert feature.shape == (2, 256, -(-rows // stride), -(-cols // stride))


def test_a_place_depends_on_its_neighbourhood_only() -> None:
    torch.manual_seed(0)
    pyramid = SimplePyramid(8, 16)
    feature = torch.randn(1, 8, 8, 8)
    changed = feature.clone()
    changed[..., 0, 0] += 1
    for before, after, reach in zip(
        pyramid(feature, (128, 128)), pyramid(changed, (128, 128)), (5, 3, 2, 2), strict=True
    ):
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


def test_a_stride_of_14_is_refused_with_the_way_out() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="patch_size: 16"):
        Backbone("vit_small_patch14_dinov2", options={"pyramid": True})


def test_pyramid_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="pyramid must be true or false"):
        Backbone("test_vit", options={"pyramid": "yes"})
