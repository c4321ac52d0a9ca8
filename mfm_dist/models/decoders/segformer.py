"""The SegFormer decoder: a linear fusion of all encoder maps (Xie et al., NeurIPS 2021, arXiv 2105.15203)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mfm_dist.errors import ConfigError
from mfm_dist.models.decoders import number_problems
from mfm_dist.models.dropout import KeyedDropout
from mfm_dist.models.layers import ConvNormReLU, embed_all, init_classifier


class SegFormer(nn.Module):
    """Embeds every map to one width, stacks them at the finest stride, and classifies each position by itself.

    With width 256 this is the scale attention of HRDA, too.

    Attributes:
        inputs: indices of the encoder maps that are read: all of them.
        stride: image pixels for each logit, that of the finest map.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], num_classes: int, *, width: int, dropout: float
    ) -> None:
        super().__init__()
        self.inputs = tuple(range(len(channels)))
        self.stride = strides[0]
        self.embeddings = nn.ModuleList(nn.Linear(channel, width) for channel in channels)
        self.fusion = ConvNormReLU(width * len(channels), width, 1)
        self.dropout = KeyedDropout(dropout, width)
        self.classifier = init_classifier(nn.Conv2d(width, num_classes, 1))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Turn encoder maps, fine to coarse, into logits [B, num_classes, H / stride, W / stride]."""
        fused = self.fusion(embed_all(self.embeddings, features))  # [B, width, H / stride, W / stride]
        return self.classifier(self.dropout(fused))


def build(
    channels: Sequence[int], strides: Sequence[int], num_classes: int, *, width: int = 768, dropout: float = 0.1
) -> SegFormer:
    """Build the SegFormer decoder on all encoder maps.

    Args:
        width: channels of each embedded map and of the fusion (768 as published for MiT-B2 to B5, 256 for B0 and B1).
        dropout: probability with which a whole channel is dropped before the classifier (0.1 as published).

    Raises:
        ConfigError: a number out of its range.
    """
    if problems := number_problems("segformer", width=width, dropout=dropout):
        raise ConfigError(problems)
    return SegFormer(channels, strides, num_classes, width=width, dropout=dropout)
