"""DeepLabV2: the sum of dilated 3x3 classifiers on the last encoder map (Chen et al., arXiv 1606.00915)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mfm_dist.errors import ConfigError
from mfm_dist.models.decoders import number_problems
from mfm_dist.models.layers import init_classifier


class DeepLabV2(nn.Module):
    """Classifies each position straight from the last map, once for each dilation, and adds the logits.

    Attributes:
        inputs: index of the one encoder map that is read, the last.
        stride: image pixels for each logit, that of the last map.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[float], num_classes: int, dilations: Sequence[int]
    ) -> None:
        super().__init__()
        self.inputs = (len(channels) - 1,)
        self.stride = strides[-1]
        self.classifiers = nn.ModuleList(
            init_classifier(nn.Conv2d(channels[-1], num_classes, 3, padding=dilation, dilation=dilation))
            for dilation in dilations
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Turn encoder maps into logits [B, num_classes, H / stride, W / stride]."""
        last = features[self.inputs[0]]
        return torch.stack([classifier(last) for classifier in self.classifiers]).sum(0)


def build(
    channels: Sequence[int], strides: Sequence[float], num_classes: int, *, dilations: Sequence[int] = (6, 12)
) -> DeepLabV2:
    """Build DeepLabV2 on the last encoder map.

    Args:
        dilations: one 3x3 classifier for each. (6, 12) is what the published UDA results use; the original has
            (6, 12, 18, 24).

    Raises:
        ConfigError: ``dilations`` is empty or holds a number below 1.
    """
    if problems := number_problems("deeplabv2", dilations=dilations):
        raise ConfigError(problems)
    return DeepLabV2(channels, strides, num_classes, dilations)
