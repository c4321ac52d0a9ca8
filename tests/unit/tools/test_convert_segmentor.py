"""tools/convert_weights.py segmentor: published networks become exports that compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mfm_dist
from mfm_dist.inference.segmentor import read_card
from mfm_dist.models.hrda import build_segmentor
from tests.helpers.published_encoders import (
    DIMS,
    Weights,
    as_map,
    linear,
    mit_maps,
    mit_shapes,
    norm_shapes,
    random_weights,
    resnet_shapes,
)
from tests.helpers.published_heads import (
    HEADS_OF_MIT,
    attention_names,
    checkpoint,
    daformer_names,
    published,
    randomised,
)
from tools.convert_weights import main


@pytest.fixture(scope="module")
def mit() -> dict[str, Tensor]:
    return random_weights(mit_shapes())


@pytest.fixture(scope="module")
def resnet() -> dict[str, Tensor]:
    return random_weights(resnet_shapes())


def assert_equal_states(one: torch.nn.Module, other: torch.nn.Module) -> None:
    theirs = other.state_dict()
    assert list(one.state_dict()) == list(theirs)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("case", HEADS_OF_MIT)
def test_a_checkpoint_becomes_an_export(tmp_path: Path, mit: dict[str, Tensor], case: str) -> None:
    decoder, options, names, arguments = HEADS_OF_MIT[case]
    segmentor = randomised(build_segmentor(backbone="mit_b0", decoder=decoder, num_classes=19, decoder_options=options))
    state = published(segmentor, mit, {"decode_head.": ("decoder", names)})
    if decoder == "segformer":
        state |= {
            "decode_head.conv_seg.weight": torch.zeros(19, 12, 1, 1),
            "decode_head.conv_seg.bias": torch.zeros(19),
        }
    source, output = tmp_path / "iter_40000.pth", tmp_path / "converted"
    torch.save(checkpoint(state), source)
    assert main(["segmentor", str(source), str(output), *arguments]) == 0
    loaded = mfm_dist.load(output)
    assert_equal_states(segmentor, loaded.segmentor)
    assert (loaded.card.decoder, loaded.card.step, loaded.card.crop) == (decoder, 40000, (512, 512))
    assert loaded.card.resize is None
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(loaded(image), segmentor(image))


def test_hrda_with_its_scale_attention(
    tmp_path: Path, mit: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"decoder_options": {"width": 8}, "attention": "segformer", "attention_options": {"width": 6}}
    segmentor = randomised(
        build_segmentor(backbone="mit_b0", decoder="daformer", num_classes=19, window=(64, 128), **parts)
    )
    heads = {
        "decode_head.head.": ("decoder", daformer_names()),
        "decode_head.scale_attention.": ("attention", attention_names()),
    }
    source, output = tmp_path / "iter_40000_relevant.pth", tmp_path / "hrda"
    torch.save({"state_dict": {f"model.{k}": v for k, v in published(segmentor, mit, heads).items()}}, source)
    assert main(["segmentor", str(source), str(output), "--crop", "64", "128", "--resize", "96", "192"]) == 0
    assert "assumed: the dilations of daformer are (1, 6, 12, 18)" in capsys.readouterr().out
    loaded = mfm_dist.load(output)
    assert_equal_states(segmentor, loaded.segmentor)
    assert loaded.segmentor.window == (64, 128)
    assert loaded.card.resize == (96, 192)
    assert (loaded.card.attention, loaded.card.attention_options) == ("segformer", {"width": 6})


def test_hrda_of_deeplabv2_on_a_resnet(tmp_path: Path, resnet: dict[str, Tensor]) -> None:
    shapes = linear("aspp_modules.0.conv", 19, 2048, 3, 3) | linear("aspp_modules.1.conv", 19, 2048, 3, 3)
    head, attention_head = random_weights(shapes), {name: t + 1 for name, t in random_weights(shapes).items()}
    state = {f"backbone.{name}": tensor for name, tensor in resnet.items() if not name.startswith("fc.")}
    state |= {f"decode_head.head.{name}": tensor for name, tensor in head.items()}
    state |= {f"decode_head.scale_attention.{name}": tensor for name, tensor in attention_head.items()}
    state["auxiliary_head.conv_seg.bias"] = torch.zeros(19)
    torch.save({"state_dict": state}, tmp_path / "iter_40000.pth")
    assert main(["segmentor", str(tmp_path / "iter_40000.pth"), str(tmp_path / "out")]) == 0
    card = read_card(tmp_path / "out")
    assert (card.backbone, card.decoder, card.attention, card.crop) == (
        "resnet50c", "deeplabv2", "deeplabv2", (1024, 1024),
    )  # fmt: skip
    segmentor = mfm_dist.load(tmp_path / "out").segmentor
    assert segmentor.backbone.strides == (4, 8, 8, 8)
    converted = segmentor.state_dict()
    assert torch.equal(converted["attention.classifiers.1.weight"], attention_head["aspp_modules.1.conv.weight"])
    assert torch.equal(converted["decoder.classifiers.0.bias"], head["aspp_modules.0.conv.bias"])


@torch.no_grad()
def segformer_logits(w: Weights, maps: list[Tensor], order: list[tuple[str, int]]) -> Tensor:
    """SegFormer's head, its maps stacked in this order of (layer, index of the map)."""
    embedded = []
    for name, index in order:
        tokens = w.linear(maps[index].flatten(2).transpose(1, 2), f"decode_head.{name}.proj")
        enlarged = as_map(tokens, maps[index].shape[2])
        embedded.append(F.interpolate(enlarged, maps[0].shape[2:], mode="bilinear", align_corners=False))
    fused = w.batch_norm(w.conv(torch.cat(embedded, 1), "decode_head.linear_fuse.conv"), "decode_head.linear_fuse.bn")
    return w.conv(F.relu(fused), "decode_head.linear_pred")


