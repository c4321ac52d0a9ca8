"""Maps at four strides from an encoder that has one: the simple feature pyramid of ViTDet (arXiv 2203.16527).

It stands before a decoder and is part of it: what MFM hides and the Rebuilder restores are the encoder's own tokens, so
nothing of a hidden one reaches a decoder through the pyramid's convolutions.
"""

from __future__ import annotations

from torch import Tensor, nn

from mfm_dist.models.layers import ChannelLayerNorm

WIDTH = 256
"""Channels of every map (ViTDet)."""


class SimplePyramid(nn.Module):
    """From one map of stride s, four of strides s / 4, s / 2, s and 2 s, which do not see one another.

    Args:
        channels: channels of the map.
        stride: image pixels for each of its positions, 16 or 14 for most plain vision transformers.

    Attributes:
        channels, strides: of the four maps, fine to coarse; 3.5 pixels is the finest of a stride of 14.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = (WIDTH,) * 4
        finest = stride // 4 if stride % 4 == 0 else stride / 4
        self.strides: tuple[float, ...] = (finest, stride // 2, stride, stride * 2)
        half, quarter = channels // 2, channels // 4
        self.levels = nn.ModuleList(
            [
                nn.Sequential(_doubling(channels, half), ChannelLayerNorm(half), nn.GELU(), _doubling(half, quarter)),
                _doubling(channels, half),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, WIDTH, 1, bias=False),
                ChannelLayerNorm(WIDTH),
                nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
                ChannelLayerNorm(WIDTH),
            )
            for width in (quarter, half, channels, channels)
        )

    def forward(self, feature: Tensor) -> list[Tensor]:
        """Turn one map [B, C, h, w] into four of 256 channels, 4 h, 2 h, h and h / 2 (rounded up) positions high."""
        return [output(level(feature)) for level, output in zip(self.levels, self.outputs, strict=True)]


class PyramidDecoder(nn.Module):
    """A decoder that reads a pyramid of the encoder's one map.

    Attributes:
        inputs, stride: as every decoder has them.
    """

    def __init__(self, pyramid: SimplePyramid, decoder: nn.Module) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.decoder = decoder
        self.inputs = (0,)
        self.stride = decoder.stride

    def forward(self, features: list[Tensor]) -> Tensor:
        """Turn the one map [B, C, h, w] into logits at the decoder's resolution."""
        logits: Tensor = self.decoder(self.pyramid(features[-1]))
        return logits


def _doubling(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """Build a layer from [B, in_channels, h, w] to [B, out_channels, 2h, 2w]."""
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
