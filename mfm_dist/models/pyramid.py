"""Maps at four strides from an encoder that has one: the simple feature pyramid of ViTDet (arXiv 2203.16527)."""

from __future__ import annotations

from torch import Tensor, nn

from mfm_dist.errors import ConfigError
from mfm_dist.models.layers import ChannelLayerNorm

WIDTH = 256
"""Channels of every map (ViTDet)."""


class SimplePyramid(nn.Module):
    """From one map of stride s, four of strides s / 4, s / 2, s and 2 s, which do not see one another.

    Args:
        channels: channels of the map.
        stride: image pixels for each of its positions, 16 for most plain vision transformers.

    Attributes:
        channels, strides: of the four maps, fine to coarse.

    Raises:
        ConfigError: a stride that four does not divide.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        if stride % 4:
            raise ConfigError(
                f"model.backbone_options: pyramid needs an encoder whose stride is a multiple of 4, this one has "
                f"{stride}; a plain vision transformer takes patch_size: 16 (timm resizes its weights)"
            )
        self.channels = (WIDTH,) * 4
        self.strides = (stride // 4, stride // 2, stride, stride * 2)
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

    def forward(self, feature: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """Turn one map [B, C, ceil(H / s), ceil(W / s)] into four, the i-th [B, 256, ceil(H / s_i), ceil(W / s_i)].

        Args:
            feature: the map; it may reach beyond the image, as that of a padded image does.
            size: height and width of the image in pixels, H and W.
        """
        maps = []
        for level, output, stride in zip(self.levels, self.outputs, self.strides, strict=True):
            rows, cols = (-(-side // stride) for side in size)
            maps.append(output(level(feature)[:, :, :rows, :cols]))
        return maps


def _doubling(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """Build a layer from [B, in_channels, h, w] to [B, out_channels, 2h, 2w]."""
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
