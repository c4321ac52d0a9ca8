"""MiT-B0, ResNet-50 v1c and EfficientNet-Lite0 by their definitions, on weights under their published names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DIMS, DEPTHS, HEADS, REDUCTIONS = (32, 64, 160, 256), (2, 2, 2, 2), (1, 2, 5, 8), (8, 4, 2, 1)  # MiT-B0
STRIDES = {"layer1": 1, "layer2": 2, "layer3": 1, "layer4": 1}  # of a dilated ResNet
LITE0 = (
    # channels, kernel, stride and number of a stage's blocks; all but the first stage expand six times inside
    (16, 3, 1, 1), (24, 3, 2, 2), (40, 5, 2, 2), (80, 3, 2, 3), (112, 5, 1, 3), (192, 5, 2, 4), (320, 3, 1, 1),
)  # fmt: skip
DILATIONS = {"layer1": (1,) * 3, "layer2": (1,) * 4, "layer3": (1, *(2,) * 5), "layer4": (2, 4, 4)}  # ResNet-50


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
            state[name] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
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

    def conv(self, x: Tensor, name: str, **options: Any) -> Tensor:
        return F.conv2d(x, *self.pair(name), **options)

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self.pair(name), eps)

    def batch_norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        mean, variance = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, *self.pair(name), training=False, eps=eps)


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


def lite0_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"_conv_stem.weight": (32, 3, 3, 3)} | norm_shapes("_bn0", 32)
    before, number = 32, 0
    for channels, kernel, _, blocks in LITE0:
        for _ in range(blocks):
            block, inside = f"_blocks.{number}", before * (6 if number else 1)
            if number:
                shapes |= {f"{block}._expand_conv.weight": (inside, before, 1, 1)}
                shapes |= norm_shapes(f"{block}._bn0", inside)
            shapes |= {f"{block}._depthwise_conv.weight": (inside, 1, kernel, kernel)}
            shapes |= norm_shapes(f"{block}._bn1", inside)
            shapes |= {f"{block}._project_conv.weight": (channels, inside, 1, 1)}
            shapes |= norm_shapes(f"{block}._bn2", channels)
            before, number = channels, number + 1
    shapes |= {"_conv_head.weight": (1280, 320, 1, 1)} | norm_shapes("_bn1", 1280)
    return shapes | linear("_fc", 10, 1280)


def lite0_maps(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """EfficientNet-Lite0's maps at strides 2 to 32, padded as TensorFlow does: the odd pixel comes last."""
    w = Weights(state)

    def conv(x: Tensor, name: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        kernel = w.pair(name)[0].shape[-1]
        sides = [max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in (x.shape[3], x.shape[2])]
        x = F.pad(x, [end for side in sides for end in (side // 2, side - side // 2)])
        return w.batch_norm(w.conv(x, name, stride=stride, groups=groups), norm, eps=1e-3)

    x = F.relu6(conv(x, "_conv_stem", "_bn0", stride=2))
    maps, number = [], 0
    for stage, (_, _, stride, blocks) in enumerate(LITE0):
        for index in range(blocks):
            block, y = f"_blocks.{number}", x
            if number:
                y = F.relu6(conv(y, f"{block}._expand_conv", f"{block}._bn0"))
            step = stride if index == 0 else 1
            y = F.relu6(conv(y, f"{block}._depthwise_conv", f"{block}._bn1", stride=step, groups=y.shape[1]))
            y = conv(y, f"{block}._project_conv", f"{block}._bn2")
            x = x + y if index else y
            number += 1
        if stage in (0, 1, 2, 4, 6):  # the last at their strides
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
