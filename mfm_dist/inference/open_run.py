"""Open a run folder for the commands that come after training."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mfm_dist.build import build_train_module, fix_encoder
from mfm_dist.checkpoint.contents import load_modules, load_student, load_teacher
from mfm_dist.checkpoint.files import Checkpoint, find_latest
from mfm_dist.config.schema import MemorySection, RunConfig
from mfm_dist.errors import ConfigError, CorruptFileError
from mfm_dist.inference.segmentor import ModelCard, TrainedSegmentor
from mfm_dist.models.lora import merge_lora
from mfm_dist.models.preprocessing import IMAGE_MEAN, IMAGE_STD
from mfm_dist.run.folder import RunFolder, read_config
from mfm_dist.storage import read_json
from mfm_dist.train_module import TrainModule


@dataclass(frozen=True)
class TrainedRun:
    """A run, its newest checkpoint, and the segmentor in it."""

    config: RunConfig
    checkpoint: Checkpoint
    model: TrainedSegmentor
    scores: dict[str, Any]
    """The evaluation at the checkpoint's step, as read; empty if there is none."""


def open_run(path: Path, weights: Literal["student", "teacher"] = "student") -> TrainedRun:
    """Load the segmentor of a run's newest complete checkpoint, on the CPU; damaged ones are named on stderr.

    What LoRA added to its encoder is merged into the weights.

    Raises:
        ConfigError: no run folder, no checkpoint yet, or no teacher where one is asked for.
    """
    config, checkpoint = _newest(path)
    scores = _read_json(RunFolder(path, writes=False).evaluation(checkpoint.progress.step))
    model = TrainedSegmentor(_card(path, config, weights, checkpoint, scores))
    load = load_student if weights == "student" else load_teacher
    fix_encoder(model.segmentor, config.model)
    load(checkpoint, model.segmentor)
    merge_lora(model.segmentor.backbone.net)
    return TrainedRun(config, checkpoint, model.eval(), scores)


def open_train_module(path: Path) -> tuple[TrainModule, Checkpoint]:
    """Load student, teacher and Rebuilder of a run's newest complete checkpoint, on the CPU, and that checkpoint.

    Nothing of it is compiled or recomputes activations, through which one backward alone could go; its configuration
    says so.

    Raises:
        ConfigError: no run folder, or no checkpoint yet.
    """
    config, checkpoint = _newest(path)
    module = build_train_module(without_training(config), checkpoint.classes)
    load_modules(checkpoint, module)
    return module, checkpoint


def without_training(config: RunConfig) -> RunConfig:
    """Return the configuration for networks that a checkpoint is loaded into, and that are looked at alone."""
    return replace(
        config,
        model=replace(config.model, pretrained=False, weights=None),  # the checkpoint brings all weights
        memory=MemorySection(),
        train=replace(config.train, compile=False),
    )


def _newest(path: Path) -> tuple[RunConfig, Checkpoint]:
    """Read configuration and newest complete checkpoint of a run; damaged ones are named on stderr."""
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: no run folder (it has no config.yaml)")
    config = read_config(path)
    checkpoint = find_latest(path / "checkpoints", report=lambda line: print(line, file=sys.stderr))
    if checkpoint is None:
        raise ConfigError(f"{path / 'checkpoints'} holds no complete checkpoint yet")
    return config, checkpoint


def _card(
    path: Path,
    config: RunConfig,
    weights: Literal["student", "teacher"],
    checkpoint: Checkpoint,
    scores: Mapping[str, Any],
) -> ModelCard:
    """Gather what there is to say about the segmentor in a checkpoint of a run."""
    miou = scores.get("miou")
    revision = _read_json(path / "environment.json").get("revision")
    return ModelCard(
        backbone=config.model.backbone,
        backbone_options=config.model.backbone_options,
        decoder=config.model.decoder,
        decoder_options=config.model.decoder_options,
        attention=config.hrda.attention if config.two_resolutions else None,
        attention_options=config.hrda.attention_options if config.two_resolutions else {},
        class_names=checkpoint.classes.names,
        palette=checkpoint.classes.palette,
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
        weights=weights,
        run=path.resolve().name,
        method=config.method_label + (" + MFM" if config.mfm.enabled else ""),
        crop=config.data.crop,
        resize=config.eval.resize,
        fp32_math=config.train.fp32_math,
        step=checkpoint.progress.step,
        miou=miou if weights == "student" and isinstance(miou, float) else None,  # evaluation scores the student
        revision=revision if isinstance(revision, str) else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Read a small file of the run; empty if it is missing, as after a kill between a checkpoint and its evaluation.

    One that cannot be read is named on stderr: it says where the weights come from, and they are of use without.
    """
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except (OSError, CorruptFileError) as error:
        print(f"{path.parent}: {error}; what it says is left out", file=sys.stderr)
        return {}
