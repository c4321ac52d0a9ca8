"""Dropout by masks from outside, and without them as torch and timm have it."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from mfm_dist.models.backbone import Backbone
from mfm_dist.models.dropout import KeyedDropout, dropouts_of, masked, shares_kept


def drawn(layer: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return layer(x)


def test_without_a_mask_it_is_torchs_dropout2d_and_timms_drop_path_bit_for_bit() -> None:
    x = torch.randn(4, 6, 3, 3)
    assert torch.equal(drawn(KeyedDropout(0.3, 6), x), drawn(nn.Dropout2d(0.3), x))
    for shape in ((4, 6, 3, 3), (4, 5, 6), (4, 3, 3, 6)):
        x = torch.randn(shape)
        assert torch.equal(drawn(KeyedDropout(0.3, 1), x), drawn(timm.layers.DropPath(0.3), x))


def test_a_mask_that_is_given_decides_once() -> None:
    paths, channels = KeyedDropout(0.5, 1), KeyedDropout(0.25, 2)
    assert shares_kept([paths, channels]).tolist() == [0.5, 0.75, 0.75]
    x = torch.ones(2, 2, 1, 1)
    masks = torch.tensor([[2.0, 0.0, 4 / 3], [0.0, 4 / 3, 0.0]])
    with masked([paths, channels], masks):
        assert paths(x).flatten().tolist() == [2.0, 2.0, 0.0, 0.0]
        assert torch.equal(channels(x).flatten(1), masks[:, 1:])
        again = drawn(channels, torch.ones(2, 2, 1, 1))
    assert torch.equal(again, drawn(KeyedDropout(0.25, 2), x))
    with masked([paths], torch.zeros(2, 1)):
        pass
    assert paths.mask is None
    assert torch.equal(paths.eval()(x), x)


def test_windows_are_not_images() -> None:
    layer = KeyedDropout(0.5, 1)
    with masked([layer], torch.zeros(2, 1)):
        assert layer(torch.ones(64, 3)).any()


@pytest.mark.parametrize("name", ["mit_b0", "edgenext_xx_small", "mobilevit_xxs"])
def test_the_layers_of_an_encoder_take_masks(name: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name, options={"drop_path_rate": 0.5})
    layers = dropouts_of([backbone])
    assert layers
    assert not any(isinstance(module, timm.layers.DropPath) for module in backbone.modules())
    image = torch.randn(2, 3, 64, 64)

    def last_map(masks: Tensor) -> Tensor:
        torch.manual_seed(0)
        with masked(layers, masks):
            return backbone(image)[-1]

    kept = torch.ones(2, len(layers))
    assert torch.equal(last_map(kept), last_map(kept))
    if name != "mobilevit_xxs":  # whose layers see windows
        assert not torch.equal(last_map(kept), last_map(torch.zeros_like(kept)))
