"""An encoder and a decoder put together: the forward, its gradients, and mistakes in either half."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mfm_dist.errors import ConfigError
from mfm_dist.models.hrda import build_segmentor
from mfm_dist.models.segmentor import Segmentor


def small(decoder: str = "daformer") -> Segmentor:
    torch.manual_seed(0)
    options = {"width": 8} if decoder == "daformer" else {}
    return build_segmentor(backbone="test_convnext", decoder=decoder, num_classes=5, decoder_options=options)


@pytest.mark.parametrize("decoder", ["daformer", "deeplabv2"])
@pytest.mark.parametrize("size", [(64, 64), (65, 97)])
def test_forward_is_the_decoded_features_enlarged(decoder: str, size: tuple[int, int]) -> None:
    model = small(decoder).eval()
    image = torch.randn(2, 3, *size)
    logits = model.decode(model.encode(image))
    assert logits.shape[-2:] != size
    expected = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    assert torch.equal(model(image), expected)
    assert expected.shape == (2, 5, *size)


def test_decoder_inputs_come_from_the_decoder() -> None:
    assert small("daformer").decoder_inputs == (0, 1, 2, 3)
    assert small("deeplabv2").decoder_inputs == (3,)


def test_gradients_reach_every_parameter_of_a_mit_daformer() -> None:
    torch.manual_seed(0)
    model = build_segmentor(
        backbone="mit_b0",
        decoder="daformer",
        num_classes=3,
        backbone_options={"drop_path_rate": 0.0},
        decoder_options={"width": 8},
    )
    model(torch.randn(1, 3, 64, 64)).square().mean().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def test_deeplab_keeps_stride_eight() -> None:
    model = build_segmentor(
        backbone="test_resnet",
        decoder="deeplabv2",
        num_classes=4,
        backbone_options={"output_stride": 8, "out_indices": (1, 2, 3, 4)},
    ).eval()
    assert model.decode(model.encode(torch.randn(1, 3, 64, 128))).shape == (1, 4, 8, 16)


def test_mistakes_in_either_half_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"model\.backbone"):
        build_segmentor(backbone="mit_b9", decoder="daformer", num_classes=2)
    with pytest.raises(ConfigError, match=r"model\.decoder"):
        build_segmentor(backbone="test_convnext", decoder="deeplab", num_classes=2)
