"""tools/convert_weights.py: encoders compute the published maps, and files it cannot use are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfm_dist.models.backbone import Backbone
from mfm_dist.models.hrda import build_segmentor
from tests.helpers.published_encoders import (
    hugging_face,
    lite0_maps,
    lite0_shapes,
    mit_maps,
    mit_shapes,
    random_weights,
    resnet_maps,
    resnet_shapes,
)
from tests.helpers.published_heads import (
    checkpoint,
    daformer_names,
    published,
)
from tools.convert_weights import main
from tools.key_maps import MIT_SIZES, read_encoder

DEEPLAB = {"output_stride": 8, "out_indices": (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def mit() -> dict[str, Tensor]:
    return random_weights(mit_shapes())


@pytest.fixture(scope="module")
def resnet() -> dict[str, Tensor]:
    return random_weights(resnet_shapes())


@torch.no_grad()
def assert_maps(backbone: Backbone, image: Tensor, references: list[Tensor]) -> None:
    maps = backbone.double().eval()(image)
    assert len(maps) == len(references) == 4
    for feature, reference in zip(maps, references, strict=True):
        assert reference.std() > 0.1
        torch.testing.assert_close(feature, reference, rtol=1e-10, atol=1e-10)


# Encoders


@pytest.mark.parametrize("published", ["segformer.pth", "hugging_face.safetensors", "hugging_face.bin", "checkpoint"])
def test_mit_computes_the_published_maps(tmp_path: Path, mit: dict[str, Tensor], published: str) -> None:
    source, output = tmp_path / published, tmp_path / "out" / "mit_b0.safetensors"
    if published == "segformer.pth":
        torch.save(mit, source)
    elif published == "checkpoint":
        names = {f"model.backbone.{name}": tensor for name, tensor in mit.items()}
        other = {f"{net}.backbone.norm1.bias": torch.zeros(32) for net in ("ema_model", "imnet_model")}
        torch.save({"meta": {"iter": 40000}, "state_dict": names | other}, source)
    elif source.suffix == ".safetensors":
        save_file(dict(hugging_face(mit)), source)
    else:
        torch.save(dict(hugging_face(mit)), source)
    assert main(["encoder", str(source), str(output)]) == 0
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 64, 96, generator=generator, dtype=torch.float64)
    assert_maps(Backbone("mit_b0", weights=output), image, mit_maps(mit, image))


def test_resnet_v1c_computes_the_published_maps(tmp_path: Path, resnet: dict[str, Tensor]) -> None:
    # Files from before torch 0.4.1 do not count batches.
    torch.save({name: t for name, t in resnet.items() if "num_batches" not in name}, tmp_path / "resnet50_v1c.pth")
    output = tmp_path / "resnet50c.safetensors"
    assert main(["encoder", str(tmp_path / "resnet50_v1c.pth"), str(output)]) == 0
    image = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_maps(Backbone("resnet50c", weights=output, options=DEEPLAB), image, resnet_maps(resnet, image))


def test_efficientnet_lite0_computes_the_published_maps(tmp_path: Path) -> None:
    state = random_weights(lite0_shapes())
    torch.save(state, tmp_path / "lite0.pth")
    output = tmp_path / "lite0.safetensors"
    assert main(["encoder", str(tmp_path / "lite0.pth"), str(output)]) == 0
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    backbone = Backbone("tf_efficientnet_lite0", weights=output, options={"out_indices": [1, 2, 3, 4]})
    assert_maps(backbone, image, lite0_maps(state, image)[1:])


def test_an_installed_package_is_a_source_where_it_carries_weights(
    tmp_path: Path, mit: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, files in {"one_model": ["one_model/mit_b0.pth"], "no_model": []}.items():
        information = tmp_path / "site" / f"{name}-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (information / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    (tmp_path / "site" / "one_model").mkdir()
    torch.save(mit, tmp_path / "site" / "one_model" / "mit_b0.pth")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert main(["encoder", "one-model", str(tmp_path / "out.safetensors")]) == 0
    assert len(load_file(tmp_path / "out.safetensors")) == len(mit) - 2
    assert main(["encoder", "no-model", str(tmp_path / "other.safetensors")]) == 2
    assert "no file no-model, nor an installed package of that name with a weights file" in capsys.readouterr().err


def test_the_report_names_what_is_left_out_and_how_to_train(
    tmp_path: Path, mit: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(mit, tmp_path / "mit_b0.pth")
    output = tmp_path / "mit_b0.safetensors"
    assert main(["encoder", str(tmp_path / "mit_b0.pth"), str(output)]) == 0
    report = capsys.readouterr().out
    assert "left out: head (2 tensors)" in report
    assert f"model.backbone=mit_b0 model.pretrained=false model.weights={output}" in report
    assert len(load_file(output)) == len(mit) - 2


@pytest.mark.parametrize(("size", "name"), MIT_SIZES.items())
def test_sizes_are_told_from_the_names(size: tuple[int, tuple[int, ...]], name: str) -> None:
    channels, depths = size
    state = {"patch_embed1.proj.weight": torch.zeros(channels, 3, 7, 7)}
    state |= {f"block{stage}.{depth - 1}.norm1.bias": torch.zeros(1) for stage, depth in enumerate(depths, 1)}
    assert read_encoder(state).name == name


# Refusals


class Detonator:
    """Its unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("recent", [True, False])
