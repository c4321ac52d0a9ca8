"""The DeepLabV2 decoder against its published sizes and its definition."""

from __future__ import annotations

import pytest
import torch

from mfm_dist.errors import ConfigError
from mfm_dist.models.decoders import build_decoder

RESNET = {"channels": (256, 512, 1024, 2048), "strides": (4, 8, 8, 8), "num_classes": 19}


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 700_454), ({"dilations": (6, 12)}, 700_454), ({"dilations": [6, 12, 18, 24]}, 1_400_908)],
)
def test_parameter_counts_of_the_published_variants(options: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        decoder = build_decoder("deeplabv2", **RESNET, options=options)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count


def test_logits_are_the_sum_of_dilated_neighbourhoods() -> None:
    torch.manual_seed(0)
    decoder = build_decoder("deeplabv2", (2, 3), (4, 8), 5, {"dilations": (1, 2)})
    last = torch.randn(1, 3, 5, 6)
    expected = torch.zeros(1, 5, 5, 6)
    for dilation, conv in zip((1, 2), decoder.classifiers, strict=True):
        expected += conv.bias.detach()[None, :, None, None]
        for row in range(5):
            for col in range(6):
                for i in range(3):
                    for j in range(3):
                        y, x = row + (i - 1) * dilation, col + (j - 1) * dilation
                        if 0 <= y < 5 and 0 <= x < 6:
                            expected[0, :, row, col] += conv.weight.detach()[:, :, i, j] @ last[0, :, y, x]
    torch.testing.assert_close(decoder([torch.randn(1, 2, 10, 12), last]), expected)


def test_reads_the_last_map_only() -> None:
    decoder = build_decoder("deeplabv2", **RESNET)
    assert decoder.inputs == (3,)
    assert decoder.stride == 8


def test_initial_weights() -> None:
    torch.manual_seed(0)
    for conv in build_decoder("deeplabv2", **RESNET).classifiers:
        assert abs(conv.weight.std().item() / 0.01 - 1) < 0.02
        assert not conv.bias.any()


@pytest.mark.parametrize("dilations", [[], [0], [6, -1]])
def test_impossible_dilations_are_refused(dilations: list[int]) -> None:
    with pytest.raises(ConfigError, match="dilations must be positive"):
        build_decoder("deeplabv2", **RESNET, options={"dilations": dilations})
