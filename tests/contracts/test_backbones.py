"""What every family of encoders must do, each at a small size: the maps it promises, and decoders that train on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mfm_dist.errors import ConfigError
from mfm_dist.models.hrda import build_segmentor
from mfm_dist.models.segmentor import Segmentor

SMALL_SWIN: dict[str, Any] = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 4, 4],
}
SMALL_VIT: dict[str, Any] = {"depth": 4, "embed_dim": 32, "num_heads": 2}
ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True}

BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "mit": ("mit_b0", {}),
    "resnet": ("test_resnet", {"output_stride": 8, "out_indices": [1, 2, 3, 4]}),
    "convnext": ("test_convnext", {}),
    "efficientnet": ("test_efficientnet", {}),
    "regnet": ("regnetx_002", {}),
    "swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
    "swin_any_size": ("swin_tiny_patch4_window7_224", {**SMALL_SWIN, "strict_img_size": False}),
    "swinv2": ("swinv2_tiny_window8_256", {**SMALL_SWIN, "strict_img_size": False}),
    "vit": ("vit_tiny_patch16_224", {**SMALL_VIT, **ANY_SIZE}),
    "vit_pyramid": ("vit_tiny_patch16_224", {**SMALL_VIT, **ANY_SIZE, "pyramid": True}),
    "dinov2_pyramid": (
        "vit_small_patch14_dinov2",
        {**SMALL_VIT, **ANY_SIZE, "img_size": 64, "patch_size": 16, "pyramid": True},
    ),
    "dinov3_pyramid": ("vit_small_patch16_dinov3", {**SMALL_VIT, **ANY_SIZE, "pyramid": True}),
}
DECODERS: dict[str, dict[str, Any]] = {
    "daformer": {"width": 8},
    "segformer": {"width": 8},
    "deeplabv2": {},
    "deeplabv3plus": {"width": 8},
}


def build(family: str, decoder: str = "daformer") -> Segmentor:
    torch.manual_seed(0)
    name, options = BACKBONES[family]
    return build_segmentor(
        backbone=name, decoder=decoder, num_classes=5, backbone_options=options, decoder_options=DECODERS[decoder]
    )


@pytest.fixture(params=BACKBONES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_maps_are_those_promised(family: str) -> None:
    model = build(family).eval()
    sizes = {"swin": [(64, 64)], "swin_any_size": [(64, 64), (96, 160)], "swinv2": [(64, 64), (96, 160)]}
    for rows, cols in sizes.get(family, [(64, 64), (96, 160), (65, 97)]):
        with torch.no_grad():
            maps = model.encode(torch.randn(2, 3, rows, cols))
        assert [m.shape[1] for m in maps] == list(model.backbone.channels)
        for feature, stride in zip(maps, model.backbone.strides, strict=True):
            # Odd sizes round up, or down where a patch embedding does not pad.
            for side, pixels in zip(feature.shape[2:], (rows, cols), strict=True):
                assert side in (pixels // stride, -(-pixels // stride))


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_parameter_learns(family: str, decoder: str) -> None:
    """A parameter without a gradient would hang or go stale under ZeRO-3."""
    if family.endswith("pyramid") and decoder.startswith("deeplab"):
        with pytest.raises(ConfigError, match=f"of which decoder '{decoder}' reads"):
            build(family, decoder)
        return
    model = build(family, decoder)
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5, 64, 64)
    (logits * torch.randn(logits.shape)).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_images_do_not_see_one_another(family: str) -> None:
    model = build(family).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(image)[:1], model(image[:1]), rtol=1e-4, atol=1e-5)


def test_logits_sit_where_the_image_is() -> None:
    """A patch of 16 pads an image of 65 rows; what lies beyond its edge must not be stretched back into it."""
    model = build("vit_pyramid").eval()

    def finest(image: Tensor) -> Tensor:
        with torch.no_grad():
            return model.encode(image)[0]

    image = torch.randn(1, 3, 65, 64)
    padded = torch.nn.functional.pad(image, (0, 0, 0, 15))
    assert finest(image).shape[-2:] == (17, 16)
    torch.testing.assert_close(finest(image)[:, :, :16], finest(padded)[:, :, :16], rtol=1e-4, atol=1e-5)
