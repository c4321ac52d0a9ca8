"""What every family of encoders must do, each at a small size: the maps it promises, and decoders that train on it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch

from mfm_dist.errors import ConfigError
from mfm_dist.models.backbone import Backbone
from mfm_dist.models.hrda import build_segmentor
from mfm_dist.models.lora import add_lora, merge_lora
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
    "dinov2_patch14": ("vit_small_patch14_reg4_dinov2", {**SMALL_VIT, **ANY_SIZE, "img_size": 70, "pyramid": True}),
    "dinov2_pyramid": (
        "vit_small_patch14_dinov2",
        {**SMALL_VIT, **ANY_SIZE, "img_size": 64, "patch_size": 16, "pyramid": True},
    ),
    "dinov3_pyramid": ("vit_small_patch16_dinov3", {**SMALL_VIT, **ANY_SIZE, "pyramid": True}),
    "dinov3": ("vit_small_patch16_dinov3", {**SMALL_VIT, **ANY_SIZE, "out_indices": [0, 1, 2, 3]}),
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
    if BACKBONES[family][1].get("pyramid") and decoder.startswith("deeplab"):
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


@pytest.mark.parametrize("method", ["plain", "hrda"])
@pytest.mark.parametrize("family", ["vit", "dinov3_pyramid"], indirect=True)
def test_logits_sit_where_the_image_is(family: str, method: str) -> None:
    """A patch of 16 pads an image of 65 rows; what lies beyond its edge must not be stretched back into it."""
    name, options = BACKBONES[family]
    torch.manual_seed(0)
    model = build_segmentor(
        backbone=name, decoder="segformer", num_classes=5, decoder_options={"width": 8},
        backbone_options={key: value for key, value in options.items() if key != "dynamic_img_pad"},
        attention="segformer" if method == "hrda" else None, attention_options={"width": 8}, window=(128, 128),
    ).eval()  # fmt: skip
    image = torch.randn(1, 3, 65, 64)
    with torch.no_grad():
        padded = model(torch.nn.functional.pad(image, (0, 0, 0, 31 if method == "hrda" else 15)))
        assert torch.equal(model(image), padded[..., :65, :])


@pytest.mark.parametrize("family", ["dinov2_patch14", "dinov2_pyramid", "dinov3_pyramid", "dinov3"], indirect=True)
def test_maps_of_dino_are_its_patch_tokens_behind_the_last_norm(family: str) -> None:
    """As timm's whole model gives them for features; neither class nor register tokens are among them."""
    backbone = build(family).backbone.eval()
    with torch.no_grad():
        for parameter in backbone.net.model.norm.parameters():
            parameter.uniform_(0.5, 2.0)
        whole = timm.create_model(BACKBONES[family][0], num_classes=0, **plain_options(family)).eval()
        whole.load_state_dict(backbone.net.model.state_dict(), strict=False)
        rows, cols = (5 * backbone.multiple, 4 * backbone.multiple)
        image = torch.randn(2, 3, rows, cols)
        tokens = whole.forward_features(image)  # [B, prefix + 20, C]
        assert whole.num_prefix_tokens == (1 if family == "dinov2_pyramid" else 5)
        patches = tokens[:, whole.num_prefix_tokens :].transpose(1, 2).unflatten(2, (5, 4))
        torch.testing.assert_close(backbone(image)[-1], patches)


def plain_options(family: str) -> dict[str, Any]:
    """What the model takes without timm's wrapper and ours."""
    options = BACKBONES[family][1]
    return {key: value for key, value in options.items() if key not in ("pyramid", "out_indices")}


@pytest.mark.parametrize("family", ["dinov2_patch14", "dinov3_pyramid", "resnet"], indirect=True)
def test_a_frozen_encoder_keeps_every_bit_and_lets_additions_learn(family: str) -> None:
    """Weights and BatchNorm statistics stay, in any mode; additions start at 0, learn, and can be merged."""
    model, image = build(family), torch.randn(2, 3, 64, 64)
    adds = family != "resnet"  # which has no linear layer
    before = {name: tensor.clone() for name, tensor in model.backbone.net.state_dict().items()}
    plain = model.eval()(image).detach()
    model.backbone.freeze()
    if adds:
        add_lora(model.backbone.net, rank=2, alpha=4.0, targets=["qkv", "fc1"])
    assert torch.equal(model(image), plain)
    trained = {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert bool(trained) == adds
    assert all(".lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()(image).square().mean().backward()
        optimizer.step()
    assert not model.backbone.net.training
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.backbone.net.state_dict().items()}
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    adapted = model.eval()(image).detach()
    merge_lora(model.backbone.net)
    torch.testing.assert_close(model(image), adapted)
    changed = [
        name for name, tensor in model.backbone.net.state_dict().items() if not torch.equal(tensor, before[name])
    ]
    assert bool(changed) == adds
    assert all(name.endswith(("qkv.weight", "fc1.weight")) for name in changed)


def test_additions_that_would_not_learn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone("vit_small_patch16_dinov3_qkvb", options=SMALL_VIT)
    with pytest.raises(ConfigError, match=r"reads the weight of model\.blocks\.0\.attn\.qkv past any addition"):
        add_lora(backbone.net, rank=2, alpha=4.0, targets=["attn.qkv"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[lora\]'"):
        add_lora(backbone.net, rank=2, alpha=4.0, targets=["attn.proj"])
