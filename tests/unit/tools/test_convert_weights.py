from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import mfm_dist
from mfm_dist.exported import read_about
from mfm_dist.models.backbone import Backbone
from mfm_dist.models.hrda import at_two_resolutions
from mfm_dist.models.segmentor import Segmentor, build_segmentor
from tools.convert_weights import main
from tools.key_maps import MIT_SIZES, read_encoder

DEEPLAB = {"output_stride": 8, "out_indices": (1, 2, 3, 4)}
DIMS, DEPTHS, HEADS, REDUCTIONS = (32, 64, 160, 256), (2, 2, 2, 2), (1, 2, 5, 8), (8, 4, 2, 1)  # MiT-B0
STRIDES = {"layer1": 1, "layer2": 2, "layer3": 1, "layer4": 1}  # of a dilated ResNet
DILATIONS = {"layer1": (1,) * 3, "layer2": (1,) * 4, "layer3": (1, *(2,) * 5), "layer4": (2, 4, 4)}  # ResNet-50
VARIANCES = ("running_var", "norm.weight", "norm1.weight", "norm2.weight", "bn1.weight")

# The published encoders, by their definition, on weights under their published names


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """float32 values that keep activations near 1 in size; none is what a layer starts from."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) == 1:
            centre = 1.0 if name.endswith(("weight", "running_var")) else 0.0
            state[name] = centre + 0.2 * (torch.rand(shape, generator=generator) - 0.5)
        else:
            fan_in = shape[1:].numel() if isinstance(shape, torch.Size) else torch.Size(shape[1:]).numel()
            state[name] = torch.randn(shape, generator=generator) * fan_in**-0.5
    return state


def linear(name: str, outputs: int, *inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}


def mit_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    before = 3
    for stage, (dim, depth, reduction) in enumerate(zip(DIMS, DEPTHS, REDUCTIONS, strict=True), 1):
        kernel = 7 if stage == 1 else 3
        shapes |= linear(f"patch_embed{stage}.proj", dim, before, kernel, kernel)
        shapes |= linear(f"patch_embed{stage}.norm", dim) | linear(f"norm{stage}", dim)
        for number in range(depth):
            block = f"block{stage}.{number}"
            shapes |= linear(f"{block}.norm1", dim) | linear(f"{block}.norm2", dim)
            shapes |= linear(f"{block}.attn.q", dim, dim) | linear(f"{block}.attn.kv", 2 * dim, dim)
            shapes |= linear(f"{block}.attn.proj", dim, dim)
            if reduction > 1:
                shapes |= linear(f"{block}.attn.sr", dim, dim, reduction, reduction) | linear(f"{block}.attn.norm", dim)
            shapes |= linear(f"{block}.mlp.fc1", 4 * dim, dim) | linear(f"{block}.mlp.fc2", dim, 4 * dim)
            shapes |= linear(f"{block}.mlp.dwconv.dwconv", 4 * dim, 1, 3, 3)
        before = dim
    return shapes | linear("head", 1000, DIMS[-1])


class Weights:
    """A state dict in fp64 and the layers that its names stand for."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}

    def pair(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.state[f"{name}.weight"], self.state.get(f"{name}.bias")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, *self.pair(name))

    def conv(self, x: Tensor, name: str, **options: int) -> Tensor:
        return F.conv2d(x, *self.pair(name), **options)

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self.pair(name), eps)

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        mean, variance = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, *self.pair(name), training=False, eps=1e-5)


def as_map(tokens: Tensor, height: int) -> Tensor:
    """[B, N, C] -> [B, C, height, N / height]."""
    return tokens.transpose(1, 2).unflatten(2, (height, -1))


