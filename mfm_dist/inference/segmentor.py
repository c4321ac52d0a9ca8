"""A trained segmentor on its own: what an export folder holds, and how it is loaded.

An export folder holds ``model.safetensors`` (weights and BatchNorm statistics of the plain segmentor) and
``config.json`` (``ModelCard``: what builds the network again and what its numbers mean), a ``README.md`` for people,
and nothing to unpickle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mfm_dist.classes import ClassSet, read_classes
from mfm_dist.config.loader import from_tree, shown, to_tree
from mfm_dist.config.schema import FloatAbove0, IntFrom0, Pixels
from mfm_dist.config.validate import range_problems
from mfm_dist.errors import ConfigError, CorruptFileError
from mfm_dist.inference.predict_labels import predict_labels
from mfm_dist.models.hrda import build_segmentor
from mfm_dist.models.loaded_weights import not_finite, wrong_types
from mfm_dist.models.preprocessing import normalise
from mfm_dist.storage import read_json, require_regular

CONFIG, WEIGHTS, ONNX, README = "config.json", "model.safetensors", "model.onnx", "README.md"
FORMAT = "mfm_dist segmentor 1"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Everything about a trained segmentor but its weights."""

    backbone: str
    backbone_options: dict[str, Any]
    decoder: str
    decoder_options: dict[str, Any]
    attention: str | None = None
    """Decoder that weighs detail against context (HRDA); None for one resolution."""
    attention_options: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...]
    """Index = channel of the logits = value of a predicted pixel."""
    palette: tuple[tuple[int, int, int], ...]
    """RGB colour of each class."""
    mean: tuple[float, float, float]
    """RGB in 0..255; an image is normalised as (value - mean) / std."""
    std: tuple[FloatAbove0, FloatAbove0, FloatAbove0]
    """RGB in 0..255."""
    weights: Literal["student", "teacher"]
    """The teacher is the student's moving average, with the student's BatchNorm statistics."""
    run: str
    """Name of the run folder."""
    method: str
    crop: tuple[Pixels, Pixels]
    """Training crop (height, width) in pixels. Prediction takes images of any size: whole, with HRDA in windows."""
    resize: tuple[Pixels, Pixels] | None = None
    """Prediction fits images into this box (height, width), aspect kept, and enlarges the logits to their own size, as
    the evaluation of the run does; None: images as they are."""
    fp32_math: Literal["ieee", "tf32"] = "ieee"
    """As the run's ``train.fp32_math``. The commands set torch to it; ``mfm_dist.load`` leaves torch as it is."""
    step: IntFrom0
    """Global batches the weights were trained on."""
    miou: float | None
    """Mean IoU in percent on the run's validation set at this step; None where it was not measured."""
    revision: str | None
    """Git revision of the code that trained it; None if that was not a clone."""
    format: str = FORMAT

    @property
    def classes(self) -> ClassSet:
        """What it tells apart."""
        return ClassSet(names=self.class_names, palette=self.palette)

    def to_json(self) -> str:
        """Return the text of config.json."""
        return json.dumps(to_tree(self), indent=1) + "\n"


class TrainedSegmentor(nn.Module):
    """The ``Segmentor`` that a card describes, with the card beside it; parameters and forward are the segmentor's.

    Its weights are random until some are loaded into ``segmentor``.

    Raises:
        ConfigError: if there is no such network.
    """

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
        self.segmentor = build_segmentor(
            backbone=card.backbone,
            decoder=card.decoder,
            num_classes=len(card.class_names),
            backbone_options=card.backbone_options,
            decoder_options=card.decoder_options,
            attention=card.attention,
            attention_options=card.attention_options,
            window=card.crop,
        )
        self.card = card

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits [B, num_classes, H, W] of normalised images [B, 3, H, W]."""
        logits: Tensor = self.segmentor(image)
        return logits

    def normalise(self, image: Tensor) -> Tensor:
        """Turn uint8 RGB [B, 3, H, W] into the float32 images that the forward takes, as in training."""
        return normalise(image, self.card.mean, self.card.std)

    def predict(self, image: Tensor) -> Tensor:
        """Return the most probable class of every pixel of a uint8 RGB image [3, H, W]: int64 [H, W], on its device.

        As in evaluation: the image is taken whole, or in the windows of the segmentor, and at ``card.resize``.
        """
        device = next(self.parameters()).device
        return predict_labels(self.segmentor, image, device, self.normalise, fit_into=self.card.resize)


def load_export(folder: Path) -> TrainedSegmentor:
    """Load the segmentor of an export folder, on the CPU, in evaluation mode.

    Raises:
        ConfigError: if the folder is none, or one that cannot be used.
    """
    model, file = TrainedSegmentor(read_card(folder)), folder / WEIGHTS
    own = {name: tensor.dtype for name, tensor in model.segmentor.state_dict().items()}
    try:
        tensors = load_file(require_regular(file))
        if problems := [*wrong_types({name: t.dtype for name, t in tensors.items()}, own), *not_finite(tensors)]:
            raise CorruptFileError(min(problems))
        model.segmentor.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError, CorruptFileError) as error:
        raise ConfigError(f"{file} cannot be used ({str(error)[:600]}): export the run again") from error
    return model.eval()


def read_card(folder: Path) -> ModelCard:
    """Read ``config.json`` of an export folder.

    Raises:
        ConfigError: if there is none, or not one that this code can read.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ConfigError(f"{folder} is neither an export ({CONFIG} is missing) nor a run folder (so is config.yaml)")
    problems: dict[str, str] = {}
    try:
        tree = read_json(file)
        form = tree.get("format")
        if form != FORMAT:
            raise ConfigError(f"{file}: its format is {shown(form)}, this code reads {FORMAT!r}")
        card = from_tree(ModelCard, tree, problems)
    except (OSError, TypeError, CorruptFileError) as error:  # a key that is missing is a TypeError
        raise ConfigError([*problems.values(), f"{file} cannot be read ({error}): export the run again"]) from error
    if found := list(problems.values()) or list(range_problems(card)):
        raise ConfigError([f"{file}: {problem}" for problem in found])
    read_classes({"names": list(card.class_names), "palette": [list(colour) for colour in card.palette]}, str(file))
    return card


def is_export(folder: Path) -> bool:
    """Tell whether a folder is an export and nothing else, so that another may take its place."""
    if {path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS, ONNX, README}:
        return False
    try:
        tree = read_json(folder / CONFIG)
    except (OSError, CorruptFileError):
        return False
    return str(tree.get("format")).startswith("mfm_dist segmentor")
