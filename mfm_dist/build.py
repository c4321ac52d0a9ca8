"""From a configuration to the objects of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from mfm_dist.classes import CLASS_NAMES
from mfm_dist.config.schema import DataSection, RunConfig, is_stream
from mfm_dist.data.pipeline import TrainPipeline
from mfm_dist.data.reader import ShardReader, open_tar
from mfm_dist.data.staging import Scratch
from mfm_dist.data.streaming import ShardStream
from mfm_dist.errors import ConfigError, UserError, first_line
from mfm_dist.methods import build_method
from mfm_dist.methods.mfm import PATCH
from mfm_dist.models.activation_checkpointing import checkpoint_blocks
from mfm_dist.models.hrda import build_segmentor
from mfm_dist.models.rebuilder import Rebuilder
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.models.size_limit import limited_size
from mfm_dist.rng import Stream, keyed_seed
from mfm_dist.shards.scene_shards import write_scenes
from mfm_dist.train_module import TrainModule


@dataclass(frozen=True)
class Readers:
    """The three data sets of a run."""

    labelled: ShardReader | ShardStream
    """What the student is supervised on."""
    target: ShardReader | ShardStream
    validation: ShardReader

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the shards that the run trains on; what it is scored on may change."""
        return {
            "labelled": self.labelled.fingerprint,
            "target": self.target.fingerprint,
        }


def build_student(config: RunConfig) -> Segmentor:
    """Build the segmentor with its initial weights; of HRDA, where that is the method."""
    model = config.model
    return build_segmentor(
        backbone=model.backbone,
        decoder=model.decoder,
        num_classes=len(CLASS_NAMES),
        pretrained=model.pretrained,
        weights=model.weights,
        backbone_options=model.backbone_options,
        decoder_options=model.decoder_options,
        attention=config.hrda.attention if config.two_resolutions else None,
        attention_options=config.hrda.attention_options,
        window=config.data.crop,
    )


def build_rebuilder(config: RunConfig, student: Segmentor) -> Rebuilder:
    """Build a Rebuilder for the maps that the student's decoder reads, or for patches of the image."""
    backbone, settings = student.backbone, config.rebuilder
    channels = [backbone.channels[index] for index in student.decoder_inputs]
    strides = [backbone.strides[index] for index in student.decoder_inputs]
    if config.mfm.reconstruction == "pixels":
        channels, strides = [3 * PATCH * PATCH], [PATCH]
    with limited_size("rebuilder.width, depth, mlp_ratio and grid"):
        return Rebuilder(
            channels=channels,
            strides=strides,
            embed_channels=backbone.channels[-1],
            width=settings.width,
            depth=settings.depth,
            num_heads=settings.heads,
            mlp_ratio=settings.mlp_ratio,
            grid=settings.grid,
        )


