"""Names of the heads in the checkpoints of DAFormer, HRDA and MIC, beside ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfm_dist.models.segmentor import Segmentor
from tests.helpers.published_encoders import (
    random_weights,
)
from tools.key_maps import read_encoder


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


HEADS_OF_MIT: dict[str, tuple[str, dict[str, Any], dict[str, str], list[str]]] = {
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
    """A segmentor's weights as the repositories name them; its encoder is made to be ``mit``.

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


def checkpoint(student: dict[str, Tensor]) -> dict[str, Any]:
    """What the repositories save, its teacher all zeros."""
    state = {f"model.{name}": tensor for name, tensor in student.items()}
    state |= {f"ema_model.{name}": torch.zeros_like(tensor) for name, tensor in student.items()}
    state |= {f"imnet_model.{name}": tensor for name, tensor in student.items()}
    return {"meta": {"iter": 40000, "CLASSES": ["road"]}, "state_dict": state, "optimizer": {"state": {}}}
