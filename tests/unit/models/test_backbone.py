"""Encoders: published sizes, the maps they promise, weights from files, and how mistakes are told."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mfm_dist.errors import ConfigError
from mfm_dist.models.backbone import Backbone
from mfm_dist.models.dropout import KeyedDropout

DEEPLAB = {"output_stride": 8, "out_indices": (1, 2, 3, 4)}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def random_state(model: nn.Module) -> dict[str, Tensor]:
    """A state dict in which no tensor holds its initial value."""
    generator = torch.Generator().manual_seed(11)
    return {
        # Above zero, as some are variances.
        name: torch.rand(tensor.shape, generator=generator) * 0.1 + 0.01
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in model.state_dict().items()
    }


def segformer_name(name: str) -> str:
    """timm's PVTv2 name -> the name in SegFormer's own files, rule by rule from the table of published names."""
    if name.startswith("patch_embed."):
        return name.replace("patch_embed.", "patch_embed1.")
    if match := re.fullmatch(r"stages\.(\d)\.downsample\.(.+)", name):
        return f"patch_embed{int(match[1]) + 1}.{match[2]}"
    if match := re.fullmatch(r"stages\.(\d)\.norm\.(.+)", name):
        return f"norm{int(match[1]) + 1}.{match[2]}"
    if match := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name):
        return f"block{int(match[1]) + 1}.{match[2]}.{match[3].replace('mlp.dwconv.', 'mlp.dwconv.dwconv.')}"
    assert name.startswith("head.")
    return name


@torch.no_grad()
def plain_maps(name: str, state: dict[str, Tensor], image: Tensor, **options: object) -> list[Tensor]:
    """Features of timm's plain model with these weights, by timm's own intermediate outputs."""
    model = timm.create_model(name, **options).eval()
    model.load_state_dict(state)
    return model.forward_intermediates(image, intermediates_only=True)


# Architecture


@pytest.mark.parametrize(
    ("name", "parameters", "channels"),
    [
        ("mit_b0", 3_319_392, (32, 64, 160, 256)),
        ("mit_b1", 13_151_424, (64, 128, 320, 512)),
        ("mit_b2", 24_196_288, (64, 128, 320, 512)),
        ("mit_b3", 44_072_128, (64, 128, 320, 512)),
        ("mit_b4", 60_842_688, (64, 128, 320, 512)),
        ("mit_b5", 81_443_008, (64, 128, 320, 512)),
    ],
)
def test_mit_has_the_published_size(name: str, parameters: int, channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        backbone = Backbone(name)
    assert count(backbone) == parameters
    assert backbone.channels == channels
    assert backbone.strides == (4, 8, 16, 32)


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_dino_reads_the_files_as_released(family: str, tmp_path: Path) -> None:
    """Under the names of Meta's files: with a mask token and periods beside what timm has."""
    small = {"depth": 3, "embed_dim": 32, "num_heads": 2}
    name = {"dinov2": "vit_small_patch14_reg4_dinov2", "dinov3": "vit_small_patch16_dinov3"}[family]
    reference = Backbone(name, options={**small, "dynamic_img_size": True}).eval()
    state = {key.removeprefix("model."): value for key, value in reference.net.state_dict().items()}
    released = {"mask_token": torch.zeros(1, 32) if family == "dinov2" else torch.zeros(1, 1, 32)}
    tokens = {"dinov2": "register_tokens", "dinov3": "storage_tokens"}[family]
    for key, value in state.items():
        released[re.sub(r"gamma_(\d)", r"ls\1.gamma", key).replace("reg_token", tokens)] = value
    if family == "dinov2":  # one position for the class token, too
        released["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), released["pos_embed"]], dim=1)
    else:
        released["rope_embed.periods"] = torch.ones(4)
    file = tmp_path / f"{family}.pth"
    torch.save(released, file)
    loaded = Backbone(name, weights=file, options={**small, "dynamic_img_size": True}).eval()
    image = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        for ours, theirs in zip(loaded(image), reference(image), strict=True):
            assert torch.equal(ours, theirs)
    if family == "dinov2":
        resampled = Backbone(name, weights=file, options={**small, "patch_size": 16, "img_size": 64, "pyramid": True})
        assert resampled.net.model.patch_embed.proj.weight.shape[-2:] == (16, 16)
        assert [tuple(m.shape) for m in resampled(torch.randn(1, 3, 64, 64))] == [(1, 32, 4, 4)]


def test_mit_norms_and_drop_path_are_those_of_segformer() -> None:
    with torch.device("meta"):
        backbone = Backbone("mit_b2")
    for name, module in backbone.named_modules():
        if isinstance(module, nn.LayerNorm):
            inner = re.search(r"(patch_embed|downsample|attn)\.norm$", name)
            assert module.eps == (1e-5 if inner else 1e-6), name
    rates = {
        name.rsplit(".", 1)[0]: module.p
        for name, module in backbone.named_modules()
        if isinstance(module, KeyedDropout)
    }
    assert max(rates.values()) == pytest.approx(0.1)
    assert len(rates) == 3 + 4 + 6 + 3 - 1  # the first block drops nothing


def test_options_win_over_the_mit_defaults() -> None:
    with torch.device("meta"):
        backbone = Backbone("mit_b0", options={"drop_path_rate": 0.0})
    assert not any(isinstance(module, KeyedDropout) for module in backbone.modules())
    assert count(backbone) == 3_319_392


@pytest.mark.parametrize(("name", "parameters"), [("resnet101c", 42_519_392), ("resnet50c", 23_527_264)])
def test_dilated_resnet_for_deeplab(name: str, parameters: int) -> None:
    with torch.device("meta"):
        backbone = Backbone(name, options=DEEPLAB)
    assert count(backbone) == parameters
    assert backbone.channels == (256, 512, 1024, 2048)
    assert backbone.strides == (4, 8, 8, 8)
    # Stage 3 starts with dilation 1 and goes on with 2; stage 4 starts with 2 and goes on with 4.
    dilations = {
        stage: [block.conv2.dilation[0] for block in backbone.net[stage]]
        for stage in ("layer1", "layer2", "layer3", "layer4")
    }
    assert set(dilations["layer1"]) == set(dilations["layer2"]) == {1}
    assert dilations["layer3"] == [1] + [2] * (len(dilations["layer3"]) - 1)
    assert dilations["layer4"] == [2, 4, 4]


def test_output_stride_eight_is_the_striding_network_with_its_last_strides_turned_into_dilations() -> None:
    torch.manual_seed(0)
    dilated = Backbone("resnet50c", options=DEEPLAB).eval()
    by_hand = Backbone("resnet50c", options={"out_indices": (1, 2, 3, 4)}).eval()
    by_hand.load_state_dict(dilated.state_dict())
    for stage, dilations in (("layer3", [1, 2, 2, 2, 2, 2]), ("layer4", [2, 4, 4])):
        for block, dilation in zip(by_hand.net[stage], dilations, strict=True):
            block.conv2.stride = (1, 1)
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)
        by_hand.net[stage][0].downsample[0].stride = (1, 1)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, references = dilated(image), by_hand(image)
    assert [tuple(feature.shape[-2:]) for feature in maps] == [(16, 16), (8, 8), (8, 8), (8, 8)]
    assert all(torch.equal(feature, reference) for feature, reference in zip(maps, references, strict=True))


