"""From a configuration to the objects of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mfm_dist.classes import CLASS_NAMES
from mfm_dist.config.schema import RunConfig
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import ConfigError, UserError
from mfm_dist.methods import build_method
from mfm_dist.models.checkpointing import checkpoint_blocks
from mfm_dist.models.rebuilder import Rebuilder
from mfm_dist.models.segmentor import Segmentor, build_segmentor
from mfm_dist.rng import Stream, keyed_seed
from mfm_dist.train_module import TrainModule


@dataclass(frozen=True)
class Readers:
    """The three data sets of a run."""

    labelled: ShardReader
    """What the student is supervised on."""
    target: ShardReader
    validation: ShardReader

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the shards that the run trains on; what it is scored on may change."""
        return {
            "labelled": self.labelled.index.manifest.fingerprint,
            "target": self.target.index.manifest.fingerprint,
        }


def build_student(config: RunConfig) -> Segmentor:
    """The segmenter with its initial weights."""
    model = config.model
    return build_segmentor(
        backbone=model.backbone,
        decoder=model.decoder,
        num_classes=len(CLASS_NAMES),
        pretrained=model.pretrained,
        weights=model.weights,
        backbone_options=model.backbone_options,
        decoder_options=model.decoder_options,
    )


def build_rebuilder(config: RunConfig, student: Segmentor) -> Rebuilder:
    """A Rebuilder for the maps that the student's decoder reads."""
    backbone, settings = student.backbone, config.rebuilder
    return Rebuilder(
        channels=[backbone.channels[index] for index in student.decoder_inputs],
        strides=[backbone.strides[index] for index in student.decoder_inputs],
        embed_channels=backbone.channels[-1],
        width=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        mlp_ratio=settings.mlp_ratio,
        grid=settings.grid,
    )


def build_train_module(config: RunConfig) -> TrainModule:
    """Student, teacher and Rebuilder; the initial weights depend on ``config.seed`` alone.

    Raises:
        ConfigError: with everything that is wrong about the method, the networks and the Rebuilder.
    """
    problems: list[str] = []
    method = student = rebuilder = None
    try:
        method = build_method(config)
    except ConfigError as error:
        problems += error.problems
    torch.manual_seed(keyed_seed(config.seed, Stream.INITIAL_WEIGHTS, 0))
    try:
        student = build_student(config)
        if config.memory.checkpoint_backbone:
            checkpoint_blocks(student.backbone)
    except ConfigError as error:
        problems += error.problems
    if student is not None and config.mfm.enabled:
        # A seed of its own: with or without MFM, a student starts from the same weights.
        torch.manual_seed(keyed_seed(config.seed, Stream.INITIAL_WEIGHTS, 1))
        rebuilder = build_rebuilder(config, student)
    if problems or method is None or student is None:
        raise ConfigError(problems)
    return TrainModule(student=student, rebuilder=rebuilder, method=method, config=config)


def open_readers(config: RunConfig, supervised_on: str) -> Readers:
    """The shard sets of a run, each checked.

    Raises:
        UserError: ConfigError or DataError with what is wrong about each of the three.
    """
    labelled = config.data.source if supervised_on == "source" else config.data.target
    folders = [config.data.root / name for name in (labelled, config.data.target, config.data.validation)]
    readers, errors = [], []
    for folder in dict.fromkeys(folders):
        try:
            readers.append(ShardReader(folder))
        except UserError as error:
            errors.append(error)
    if errors:
        raise _joined(errors)
    opened: dict[Path, ShardReader] = dict(zip(dict.fromkeys(folders), readers, strict=True))
    return Readers(*(opened[folder] for folder in folders))


def _joined(errors: list[UserError]) -> UserError:
    """One error for several, of the kind of the first."""
    if isinstance(errors[0], ConfigError):
        return ConfigError([text for error in errors for text in getattr(error, "problems", [str(error)])])
    return type(errors[0])("\n".join(str(error) for error in errors))
