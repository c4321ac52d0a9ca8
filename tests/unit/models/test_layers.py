"""The decoders' layers against their definitions."""

from __future__ import annotations

import torch
from torch import nn

from mfm_dist.models.layers import ChannelLayerNorm, ConvNormReLU, SeparableConv, init_classifier, resize


def test_channel_layer_norm_normalises_each_position_by_itself() -> None:
    torch.manual_seed(0)
    norm = ChannelLayerNorm(5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 3, 4)
    expected = torch.empty_like(x)
    for b in range(2):
        for row in range(3):
            for col in range(4):
                column = x[b, :, row, col]
                centred = column - column.mean()
                expected[b, :, row, col] = centred / (centred.square().mean() + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)


def test_resize_returns_the_same_tensor_when_nothing_changes() -> None:
    x = torch.randn(1, 2, 3, 5)
    assert resize(x, (3, 5)) is x
    assert resize(x, (6, 4)).shape == (1, 2, 6, 4)


def test_resize_places_pixel_centres_at_halves() -> None:
    # Without align_corners, doubling [0, 1] samples the source at -0.25, 0.25, 0.75 and 1.25, clamped to the ends.
    x = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(resize(x, (1, 4)).flatten(), torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_blocks_keep_the_size_and_never_emit_negative_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 7)
    for block in (ConvNormReLU(6, 4, 1), ConvNormReLU(6, 4, 3, dilation=6), SeparableConv(6, 4, dilation=12)):
        out = block(x)
        assert out.shape == (2, 4, 9, 7)
        assert out.min() >= 0


def test_separable_conv_equals_a_full_convolution_of_rank_one_kernels() -> None:
    torch.manual_seed(0)
    block = SeparableConv(3, 4, dilation=2).eval()  # fresh BatchNorm in eval mode divides by sqrt(1 + eps) only
    x = torch.rand(1, 3, 8, 8)
    depthwise, pointwise = block[0][0].weight, block[1][0].weight
    scale = (1 + 1e-5) ** -0.5
    middle = torch.stack(
        [nn.functional.conv2d(x[:, c : c + 1], depthwise[c : c + 1], padding=2, dilation=2)[0, 0] for c in range(3)]
    )
    middle = (middle * scale).relu()
    expected = (torch.einsum("oc,chw->ohw", pointwise[:, :, 0, 0], middle) * scale).relu()
    torch.testing.assert_close(block(x)[0], expected)


def test_convolution_weights_are_kaiming_normal_by_fan_out() -> None:
    torch.manual_seed(0)
    weight = ConvNormReLU(64, 128, 3)[0].weight
    assert abs(weight.std().item() / (2 / (128 * 9)) ** 0.5 - 1) < 0.02


def test_classifier_starts_small_and_unbiased() -> None:
    torch.manual_seed(0)
    conv = init_classifier(nn.Conv2d(256, 19, 3))
    assert abs(conv.weight.std().item() / 0.01 - 1) < 0.02
    assert conv.bias is not None
    assert not conv.bias.any()
