"""The SegFormer decoder against its published sizes and its definition."""

from __future__ import annotations

import pytest
import torch

from mfm_dist.errors import ConfigError
from mfm_dist.models.decoders import build_decoder

MIT_B5 = {"channels": (64, 128, 320, 512), "strides": (4, 8, 16, 32), "num_classes": 19}


@pytest.mark.parametrize(("width", "count"), [(768, 3_164_947), (256, 530_707)])
def test_parameter_counts_of_the_published_decoder_and_of_hrdas_attention(width: int, count: int) -> None:
    with torch.device("meta"):
        decoder = build_decoder("segformer", **MIT_B5, options={"width": width})
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count


def test_every_logit_is_a_perceptron_of_its_own_position() -> None:
    torch.manual_seed(0)
    decoder = build_decoder("segformer", (3, 5), (4, 4), 4, {"width": 6}).eval()
    norm = decoder.fusion[1]
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(tensor)
    norm.running_var.uniform_(0.5, 2)
    features = [torch.randn(2, 3, 4, 5), torch.randn(2, 5, 4, 5)]
    logits = decoder(features)
    for row in range(4):
        for col in range(5):
            words = [layer(f[:, :, row, col]) for layer, f in zip(decoder.embeddings, features, strict=True)]
            fused = torch.cat(words, 1) @ decoder.fusion[0].weight[:, :, 0, 0].T
            fused = (fused - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
            expected = fused.relu() @ decoder.classifier.weight[:, :, 0, 0].T + decoder.classifier.bias
            torch.testing.assert_close(logits[:, :, row, col], expected)


def test_coarser_maps_are_enlarged_bilinearly() -> None:
    torch.manual_seed(0)
    decoder = build_decoder("segformer", (3, 5), (4, 8), 4, {"width": 6}).eval()
    fine, coarse = torch.randn(1, 3, 8, 8), torch.randn(1, 5, 4, 4)
    # The embedding is linear and its weights of a bilinear mean sum to 1: enlarging before it is the same.
    enlarged = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder([fine, coarse]), decoder([fine, enlarged]))


def test_every_wrong_number_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        build_decoder("segformer", **MIT_B5, options={"width": 0, "dropout": -0.1})
    assert len(caught.value.problems) == 2
