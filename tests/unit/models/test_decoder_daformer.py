"""The DAFormer decoder against its published size and its functional form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfm_dist.errors import ConfigError
from mfm_dist.models.decoders import build_decoder

MIT_B5 = {"channels": (64, 128, 320, 512), "strides": (4, 8, 16, 32), "num_classes": 19}


def test_parameter_count_of_the_published_decoder() -> None:
    with torch.device("meta"):
        decoder = build_decoder("daformer", **MIT_B5)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 3_712_275


def _plain_daformer(decoder: nn.Module, features: list[Tensor], dilations: tuple[int, ...]) -> Tensor:
    """The published head in functional form, in eval mode with fresh BatchNorm (which then only rescales)."""
    weights = dict(decoder.named_parameters())
    scale = (1 + 1e-5) ** -0.5

    def norm_relu(x: Tensor) -> Tensor:
        return (x * scale).relu()

    size = features[0].shape[-2:]
    embedded = []
    for i, feature in enumerate(features):
        y = torch.einsum("oc,bchw->bohw", weights[f"embeddings.{i}.weight"], feature)
        y = y + weights[f"embeddings.{i}.bias"][None, :, None, None]
        embedded.append(F.interpolate(y, size=size, mode="bilinear", align_corners=False))
    stacked = torch.cat(embedded, dim=1)
    branches = []
    for i, dilation in enumerate(dilations):
        if dilation == 1:
            branches.append(norm_relu(F.conv2d(stacked, weights[f"branches.{i}.0.weight"])))
            continue
        depthwise = weights[f"branches.{i}.0.0.weight"]
        y = F.conv2d(stacked, depthwise, padding=dilation, dilation=dilation, groups=stacked.shape[1])
        branches.append(norm_relu(F.conv2d(norm_relu(y), weights[f"branches.{i}.1.0.weight"])))
    y = norm_relu(F.conv2d(torch.cat(branches, dim=1), weights["bottleneck.0.weight"], padding=1))
    return F.conv2d(y, weights["classifier.weight"], weights["classifier.bias"])


def test_equals_the_functional_form() -> None:
    torch.manual_seed(0)
    decoder = build_decoder("daformer", (4, 6, 8), (4, 8, 16), 5, {"width": 8, "dilations": (1, 2, 3)}).eval()
    features = [torch.randn(2, 4, 12, 16), torch.randn(2, 6, 6, 8), torch.randn(2, 8, 3, 4)]
    torch.testing.assert_close(decoder(features), _plain_daformer(decoder, features, (1, 2, 3)))


def test_reads_all_maps_at_the_finest_stride() -> None:
    decoder = build_decoder("daformer", **MIT_B5, options={"width": 4})
    assert decoder.inputs == (0, 1, 2, 3)
    assert decoder.stride == 4


def test_dropout_takes_whole_channels_in_training_only() -> None:
    torch.manual_seed(0)
    decoder = build_decoder("daformer", (4,), (4,), 2, {"width": 64, "dropout": 0.5})
    dropped = (decoder.dropout(torch.ones(4, 64, 3, 3)) == 0).flatten(2)
    assert torch.equal(dropped.any(2), dropped.all(2))
    assert 0.3 < dropped.float().mean() < 0.7
    features = [torch.randn(2, 4, 8, 8)]
    assert not torch.equal(decoder(features), decoder(features))
    decoder.eval()
    assert decoder.dropout(torch.ones(1, 64, 1, 1)).eq(1).all()


def test_every_wrong_number_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        build_decoder("daformer", **MIT_B5, options={"width": 0, "dropout": 1.0, "dilations": []})
    assert len(caught.value.problems) == 3
