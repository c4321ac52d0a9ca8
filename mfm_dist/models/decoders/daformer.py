"""The DAFormer decoder: context-aware fusion of all encoder maps (Hoyer et al., CVPR 2022, arXiv 2111.14887)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mfm_dist.errors import ConfigError
from mfm_dist.models.decoders import number_problems
from mfm_dist.models.dropout import KeyedDropout
from mfm_dist.models.layers import ConvNormReLU, SeparableConv, embed_all, init_classifier


class DAFormer(nn.Module):
    """Embeds every map to one width, stacks them at the finest stride, and classifies through a separable ASPP.

    As published, the ASPP has no image-pooling branch.

    Attributes:
        inputs: indices of the encoder maps that are read: all of them.
        stride: image pixels for each logit, that of the finest map.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        width: int,
        dropout: float,
        dilations: Sequence[int],
    ) -> None:
        super().__init__()
        self.inputs = tuple(range(len(channels)))
        self.stride = strides[0]
        self.embeddings = nn.ModuleList(nn.Linear(channel, width) for channel in channels)
        stacked = width * len(channels)
        self.branches = nn.ModuleList(
            ConvNormReLU(stacked, width, 1) if dilation == 1 else SeparableConv(stacked, width, dilation=dilation)
            for dilation in dilations
        )
        self.bottleneck = ConvNormReLU(width * len(dilations), width, 3)
        self.dropout = KeyedDropout(dropout, width)
        self.classifier = init_classifier(nn.Conv2d(width, num_classes, 1))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Turn encoder maps, fine to coarse, into logits [B, num_classes, H / stride, W / stride]."""
        stacked = embed_all(self.embeddings, features)  # [B, width x maps, H / stride, W / stride]
        context = torch.cat([branch(stacked) for branch in self.branches], dim=1)
        return self.classifier(self.dropout(self.bottleneck(context)))


def build(
    channels: Sequence[int],
    strides: Sequence[int],
    num_classes: int,
    *,
    width: int = 256,
    dropout: float = 0.1,
    dilations: Sequence[int] = (1, 6, 12, 18),
) -> DAFormer:
    """Build the DAFormer decoder on all encoder maps.

    Args:
        width: channels of each embedded map and of each ASPP branch (256 as published).
        dropout: probability with which a whole channel is dropped before the classifier (0.1 as published).
        dilations: one ASPP branch for each; 1 is a plain 1x1 convolution, others are separable 3x3 ones.

    Raises:
        ConfigError: a number out of its range.
    """
    if problems := number_problems("daformer", width=width, dropout=dropout, dilations=dilations):
        raise ConfigError(problems)
    return DAFormer(channels, strides, num_classes, width=width, dropout=dropout, dilations=dilations)