@pytest.mark.parametrize("name", ["test_resnet", "pvt_v2_b0", "mit_b0", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_maps_have_the_promised_channels_and_strides(name: str, size: tuple[int, int]) -> None:
    backbone = Backbone(name).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, *size))
    assert [feature.shape[1] for feature in maps] == list(backbone.channels)
    assert list(backbone.strides) == sorted(backbone.strides)
    for feature, stride in zip(maps, backbone.strides, strict=True):
        for side, pixels in zip(feature.shape[-2:], size, strict=True):
            assert side in (pixels // stride, -(-pixels // stride))
            if name != "test_convnext":  # its patch embedding does not pad
                assert side == -(-pixels // stride)


def test_channels_last_families_come_out_channels_first() -> None:
    options = {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
    backbone = Backbone("swin_tiny_patch4_window7_224", options={**options, "out_indices": (0, 1)}).eval()
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert [tuple(feature.shape) for feature in maps] == [(1, 16, 16, 16), (1, 32, 8, 8)]
    assert all(feature.is_contiguous() for feature in maps)
    raw = backbone.net(torch.zeros(1, 3, 64, 64))
    assert torch.equal(backbone(torch.zeros(1, 3, 64, 64))[1], raw[1].movedim(3, 1))


# Weights


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet", "pvt_v2_b0"])
def test_a_file_in_timms_names_is_loaded(tmp_path: Path, name: str, suffix: str) -> None:
    state = random_state(timm.create_model(name))  # with a classifier, as published files have one
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    backbone = Backbone(name, weights=path)
    flat = {key.replace(".", "_"): value for key, value in state.items()}
    for key, value in backbone.net.state_dict().items():
        assert torch.equal(value, flat[key.removeprefix("model.").replace(".", "_")]), key


def test_loaded_weights_compute_the_same_features(tmp_path: Path) -> None:
    state = random_state(timm.create_model("test_resnet", num_classes=0))
    save_file(state, tmp_path / "weights.safetensors")
    backbone = Backbone("test_resnet", weights=tmp_path / "weights.safetensors", options=DEEPLAB).eval()
    image = torch.randn(1, 3, 64, 64)
    expected = plain_maps("test_resnet", state, image, num_classes=0, output_stride=8)[1:]
    with torch.no_grad():
        for feature, reference in zip(backbone(image), expected, strict=True):
            torch.testing.assert_close(feature, reference)


@pytest.mark.parametrize("with_classifier", [True, False])
def test_a_segformer_file_is_loaded(tmp_path: Path, with_classifier: bool) -> None:
    options = {"mlp_ratios": (4, 4, 4, 4)}
    timm_state = random_state(timm.create_model("pvt_v2_b0", num_classes=1000 if with_classifier else 0, **options))
    path = tmp_path / "mit_b0.pth"
    original = {segformer_name(name): tensor for name, tensor in timm_state.items()}
    assert "block1.0.mlp.dwconv.dwconv.weight" in original
    assert {"patch_embed1.proj.weight", "patch_embed4.norm.bias", "norm4.weight"} <= set(original)
    assert ("head.weight" in original) == with_classifier
    torch.save(original, path)
    backbone = Backbone("mit_b0", weights=path).eval()
    image = torch.randn(1, 3, 64, 96)
    num_classes = 1000 if with_classifier else 0
    expected = plain_maps("pvt_v2_b0", timm_state, image, num_classes=num_classes, **options)
    with torch.no_grad():
        for feature, reference in zip(backbone(image), expected, strict=True):
            assert feature.std() > 0.01
            torch.testing.assert_close(feature, reference)


def test_a_file_of_another_size_is_refused_with_some_names(tmp_path: Path) -> None:
    path = tmp_path / "mit_b0.safetensors"
    save_file(random_state(timm.create_model("pvt_v2_b0", mlp_ratios=(4, 4, 4, 4))), path)
    with pytest.raises(ConfigError, match="does not fit") as caught:
        Backbone("pvt_v2_b0", weights=path)
    assert "fc1.weight" in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "mit_b0"])
def test_a_file_of_another_family_is_refused_with_its_first_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file(random_state(timm.create_model("test_resnet")), path)
    with pytest.raises(ConfigError, match="does not fit") as caught:
        Backbone(name, weights=path)
    assert "the file holds bn1.bias, bn1.running_mean, bn1.running_var and" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_deeper_model_of_the_same_family_does_not_pass_as_a_shallower_one(tmp_path: Path) -> None:
    shallow, deep = (1, 1, 1, 1), (2, 1, 1, 1)
    path = tmp_path / "deep.safetensors"
    save_file(random_state(timm.create_model("test_convnext", depths=deep)), path)
    with pytest.raises(ConfigError, match=r'Unexpected key\(s\) in state_dict: "stages\.0\.blocks\.1\.'):
        Backbone("test_convnext", weights=path, options={"depths": shallow})
    save_file(random_state(timm.create_model("test_convnext", depths=shallow)), path)
    with pytest.raises(ConfigError, match=r'Missing key\(s\) in state_dict: "stages\.0\.blocks\.1\.'):
        Backbone("test_convnext", weights=path, options={"depths": deep})


class Detonator:
    """Its unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "was_run"
    content = {"conv.weight": torch.zeros(1), "extra": Detonator(trace)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ConfigError, match="cannot be read"):
        Backbone("test_resnet", weights=path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(content)) if writer == "pickle" else torch.load(path, weights_only=False)
    assert trace.exists()  # it would have been


def test_unreadable_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        Backbone("test_resnet", weights=tmp_path / "absent.pth")
    for name in ("noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(ConfigError, match="cannot be read"):
            Backbone("test_resnet", weights=tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(ConfigError, match="holds no state dict"):
        Backbone("test_resnet", weights=tmp_path / "numbers.pth")


# Mistakes


@pytest.mark.parametrize(
    ("typo", "meant"), [("mit_b55", "mit_b5"), ("resnet101_c", "resnet101c"), ("pvtv2_b2", "pvt_v2_b2")]
)
def test_an_unknown_name_suggests_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"no model called '{typo}'.*\b{meant}\b"):
        Backbone(typo)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("test_resnet", {"nonsense": 3}, "nonsense=3"),
        ("test_resnet", {"drop_path_rate": 0.1, "output_stride": 7}, "output_stride=7"),
        ("pvt_v2_b0", {"out_indices": (0, 9)}, r"out_indices=\(0, 9\)"),
        ("mit_b0", {"output_stride": 8}, "output_stride=8"),
    ],
)
def test_a_wrong_option_is_named(name: str, options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.backbone_options: .* does not accept {named} \("):
        Backbone(name, options=options)


def test_own_arguments_are_not_options() -> None:
    with pytest.raises(ConfigError, match=r"may not set pretrained: .* come by model\.pretrained"):
        Backbone("test_resnet", options={"pretrained": True})


def test_a_model_without_feature_maps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def without_features(name: str, **arguments: object) -> nn.Module:
        if "features_only" in arguments:
            raise RuntimeError("features_only not implemented for this model")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", without_features)
    with pytest.raises(ConfigError, match=r"'test_resnet' offers no feature maps"):
        Backbone("test_resnet")


def test_mit_has_no_weights_at_timm() -> None:
    with pytest.raises(ConfigError, match=r"model\.weights=PATH, or train model\.backbone=pvt_v2_b5"):
        Backbone("mit_b5", pretrained=True)


def test_pretrained_and_weights_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one"):
        Backbone("test_resnet", pretrained=True, weights=tmp_path / "weights.pth")


def test_a_failed_download_says_how_to_go_on_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The hub is a port that nobody listens at: its library tries again and again, and prints each."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"could not be fetched .*model\.weights=PATH"):
        Backbone("test_resnet", pretrained=True)
    assert capfd.readouterr() == ("", "")