@pytest.mark.parametrize("command", ["encoder", "segmentor"])
def test_a_file_with_other_objects_is_refused_and_they_are_named(
    tmp_path: Path, mit: dict[str, Tensor], command: str, recent: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source, trace = tmp_path / "mit_b0.pth", tmp_path / "was_run"
    content = {"state_dict": mit, "extra": Detonator(trace)}
    torch.save(content, source, _use_new_zipfile_serialization=recent)
    output = tmp_path / "out.safetensors"
    assert main([command, str(source), str(output)]) == 2
    message = capsys.readouterr().err
    assert "other objects is not opened" in message
    assert "io.open" in message
    assert not trace.exists()
    assert not output.exists()
    torch.load(source, weights_only=False)
    assert trace.exists()  # it would have been


def test_a_file_from_before_torch_1_6_is_read(tmp_path: Path, mit: dict[str, Tensor]) -> None:
    torch.save(mit, tmp_path / "mit_b0.pth", _use_new_zipfile_serialization=False)
    assert main(["encoder", str(tmp_path / "mit_b0.pth"), str(tmp_path / "mit_b0.safetensors")]) == 0


def refusal(tmp_path: Path, state: object, capsys: pytest.CaptureFixture[str], command: str, *more: str) -> str:
    torch.save(state, tmp_path / "source.pth")
    output = tmp_path / ("out.safetensors" if command == "encoder" else "out")
    assert main([command, str(tmp_path / "source.pth"), str(output), *more]) == 2
    assert not output.exists()
    return capsys.readouterr().err


def test_every_tensor_must_be_used_there_and_of_its_shape(
    tmp_path: Path, mit: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {**mit, "norm2.extra": torch.zeros(3), "norm3.bias": torch.zeros(7)}
    del wrong["block1.0.attn.kv.bias"]
    message = refusal(tmp_path, wrong, capsys, "encoder")
    assert message.startswith("3 configuration errors")
    assert "1 missing (our names): stages.0.blocks.0.attn.kv.bias" in message
    assert "1 without a place (see --ignore): stages.1.norm.extra" in message
    assert "1 of another shape: stages.2.norm.bias (7,) instead of (160,)" in message


def test_half_a_pair_of_keys_and_values_is_an_error(
    tmp_path: Path, mit: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(hugging_face(mit))
    del state["segformer.encoder.block.2.1.attention.self.value.bias"]
    message = refusal(tmp_path, state, capsys, "encoder")
    assert "missing (our names): stages.2.blocks.1.attn.kv.bias" in message
    assert "without a place (see --ignore): stages.2.blocks.1.attn.key.bias" in message


def test_a_segmentors_missing_and_unused_tensors(
    tmp_path: Path, mit: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    segmentor = build_segmentor(backbone="mit_b0", decoder="daformer", num_classes=19, decoder_options={"width": 8})
    state = published(segmentor, mit, {"decode_head.": ("decoder", daformer_names())})
    del state["decode_head.embed_layers.2.proj.bias"]
    state["decode_head.fuse_layer.image_pool.conv.weight"] = torch.zeros(3)
    state["neck.weight"] = torch.zeros(3)
    content = checkpoint(state)
    content["state_dict"]["discriminator.weight"] = torch.zeros(3)
    message = refusal(tmp_path, content, capsys, "segmentor")
    assert "1 missing (our names): decoder.embeddings.2.bias" in message
    assert "3 without a place (see --ignore): " in message
    for name in ("decoder.fuse_layer.image_pool.0.weight", "neck.weight", "discriminator.weight"):
        assert name in message
    state["decode_head.embed_layers.2.proj.bias"] = torch.zeros(8)
    torch.save(
        content | {"state_dict": {**content["state_dict"], **checkpoint(state)["state_dict"]}}, tmp_path / "2.pth"
    )
    unwanted = ["neck.", "discriminator.", "model.neck.", "model.decode_head.fuse_layer.image_pool."]
    assert main(["segmentor", str(tmp_path / "2.pth"), str(tmp_path / "out"), "--ignore", *unwanted]) == 0
    assert "discriminator (1 tensors)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "command", "said"),
    [
        ({"epoch": 3}, "encoder", "holds no state dict"),
        ([1, 2], "encoder", "holds a list"),
        ({"conv1.weight": torch.zeros(1)}, "encoder", "no encoder is known with names such as conv1.weight"),
        ({"patch_embed1.proj.weight": torch.zeros(32, 3, 7, 7)}, "encoder", r"none of MiT-B0 to B5"),
        ({"decode_head.conv_seg.weight": torch.zeros(1)}, "segmentor", "no encoder is known with names such as (none)"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, state: object, command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(tmp_path, state, capsys, command)


def test_other_heads_and_arguments_are_refused(
    tmp_path: Path, mit: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = {f"backbone.{name}": tensor for name, tensor in mit.items() if not name.startswith("head.")}
    message = refusal(tmp_path, encoder | {"decode_head.psp.weight": torch.zeros(1)}, capsys, "segmentor")
    assert "decode_head.: no decoder is known with names such as psp.weight" in message
    branches = {f"decode_head.aspp_modules.{i}.conv.weight": torch.zeros(19, 256, 3, 3) for i in range(3)}
    assert "with 3 branches, whose dilations are unknown" in refusal(tmp_path, encoder | branches, capsys, "segmentor")
    segformer = {"decode_head.linear_fuse.conv.weight": torch.zeros(8, 32, 1, 1)}
    for option in (["--dilations", "1", "6"], ["--stacked", "fine-first"]):
        state = encoder | (segformer if option[0] == "--dilations" else branches)
        state.pop("decode_head.aspp_modules.2.conv.weight", None)
        assert f"{option[0]} means nothing for a decoder" in refusal(tmp_path, state, capsys, "segmentor", *option)
    assert "holds no teacher" in refusal(tmp_path, encoder, capsys, "segmentor", "--weights", "teacher")
    assert main(["encoder", str(tmp_path / "absent.pth"), str(tmp_path / "a.safetensors")]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert main(["encoder", str(tmp_path / "source.pth"), str(tmp_path / "a.pth")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def test_files_that_are_there_stay(tmp_path: Path, mit: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(mit, tmp_path / "mit_b0.pth")
    (tmp_path / "out.safetensors").write_text("mine")
    assert main(["encoder", str(tmp_path / "mit_b0.pth"), str(tmp_path / "out.safetensors")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["segmentor", str(tmp_path / "mit_b0.pth"), str(tmp_path)]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_text() == "mine"