def build_train_module(config: RunConfig) -> TrainModule:
    """Build student, teacher and Rebuilder; the initial weights depend on ``config.seed`` alone.

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
    if student is not None and config.mfm.enabled and config.mfm.use_rebuilder:
        # A seed of its own: with or without MFM, a student starts from the same weights.
        torch.manual_seed(keyed_seed(config.seed, Stream.INITIAL_WEIGHTS, 1))
        rebuilder = build_rebuilder(config, student)
    if problems or method is None or student is None:
        raise ConfigError(problems)
    module = TrainModule(student=student, rebuilder=rebuilder, method=method, config=config)
    if config.train.compile:
        compile_networks(module)
    return module


@torch.no_grad()
def check_shapes(module: TrainModule) -> None:
    """Run one training crop through the networks on the meta device, where nothing is computed; they stay there.

    Raises:
        ConfigError: they cannot take it.
    """
    crop = module.config.data.crop
    try:
        module.to("meta").train()
        image = torch.empty(module.config.train.micro_batch, 3, *crop, device="meta")
        module.student(image)
        if module.rebuilder is not None and module.config.mfm.reconstruction != "pixels":
            features = module.student.encode(module.student.context(image))
            mask = torch.zeros(len(image), *module.rebuilder.grid, dtype=torch.bool, device="meta")
            inputs = [features[index] for index in module.student.decoder_inputs]
            module.rebuilder(features[-1], inputs, mask)
    except Exception as error:  # whatever a layer of timm or torch says of a shape
        raise ConfigError(
            f"the networks cannot take crops of data.crop={crop[0]}x{crop[1]} ({type(error).__name__}: "
            f"{first_line(error)[:300]}): change it, or model.backbone_options or model.decoder_options"
        ) from error


def compile_networks(module: TrainModule) -> None:
    """Compile student, teacher and initial encoder by torch.compile, at their first forward; names and weights stay.

    Dropout draws torch's own numbers, so that a compiled run sees the same ones as any other.
    """
    segmentors = [module.student] if module.teacher is None else [module.student, module.teacher.segmentor]
    parts = [part for segmentor in segmentors for part in (segmentor.backbone, *segmentor.heads)]
    if module.initial_encoder is not None:
        parts.append(module.initial_encoder.backbone)
    for part in parts:
        part.compile(dynamic=False, options={"fallback_random": True})


def open_readers(config: RunConfig, supervised_on: str) -> Readers:
    """Open the shard sets of a run, each checked.

    Raises:
        UserError: ConfigError or DataError with what is wrong about each of the three.
    """
    data = config.data
    labelled = data.source if supervised_on == "source" else data.target
    opened: dict[str, ShardReader | ShardStream] = {}
    errors = []
    for name in dict.fromkeys((labelled, data.target, data.validation)):
        try:
            opened[name] = open_shards(data, name)
        except UserError as error:
            errors.append(error)
    if errors:
        raise _joined(errors)
    validation = opened[data.validation]
    assert isinstance(validation, ShardReader)  # the configuration was checked
    return Readers(opened[labelled], opened[data.target], validation)


def train_pipeline(
    config: RunConfig, readers: Readers, rank: int, world_size: int, *, first_block: int
) -> TrainPipeline:
    """Build the pipeline of this rank's blocks of the run, from the step that begins with ``first_block``."""
    return TrainPipeline(
        source=readers.labelled,
        target=readers.target,
        seed=config.seed,
        data=config.data,
        micro_batch=config.train.micro_batch,
        rank=rank,
        world_size=world_size,
        blocks_per_step=config.blocks_per_step,
        first_block=first_block,
    )


def render_scenes(config: RunConfig) -> None:
    """Render the embedded data set, or what is missing of it, where the configuration asks for that."""
    if config.data.render_scenes:
        scenes = config.scenes
        write_scenes(
            config.data.root, train=scenes.train, val=scenes.val, size=scenes.size, seed=scenes.seed, report=print
        )


def open_shards(data: DataSection, name: str) -> ShardReader | ShardStream:
    """Open one shard set of a run: a stream where it is a URL; staged to the node's disk where that is asked for.

    Raises:
        UserError: ConfigError, DataError or StorageError with what is wrong.
    """
    if is_stream(name):
        return ShardStream(name, samples=data.stream_samples, num_classes=len(CLASS_NAMES), decoder=data.decoder)
    scratch = Scratch(data.scratch, partial(print, flush=True), limit_gib=data.scratch_gib) if data.scratch else None
    reader = ShardReader(
        data.root / name,
        decoder=data.decoder,
        bad_limit=data.bad_sample_limit,
        open_shard=scratch.open if scratch else open_tar,
    )
    if scratch and not data.lanes:
        scratch.stage(data.root / name)
    return reader


def _joined(errors: list[UserError]) -> UserError:
    """Join several errors into one, of the kind of the first."""
    if isinstance(errors[0], ConfigError):
        return ConfigError([text for error in errors for text in getattr(error, "problems", [str(error)])])
    return type(errors[0])("\n".join(str(error) for error in errors))
