"""Small layers that the decoders and the Rebuilder share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W], at each position by itself.

    Unlike ``GroupNorm(1, C)`` it never mixes positions, so a hidden cell cannot change the scale of a visible one.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNormReLU(nn.Sequential):
    """Convolution, BatchNorm, ReLU; the output has the input's height and width.

    The weights are Kaiming-normal (fan-out, ReLU), as in the published DAFormer and HRDA decoders. With ``norm`` the
    convolution has no bias; without, it has one and the BatchNorm is missing.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        dilation: int = 1,
        depthwise: bool = False,
        norm: bool = True,
    ) -> None:
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=in_channels if depthwise else 1,
            bias=not norm,
        )
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        super().__init__(conv, *([nn.BatchNorm2d(out_channels)] if norm else []), nn.ReLU(inplace=True))


class SeparableConv(nn.Sequential):
    """A 3x3 depthwise convolution, then a 1x1 convolution, each with BatchNorm (if ``norm``) and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, dilation: int, norm: bool = True) -> None:
        super().__init__(
            ConvNormReLU(in_channels, in_channels, 3, dilation=dilation, depthwise=True, norm=norm),
            ConvNormReLU(in_channels, out_channels, 1, norm=norm),
        )


def embed_all(embeddings: nn.ModuleList, features: list[Tensor]) -> Tensor:
    """Put each map through its linear layer, to the finest's size, and side by side: [B, sum of widths, h, w].

    Args:
        embeddings: a ``Linear`` for each map.
        features: maps, fine to coarse; h and w are those of the first.
    """
    embedded = []
    for embedding, feature in zip(embeddings, features, strict=True):
        tokens = embedding(feature.permute(0, 2, 3, 1))  # [B, h_i, w_i, width]
        # Autocast enlarges in fp32: what reads these maps wants them as they were, once and not each for itself.
        embedded.append(resize(tokens.permute(0, 3, 1, 2), features[0].shape[-2:]).to(tokens.dtype))
    return torch.cat(embedded, dim=1)


def init_classifier(conv: nn.Conv2d) -> nn.Conv2d:
    """Initialise a convolution that emits logits: normal with std 0.01, bias zero (DAFormer, DeepLabV2)."""
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize [B, C, h, w] to [B, C, *size] bilinearly; return the tensor itself when it already has that size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


@contextmanager
def batch_norm_untracked(module: nn.Module) -> Iterator[None]:
    """Have BatchNorm layers go on normalising with batch statistics, but leave their running statistics alone."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
