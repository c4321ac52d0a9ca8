"""The DeepLabV3+ decoder against its published sizes and its functional form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfm_dist.errors import ConfigError
from mfm_dist.models.decoders import build_decoder

RESNET = {"channels": (256, 512, 1024, 2048), "strides": (4, 8, 8, 8), "num_classes": 19}
SMALL = {"width": 6, "low_level_width": 3, "dilations": (1, 2, 3)}


@pytest.mark.parametrize(("norm", "count"), [(True, 17_697_923), (False, 17_686_563)])
def test_parameter_counts_of_the_published_variants(norm: bool, count: int) -> None:
    with torch.device("meta"):
        decoder = build_decoder("deeplabv3plus", **RESNET, options={"norm": norm})
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count


def test_without_norm_is_the_default_and_means_no_batch_norm_but_biases() -> None:
    decoder = build_decoder("deeplabv3plus", (4, 8), (4, 8), 5, SMALL)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in decoder.modules())
    convolutions = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.bias is not None and not conv.bias.any() for conv in convolutions)


def _functional(decoder: nn.Module, first: Tensor, last: Tensor, *, norm: bool) -> Tensor:
    """The published head written out, in eval mode with fresh BatchNorm (which then only rescales)."""
    weights = dict(decoder.named_parameters())
    scale = (1 + 1e-5) ** -0.5 if norm else 1.0

    def conv(x: Tensor, name: str, **options: int) -> Tensor:
        bias = None if norm else weights[f"{name}.0.bias"]
        return (F.conv2d(x, weights[f"{name}.0.weight"], bias, **options) * scale).relu()

    def separable(x: Tensor, name: str, dilation: int) -> Tensor:
        x = conv(x, f"{name}.0", padding=dilation, dilation=dilation, groups=x.shape[1])
        return conv(x, f"{name}.1")

    pooled = conv(last.mean((2, 3), keepdim=True), "image_pool").expand(-1, -1, *last.shape[2:])
    context = [pooled, conv(last, "branches.0"), separable(last, "branches.1", 2), separable(last, "branches.2", 3)]
    x = conv(torch.cat(context, 1), "bottleneck", padding=1)
    x = F.interpolate(x, size=first.shape[2:], mode="bilinear", align_corners=False)
    x = separable(torch.cat([x, conv(first, "low_level")], 1), "refine.0", 1)
    x = separable(x, "refine.1", 1)
    return F.conv2d(x, weights["classifier.weight"], weights["classifier.bias"])


@pytest.mark.parametrize("norm", [True, False])
def test_equals_the_functional_form(norm: bool) -> None:
    torch.manual_seed(0)
    decoder = build_decoder("deeplabv3plus", (4, 5, 8), (4, 8, 8), 5, {**SMALL, "norm": norm}).eval()
    for parameter in decoder.parameters():
        if parameter.ndim == 1 and not norm:
            nn.init.normal_(parameter)
    maps = [torch.randn(2, 4, 12, 16), torch.randn(2, 5, 6, 8), torch.randn(2, 8, 6, 8)]
    torch.testing.assert_close(decoder(maps), _functional(decoder, maps[0], maps[2], norm=norm))


def test_reads_the_first_and_the_last_map_at_the_finest_stride() -> None:
    decoder = build_decoder("deeplabv3plus", **RESNET, options={"width": 4})
    assert decoder.inputs == (0, 3)
    assert decoder.stride == 4


@pytest.mark.parametrize("norm", [True, False])
def test_trains_with_and_without_norm(norm: bool) -> None:
    torch.manual_seed(0)
    decoder = build_decoder("deeplabv3plus", (4, 8), (4, 8), 5, {**SMALL, "norm": norm})
    decoder([torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_every_wrong_value_is_listed() -> None:
    options = {"width": 0, "low_level_width": 0, "dropout": 1.0, "dilations": [], "norm": 1}
    with pytest.raises(ConfigError) as caught:
        build_decoder("deeplabv3plus", **RESNET, options=options)
    assert len(caught.value.problems) == 5
    with pytest.raises(ConfigError, match="at least two encoder maps"):
        build_decoder("deeplabv3plus", (8,), (8,), 5)