@pytest.mark.parametrize(
    ("layers", "coarse_first", "arguments"),
    [
        ([f"linear_c.{i}" for i in range(4)], False, []),
        ([f"linear_c{i + 1}" for i in range(4)], True, []),
        ([f"linear_c.{i}" for i in range(4)], True, ["--stacked", "coarse-first"]),
        ([f"linear_c{i + 1}" for i in range(4)], False, ["--stacked", "fine-first"]),
    ],
)
def test_the_order_of_a_segformer_heads_maps(
    tmp_path: Path, mit: dict[str, Tensor], layers: list[str], coarse_first: bool, arguments: list[str]
) -> None:
    shapes = {"decode_head.linear_fuse.conv.weight": (8, 32, 1, 1)} | linear("decode_head.linear_pred", 19, 8, 1, 1)
    shapes |= norm_shapes("decode_head.linear_fuse.bn", 8)
    for layer, dim in zip(layers, DIMS, strict=True):
        shapes |= linear(f"decode_head.{layer}.proj", 8, dim)
    head = random_weights(shapes)
    torch.save({f"backbone.{k}": v for k, v in mit.items() if k[:4] != "head"} | head, tmp_path / "segformer.pth")
    assert main(["segmentor", str(tmp_path / "segformer.pth"), str(tmp_path / "out"), *arguments]) == 0
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    order = list(zip(layers, range(4), strict=True))
    expected = segformer_logits(Weights(head), mit_maps(mit, image), order[::-1] if coarse_first else order)
    segmentor = mfm_dist.load(tmp_path / "out").segmentor.double()
    with torch.no_grad():
        logits = segmentor.decode(segmentor.encode(image))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_the_teacher_takes_the_students_statistics(tmp_path: Path, mit: dict[str, Tensor]) -> None:
    segmentor = build_segmentor(backbone="mit_b0", decoder="daformer", num_classes=19, decoder_options={"width": 8})
    names = daformer_names()
    state = published(randomised(segmentor), mit, {"decode_head.": ("decoder", names)})
    torch.save(checkpoint(state), tmp_path / "iter_40000.pth")
    command = ["segmentor", str(tmp_path / "iter_40000.pth"), str(tmp_path / "out"), "--weights", "teacher"]
    assert main(command) == 0
    teacher = mfm_dist.load(tmp_path / "out")
    assert teacher.card.weights == "teacher"
    for name, tensor in teacher.segmentor.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor, segmentor.state_dict()[name])
        elif "num_batches" not in name:
            assert not tensor.any(), name