def mit_maps(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """MiT-B0 as SegFormer's authors publish it."""
    w = Weights(state)
    maps = []
    for stage in (1, 2, 3, 4):
        stride, padding = (4, 3) if stage == 1 else (2, 1)
        x = w.conv(x, f"patch_embed{stage}.proj", stride=stride, padding=padding)
        height = x.shape[2]
        tokens = w.layer_norm(x.flatten(2).transpose(1, 2), f"patch_embed{stage}.norm", 1e-5)
        for number in range(DEPTHS[stage - 1]):
            block = f"block{stage}.{number}"
            tokens = tokens + attention(w, tokens, height, stage, block)
            hidden = w.linear(w.layer_norm(tokens, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")
            spatial = w.conv(as_map(hidden, height), f"{block}.mlp.dwconv.dwconv", padding=1, groups=hidden.shape[-1])
            tokens = tokens + w.linear(F.gelu(spatial.flatten(2).transpose(1, 2)), f"{block}.mlp.fc2")
        x = as_map(w.layer_norm(tokens, f"norm{stage}", 1e-6), height)
        maps.append(x)
    return maps


def attention(w: Weights, tokens: Tensor, height: int, stage: int, block: str) -> Tensor:
    """Every token looks at a coarser grid of them, head by head."""
    normed = w.layer_norm(tokens, f"{block}.norm1", 1e-6)
    seen, reduction = normed, REDUCTIONS[stage - 1]
    if reduction > 1:
        coarse = w.conv(as_map(normed, height), f"{block}.attn.sr", stride=reduction)
        seen = w.layer_norm(coarse.flatten(2).transpose(1, 2), f"{block}.attn.norm", 1e-5)
    query = w.linear(normed, f"{block}.attn.q")
    keys, values = w.linear(seen, f"{block}.attn.kv").chunk(2, dim=-1)
    size = DIMS[stage - 1] // HEADS[stage - 1]
    answers = []
    for q, k, v in zip(query.split(size, -1), keys.split(size, -1), values.split(size, -1), strict=True):
        answers.append(torch.softmax(q @ k.transpose(1, 2) / size**0.5, dim=-1) @ v)
    return w.linear(torch.cat(answers, dim=-1), f"{block}.attn.proj")


def norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    statistics = {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)}
    return linear(name, channels) | statistics | {f"{name}.num_batches_tracked": ()}


def resnet_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for place, (inputs, outputs) in {0: (3, 32), 3: (32, 32), 6: (32, 64)}.items():
        shapes |= {f"stem.{place}.weight": (outputs, inputs, 3, 3)} | norm_shapes(f"stem.{place + 1}", outputs)
    before = 64
    for stage, (layer, dilations) in enumerate(DILATIONS.items()):
        width = 64 * 2**stage
        for number in range(len(dilations)):
            block = f"{layer}.{number}"
            for index, shape in enumerate(((width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)), 1):
                shapes |= {f"{block}.conv{index}.weight": shape} | norm_shapes(f"{block}.bn{index}", shape[0])
            if number == 0:
                shapes |= {f"{block}.downsample.0.weight": (4 * width, before, 1, 1)}
                shapes |= norm_shapes(f"{block}.downsample.1", 4 * width)
            before = 4 * width
    return shapes | linear("fc", 10, before)


def resnet_maps(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """ResNet-50 v1c of DeepLab: three small convolutions at its start, dilations instead of the last two strides."""
    w = Weights(state)
    for place in (0, 3, 6):
        x = w.conv(x, f"stem.{place}", stride=2 if place == 0 else 1, padding=1)
        x = F.relu(w.batch_norm(x, f"stem.{place + 1}"))
    x = F.max_pool2d(x, 3, 2, padding=1)
    maps = []
    for layer, dilations in DILATIONS.items():
        for number, dilation in enumerate(dilations):
            block, stride = f"{layer}.{number}", STRIDES[layer] if number == 0 else 1
            y = F.relu(w.batch_norm(w.conv(x, f"{block}.conv1"), f"{block}.bn1"))
            y = w.conv(y, f"{block}.conv2", stride=stride, padding=dilation, dilation=dilation)
            y = w.batch_norm(w.conv(F.relu(w.batch_norm(y, f"{block}.bn2")), f"{block}.conv3"), f"{block}.bn3")
            if number == 0:
                x = w.batch_norm(w.conv(x, f"{block}.downsample.0", stride=stride), f"{block}.downsample.1")
            x = F.relu(x + y)
        maps.append(x)
    return maps


def hugging_face(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same MiT as Hugging Face stores it."""
    for name, tensor in state.items():
        root, *rest = name.split(".")
        stage = int(root[-1]) - 1 if root[-1].isdigit() else None
        leaf = rest[-1]
        if root == "head":
            yield f"classifier.{leaf}", tensor
        elif root.startswith("patch_embed"):
            yield f"segformer.encoder.patch_embeddings.{stage}.{rest[0].replace('norm', 'layer_norm')}.{leaf}", tensor
        elif root.startswith("norm"):
            yield f"segformer.encoder.layer_norm.{stage}.{leaf}", tensor
        else:
            number, layer = rest[0], ".".join(rest[1:-1])
            block = f"segformer.encoder.block.{stage}.{number}"
            if layer == "attn.kv":
                keys, values = tensor.chunk(2)
                yield f"{block}.attention.self.key.{leaf}", keys.clone()
                yield f"{block}.attention.self.value.{leaf}", values.clone()
                continue
            theirs = {
                "norm1": "layer_norm_1",
                "norm2": "layer_norm_2",
                "attn.q": "attention.self.query",
                "attn.sr": "attention.self.sr",
                "attn.norm": "attention.self.layer_norm",
                "attn.proj": "attention.output.dense",
                "mlp.fc1": "mlp.dense1",
                "mlp.fc2": "mlp.dense2",
                "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
            }[layer]
            yield f"{block}.{theirs}.{leaf}", tensor


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


# Segmenters: names as in the repositories, to be read beside ours


def conv_norm(theirs: str, ours: str) -> dict[str, str]:
    names = {f"{theirs}.conv.weight": f"{ours}.0.weight"}
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return names | {f"{theirs}.bn.{part}": f"{ours}.1.{part}" for part in statistics}


def plain_conv(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def separable(theirs: str, ours: str, norm: bool = True) -> dict[str, str]:
    parts = ("depthwise_conv", "pointwise_conv")
    if norm:
        return {t: o for i, part in enumerate(parts) for t, o in conv_norm(f"{theirs}.{part}", f"{ours}.{i}").items()}
    both = [plain_conv(f"{theirs}.{part}.conv", f"{ours}.{i}.0") for i, part in enumerate(parts)]
    return both[0] | both[1]


def merged(*parts: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for part in parts for theirs, ours in part.items()}


def daformer_names() -> dict[str, str]:
    return merged(
        *(plain_conv(f"embed_layers.{i}.proj", f"embeddings.{i}") for i in range(4)),
        conv_norm("fuse_layer.aspp_modules.0", "branches.0"),
        *(separable(f"fuse_layer.aspp_modules.{i}", f"branches.{i}") for i in (1, 2, 3)),
        conv_norm("fuse_layer.bottleneck", "bottleneck"),
        plain_conv("conv_seg", "classifier"),
    )


def attention_names() -> dict[str, str]:
    return merged(
        *(plain_conv(f"embed_layers.{i}.proj", f"embeddings.{i}") for i in range(4)),
        conv_norm("fuse_layer", "fusion"),
        plain_conv("conv_seg", "classifier"),
    )


def segformer_names() -> dict[str, str]:
    return merged(
        *(plain_conv(f"linear_c.{i}.proj", f"embeddings.{i}") for i in range(4)),
        conv_norm("linear_fuse", "fusion"),
        plain_conv("linear_pred", "classifier"),
    )


def deeplabv2_names(branches: int) -> dict[str, str]:
    return merged(*(plain_conv(f"aspp_modules.{i}.conv", f"classifiers.{i}") for i in range(branches)))


def deeplabv3plus_names(norm: bool) -> dict[str, str]:
    def single(theirs: str, ours: str) -> dict[str, str]:
        return conv_norm(theirs, ours) if norm else plain_conv(f"{theirs}.conv", f"{ours}.0")

    return merged(
        single("image_pool.1", "image_pool"),
        single("aspp_modules.0", "branches.0"),
        *(separable(f"aspp_modules.{i}", f"branches.{i}", norm) for i in (1, 2, 3)),
        single("bottleneck", "bottleneck"),
        single("c1_bottleneck", "low_level"),
        *(separable(f"sep_bottleneck.{i}", f"refine.{i}", norm) for i in (0, 1)),
        plain_conv("conv_seg", "classifier"),
    )


HEADS_OF_MIT = {
    "daformer": ("daformer", {"width": 8}, daformer_names(), []),
    "segformer": ("segformer", {"width": 12}, segformer_names(), []),
    "deeplabv2": ("deeplabv2", {"dilations": (6, 12)}, deeplabv2_names(2), []),
    "deeplabv2 as first published": ("deeplabv2", {"dilations": (6, 12, 18, 24)}, deeplabv2_names(4), []),
    "deeplabv3plus": (
        "deeplabv3plus",
        {"width": 8, "low_level_width": 6, "dilations": (1, 6, 12, 18)},
        deeplabv3plus_names(norm=False),
        ["--dilations", "1", "6", "12", "18"],
    ),
    "deeplabv3plus with norms": (
        "deeplabv3plus",
        {"width": 8, "low_level_width": 6, "dilations": (1, 6, 12, 18), "norm": True},
        deeplabv3plus_names(norm=True),
        ["--dilations", "1", "6", "12", "18"],
    ),
}


def randomised(segmentor: Segmentor) -> Segmentor:
    shapes = {name: tuple(tensor.shape) for name, tensor in segmentor.state_dict().items()}
    segmentor.load_state_dict(random_weights(shapes))
    return segmentor.eval()


def published(segmentor: Segmentor, mit: dict[str, Tensor], heads: dict[str, tuple[str, dict[str, str]]]) -> dict:
    """A segmenter's weights as the repositories name them; its encoder is made to be ``mit``.

    Args:
        heads: prefix in the file -> part of ours, their names to ours.
    """
    encoder = read_encoder({name: tensor for name, tensor in mit.items() if not name.startswith("head.")})
    flat = {name.replace("stages.", "stages_"): tensor for name, tensor in encoder.tensors.items()}
    segmentor.backbone.net.load_state_dict(flat)
    state = {f"backbone.{name}": tensor for name, tensor in mit.items() if not name.startswith("head.")}
    for prefix, (part, names) in heads.items():
        ours = segmentor.get_submodule(part).state_dict()
        assert set(names.values()) == set(ours)
        state |= {f"{prefix}{theirs}": ours[name] for theirs, name in names.items()}
    return state


def checkpoint(student: dict[str, Tensor]) -> dict[str, object]:
    """What the repositories save, its teacher all zeros."""
    state = {f"model.{name}": tensor for name, tensor in student.items()}
    state |= {f"ema_model.{name}": torch.zeros_like(tensor) for name, tensor in student.items()}
    state |= {f"imnet_model.{name}": tensor for name, tensor in student.items()}
    return {"meta": {"iter": 40000, "CLASSES": ["road"]}, "state_dict": state, "optimizer": {"state": {}}}


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
    assert (loaded.about.decoder, loaded.about.step, loaded.about.crop) == (decoder, 40000, (512, 512))
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(loaded(image), segmentor(image))


def test_hrda_with_its_scale_attention(
    tmp_path: Path, mit: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = build_segmentor(backbone="mit_b0", decoder="daformer", num_classes=19, decoder_options={"width": 8})
    options = {"attention": "segformer", "options": {"width": 6}, "num_classes": 19, "window": (64, 128)}
    segmentor = randomised(at_two_resolutions(plain, **options))
    heads = {
        "decode_head.head.": ("decoder", daformer_names()),
        "decode_head.scale_attention.": ("attention", attention_names()),
    }
    source, output = tmp_path / "iter_40000_relevant.pth", tmp_path / "hrda"
    torch.save({"state_dict": {f"model.{k}": v for k, v in published(segmentor, mit, heads).items()}}, source)
    assert main(["segmentor", str(source), str(output), "--crop", "64", "128"]) == 0
    assert "assumed: the dilations of daformer are (1, 6, 12, 18)" in capsys.readouterr().out
    loaded = mfm_dist.load(output)
    assert_equal_states(segmentor, loaded.segmentor)
    assert loaded.segmentor.window == (64, 128)
    assert (loaded.about.attention, loaded.about.attention_options) == ("segformer", {"width": 6})


def test_hrda_of_deeplabv2_on_a_resnet(tmp_path: Path, resnet: dict[str, Tensor]) -> None:
    shapes = dict.fromkeys(("aspp_modules.0.conv.weight", "aspp_modules.1.conv.weight"), (19, 2048, 3, 3))
    shapes |= dict.fromkeys(("aspp_modules.0.conv.bias", "aspp_modules.1.conv.bias"), (19,))
    head, attention_head = random_weights(shapes), {name: t + 1 for name, t in random_weights(shapes).items()}
    state = {f"backbone.{name}": tensor for name, tensor in resnet.items() if not name.startswith("fc.")}
    state |= {f"decode_head.head.{name}": tensor for name, tensor in head.items()}
    state |= {f"decode_head.scale_attention.{name}": tensor for name, tensor in attention_head.items()}
    state["auxiliary_head.conv_seg.bias"] = torch.zeros(19)
    torch.save({"state_dict": state}, tmp_path / "iter_40000.pth")
    assert main(["segmentor", str(tmp_path / "iter_40000.pth"), str(tmp_path / "out")]) == 0
    about = read_about(tmp_path / "out")
    assert (about.backbone, about.decoder, about.attention, about.crop) == (
        "resnet50c", "deeplabv2", "deeplabv2", (1024, 1024),
    )  # fmt: skip
    segmentor = mfm_dist.load(tmp_path / "out").segmentor
    assert segmentor.backbone.strides == (4, 8, 8, 8)
    assert torch.equal(segmentor.attention.classifiers[1].weight, attention_head["aspp_modules.1.conv.weight"])
    assert torch.equal(segmentor.decoder.classifiers[0].bias, head["aspp_modules.0.conv.bias"])


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
    assert teacher.about.weights == "teacher"
    for name, tensor in teacher.segmentor.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor, segmentor.state_dict()[name])
        elif "num_batches" not in name:
            assert not tensor.any(), name


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
