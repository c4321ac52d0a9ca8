"""DeepLabV3+: a separable ASPP on the last encoder map, refined by the first (Chen et al., arXiv 1802.02611)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mfm_dist.errors import ConfigError
from mfm_dist.models.decoders import number_problems
from mfm_dist.models.dropout import KeyedDropout
from mfm_dist.models.layers import ConvNormReLU, SeparableConv, init_classifier, resize


class DeepLabV3Plus(nn.Module):
    """Context from the last map, edges from the first.

    Attributes:
        inputs: indices of the encoder maps that are read: the first and the last.
        stride: image pixels for each logit, that of the first map.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        width: int,
        low_level_width: int,
        dropout: float,
        dilations: Sequence[int],
        norm: bool,
    ) -> None:
        super().__init__()
        self.inputs = (0, len(channels) - 1)
        self.stride = strides[0]
        last = channels[-1]
        self.image_pool = ConvNormReLU(last, width, 1, norm=norm)
        self.branches = nn.ModuleList(
            ConvNormReLU(last, width, 1, norm=norm)
            if dilation == 1
            else SeparableConv(last, width, dilation=dilation, norm=norm)
            for dilation in dilations
        )
        self.bottleneck = ConvNormReLU(width * (len(dilations) + 1), width, 3, norm=norm)
        self.low_level = ConvNormReLU(channels[0], low_level_width, 1, norm=norm)
        self.refine = nn.Sequential(
            SeparableConv(width + low_level_width, width, dilation=1, norm=norm),
            SeparableConv(width, width, dilation=1, norm=norm),
        )
        self.dropout = KeyedDropout(dropout, width)
        self.classifier = init_classifier(nn.Conv2d(width, num_classes, 1))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Turn encoder maps, fine to coarse, into logits [B, num_classes, H / stride, W / stride]."""
        first, last = features[0], features[-1]
        pooled = self.image_pool(last.mean(dim=(2, 3), keepdim=True))  # [B, width, 1, 1]
        context = [resize(pooled, last.shape[-2:]), *(branch(last) for branch in self.branches)]
        fused = self.bottleneck(torch.cat(context, dim=1))  # [B, width, h, w]
        edges = self.low_level(first)  # [B, low_level_width, H / stride, W / stride]
        refined = self.refine(torch.cat([resize(fused, first.shape[-2:]), edges], dim=1))
        return self.classifier(self.dropout(refined))


def build(
    channels: Sequence[int],
    strides: Sequence[int],
    num_classes: int,
    *,
    width: int = 512,
    low_level_width: int = 48,
    dropout: float = 0.1,
    dilations: Sequence[int] = (1, 12, 24, 36),
    norm: bool = False,
) -> DeepLabV3Plus:
    """Build DeepLabV3+ on the first and the last encoder map.

    Args:
        width: channels of each ASPP branch and of the refinement (512 as published for ResNet-101).
        low_level_width: channels that the first map is reduced to (48 as published).
        dropout: probability with which a whole channel is dropped before the classifier (0.1 as published).
        dilations: one ASPP branch for each; 1 is a plain 1x1 convolution, others are separable 3x3 ones. The defaults
            are for stride 8.
        norm: BatchNorm after each convolution of the decoder. The original has it; UDA comparisons leave it out, as
            it mixes the statistics of the domains. With it, training needs at least 2 images in a micro-batch: after
            image pooling there is one value for each image and channel.

    Raises:
        ConfigError: a value that cannot be used, or an encoder with a single map.
    """
    problems = number_problems("deeplabv3plus", width=width, dropout=dropout, dilations=dilations)
    if low_level_width < 1:
        problems.append(f"decoder deeplabv3plus: low_level_width must be at least 1, got {low_level_width}")
    if not isinstance(norm, bool):
        problems.append(f"decoder deeplabv3plus: norm must be true or false, got {norm!r}")
    if len(channels) < 2:
        problems.append("decoder deeplabv3plus: needs at least two encoder maps; see out_indices of the encoder")
    if problems:
        raise ConfigError(problems)
    return DeepLabV3Plus(
        channels,
        strides,
        num_classes,
        width=width,
        low_level_width=low_level_width,
        dropout=dropout,
        dilations=dilations,
        norm=norm,
    )
