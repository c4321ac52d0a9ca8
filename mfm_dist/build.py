"""From a configuration to the objects of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch

from mfm_dist.classes import ClassSet
from mfm_dist.config.class_files import DEFAULT, load_class_set
from mfm_dist.config.schema import DataSection, ModelSection, RunConfig, Sets, is_stream, names_of
from mfm_dist.data.concatenated import ConcatenatedReader
from mfm_dist.data.pipeline import TrainingSet, TrainPipeline
from mfm_dist.data.reader import ShardReader, open_tar
from mfm_dist.data.staging import Scratch
from mfm_dist.data.streaming import ShardStream
from mfm_dist.errors import ConfigError, UserError, first_line, joined
from mfm_dist.methods import build_method
from mfm_dist.methods.mfm import PATCH
from mfm_dist.models.activation_checkpointing import checkpoint_blocks, find_blocks, find_parts, recompute
from mfm_dist.models.compiling import compile_blocks
from mfm_dist.models.hrda import SCALE, build_segmentor
from mfm_dist.models.lora import add_lora
from mfm_dist.models.rebuilder import Rebuilder
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.models.size_limit import limited_size
from mfm_dist.rng import Stream, keyed_seed
from mfm_dist.shards.scene_shards import SCENE_SETS, write_scenes
from mfm_dist.train_module import TrainModule, why_not_once


@dataclass(frozen=True)
class Readers:
    """The data sets of a run, and the classes that all of them are labelled with."""

    labelled: TrainingSet
    """What the student is supervised on."""
    target: TrainingSet
    target_labelled: ShardReader | None
    """None where no labelled target images are trained on beside it."""
    validation: ShardReader | None
    """None where the target has no labels."""
    source_validation: ShardReader | None
    classes: ClassSet
    notes: tuple[str, ...] = ()
    """What becomes of classes that are not those of the run, a line for each data set, for people."""

    @property
    def samples(self) -> int:
        """Number of all that may be read."""
        sets = (self.labelled, self.target, self.target_labelled, self.validation, self.source_validation)
        return sum(len(reader) for reader in sets if reader is not None)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the shards that the run trains on and what becomes of their labels; what it is scored on may change."""
        found = {"labelled": self.labelled.fingerprint, "target": self.target.fingerprint}
        if not isinstance(self.labelled, ShardStream) and (relabelling := self.labelled.relabelling_fingerprint):
            found["relabelling"] = relabelling
        if few := self.target_labelled:
            found["target_labelled"] = few.fingerprint + few.relabelling_fingerprint
        return found

    @property
    def first_target(self) -> ShardReader:
        """The target's set, the first named of several, which evaluation looks at where there are no labels."""
        assert not isinstance(self.target, ShardStream), "validate refuses a stream"
        return self.target.readers[0] if isinstance(self.target, ConcatenatedReader) else self.target


def build_student(config: RunConfig, classes: ClassSet) -> Segmentor:
    """Build the segmentor of these classes with its initial weights; of HRDA, where that is the method.

    Raises:
        ConfigError: an unknown name, a wrong option, weights that cannot be used, or parts that do not fit.
    """
    model = config.model
    student = build_segmentor(
        backbone=model.backbone,
        decoder=model.decoder,
        num_classes=len(classes),
        pretrained=model.pretrained,
        weights=model.weights,
        backbone_options=model.backbone_options,
        decoder_options=model.decoder_options,
        attention=config.hrda.attention if config.two_resolutions else None,
        attention_options=config.hrda.attention_options,
        window=config.data.crop,
    )
    if problems := _encoder_problems(config, student):
        raise ConfigError(problems)
    fix_encoder(student, model)
    return student


def _encoder_problems(config: RunConfig, student: Segmentor) -> list[str]:
    """List what this encoder cannot do of what is asked."""
    problems, (rows, columns) = [], config.data.crop
    patch = student.backbone.multiple * (SCALE if config.two_resolutions else 1)
    if rows % patch or columns % patch:
        problems.append(
            f"data.crop={rows}x{columns}: {config.model.backbone} takes whole patches, so both sides must be multiples "
            f"of {patch}, as {-(-rows // patch) * patch}x{-(-columns // patch) * patch} is; or resample patches of 14 "
            "by model.backbone_options={patch_size: 16, ...}"
        )
    if config.optim.layer_decay < 1 and not find_blocks(student.backbone.net):
        problems.append(f"optim.layer_decay: {config.model.backbone} has no blocks that can be told apart; set it to 1")
    return problems


def fix_encoder(student: Segmentor, model: ModelSection) -> None:
    """Freeze the encoder and give it additions to train, where that is asked for."""
    if model.freeze:
        student.backbone.freeze()
    if model.lora.rank:
        lora = model.lora
        add_lora(student.backbone.net, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)


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
            qk_norm=settings.qk_norm,
            peri_norm=settings.peri_norm,
            depth_scaling=settings.depth_scaling,
            readout=settings.readout,
        )


def build_train_module(config: RunConfig, classes: ClassSet) -> TrainModule:
    """Build student, teacher and Rebuilder; the initial weights depend on ``config.seed`` and the number of classes.

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
        student = build_student(config, classes)
        if config.train.compile:
            compile_blocks([*(find_parts(student.backbone.net) or [student.backbone.net]), *student.heads])
        if config.memory.checkpoint_backbone:
            checkpoint_blocks(student.backbone)
    except ConfigError as error:
        problems += error.problems
    if student is not None and config.mfm.enabled and config.mfm.use_rebuilder:
        # A seed of its own: with or without MFM, a student starts from the same weights.
        torch.manual_seed(keyed_seed(config.seed, Stream.INITIAL_WEIGHTS, 1))
        rebuilder = build_rebuilder(config, student)
        if config.train.compile:
            compile_blocks([*rebuilder.blocks, *rebuilder.readout])
        if config.memory.checkpoint_rebuilder:
            recompute([*rebuilder.blocks, *rebuilder.readout])
    if method is not None and method.needs_initial_encoder and not classes.things:
        problems.append(
            f"method.name={config.method_label} keeps things near their ImageNet features, and no class is a thing: "
            "say which are (things: [...]) in a class file, and name it in data.classes"
        )
    reason = None if student is None else why_not_once(config, student.backbone)
    if reason and config.train.encode_once == "always":
        problems.append(f"train.encode_once=always: {reason}; auto encodes once where that changes nothing")
    if problems or method is None or student is None:
        raise ConfigError(problems)
    return TrainModule(student=student, rebuilder=rebuilder, method=method, config=config, classes=classes)


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
            rows, columns = module.rebuilder.grid
            mask = (torch.arange(rows * columns) % 2 == 0).view(rows, columns).expand(len(image), -1, -1)
            inputs = [features[index] for index in module.student.decoder_inputs]
            module.rebuilder(features[-1], inputs, mask)
    except Exception as error:  # whatever a layer of timm or torch says of a shape
        raise ConfigError(
            f"the networks cannot take crops of data.crop={crop[0]}x{crop[1]} ({type(error).__name__}: "
            f"{first_line(error)[:300]}): change it, or model.backbone_options or model.decoder_options"
        ) from error


def open_readers(config: RunConfig) -> Readers:
    """Open the shard sets of a run, each checked, and find the classes that they share.

    Raises:
        UserError: ConfigError or DataError with what is wrong about each of them.
    """
    data, named = config.data, sets_of(config)
    classes = None if data.classes is None else load_class_set(data.classes)
    folders = open_folders(config, named)
    classes = classes or shared_classes({name: reader.classes for name, reader in folders.items()})
    check_groups(config, classes)
    urls = [name for names in named.values() for name in names if is_stream(name)]
    streams = {url: open_stream(data, url, classes) for url in urls}
    notes = _relabelled(folders)
    notes += [f"{name}: its labels, if any are read, are taken for the run's classes ({classes})" for name in streams]
    notes += _shares(config, {name: len(reader) for name, reader in folders.items()})
    labelled, target = (
        streams[names_of(sets)[0]] if is_stream(names_of(sets)[0]) else reader_of(sets, folders)
        for sets in (data.source if "source" in named else data.target, data.target)
    )
    return Readers(
        labelled=labelled,
        target=target,
        target_labelled=None if data.target_labelled is None else folders[data.target_labelled],
        validation=None if data.validation is None else folders[data.validation],
        source_validation=None if data.source_validation is None else folders[data.source_validation],
        classes=classes,
        notes=tuple(notes),
    )


def reader_of(sets: Sets, folders: Mapping[str, ShardReader]) -> ShardReader | ConcatenatedReader:
    """Return the reader of these sets, out of readers by name."""
    if isinstance(sets, str):
        return folders[sets]
    shares = list(sets.values()) if isinstance(sets, dict) else None
    return ConcatenatedReader([folders[name] for name in sets], shares)


def sets_of(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Return the names of a run's shard sets by key of ``data``, first those that the student is supervised on."""
    keys = ("target", "target_labelled", "validation", "source_validation")
    source = ("source",) if _supervised_on(config) == "source" else ()
    return {key: names for key in (*source, *keys) if (names := names_of(getattr(config.data, key)))}


def _shares(config: RunConfig, counts: Mapping[str, int]) -> list[str]:
    """Say how much of each of several sets is drawn.

    Args:
        counts: samples by name of a set.
    """
    said = []
    for key, names in sets_of(config).items():
        if len(names) > 1 and all(name in counts for name in names):
            sets = getattr(config.data, key)
            shares = sets if isinstance(sets, dict) else {name: counts[name] for name in names}
            parts = [f"{name} {100 * shares[name] / sum(shares.values()):.1f} % ({counts[name]:,})" for name in names]
            said.append(f"data.{key}: {', '.join(parts)}")
    return said


def _supervised_on(config: RunConfig) -> str:
    """Return the domain whose labels train the student."""
    try:
        return build_method(config).supervised_on
    except ConfigError:
        return "source"  # ``build_train_module`` comes next, and says this with all that is wrong about the networks


def open_folders(config: RunConfig, sets: Mapping[str, Sequence[str]]) -> dict[str, ShardReader]:
    """Open the folders of shards among these sets, by key of ``data``; return them by name.

    Raises:
        UserError: ConfigError, DataError or StorageError with what is wrong about each; it has no labels, and needs
            some.
    """
    data, labelled = config.data, next(iter(sets_of(config)))
    classes = None if data.classes is None else load_class_set(data.classes)
    folders: dict[str, ShardReader] = {}
    errors: list[UserError] = []
    for name in dict.fromkeys(name for names in sets.values() for name in names if not is_stream(name)):
        try:
            folders[name] = open_folder(data, name, classes)
        except UserError as error:
            errors.append(error)
    for key, name in [(key, name) for key, names in sets.items() for name in names]:
        needs_labels = key != "target" or key == labelled
        if needs_labels and name in folders and not folders[name].index.manifest.has_labels:
            errors.append(ConfigError(_without_labels(config, key, name, trains=key == labelled)))
    if errors:
        raise joined(errors)
    return folders


def _without_labels(config: RunConfig, key: str, name: str, *, trains: bool) -> str:
    """Say what to do about a shard set that should have labels."""
    pack = "pack it again with its labels (mfm-shards make folder --labels FOLDER --classes NAME|FILE)"
    said = f"data.{key}={config.data.root / name} has no labels (its dataset.json counts no pixel of a class)"
    if key == "target_labelled":
        return f"{said} to train on: set data.target_labelled=null, or {pack}"
    if trains:
        return f"{said}, and method.name={config.method.name} is supervised on them: name a labelled set, or {pack}"
    return f"{said} to score against: set data.{key}=null, which trains without that score, or {pack}"


def rendered_sets(config: RunConfig) -> list[str]:
    """Return the names of a run's shard sets that it renders itself."""
    return [name for name in SCENE_SETS if config.data.render_scenes and name in {*chain(*sets_of(config).values())}]


def check_data(config: RunConfig) -> tuple[ClassSet, tuple[str, ...]]:
    """Find what is wrong about the data before a run begins, with what it renders itself taken for done.

    Returns:
        the classes to train, and notes as in ``Readers``.

    Raises:
        UserError: as ``open_readers``.
    """
    rendered = rendered_sets(config)
    if not rendered:
        readers = open_readers(config)
        return readers.classes, readers.notes
    named = sets_of(config)
    others = {key: [name for name in names if name not in rendered] for key, names in named.items()}
    folders = open_folders(config, others)
    counts = {name: getattr(config.scenes, name.rsplit("_")[-1]) for name in rendered}
    scenes = classes_without_data(config)
    classes = shared_classes({rendered[0]: scenes, **{name: reader.classes for name, reader in folders.items()}})
    check_groups(config, classes)
    counts |= {name: len(reader) for name, reader in folders.items()}
    return classes, (*_relabelled(folders), *_shares(config, counts))


def check_groups(config: RunConfig, classes: ClassSet) -> None:
    """Raise ConfigError where ``eval.class_sets`` names what is no group of the run's classes."""
    if unknown := [name for name in config.eval.class_sets if name not in classes.groups]:
        known = ", ".join(classes.groups) or "none"
        raise ConfigError(f"eval.class_sets names {', '.join(unknown)}; groups of the run's classes: {known}")


def shared_classes(sets: Mapping[str, ClassSet | None]) -> ClassSet:
    """Return the one class set of all data sets that have labels; None stands for those that have none.

    Raises:
        ConfigError: they differ, or none has labels.
    """
    known = {name: classes for name, classes in sets.items() if classes is not None}
    if not known:
        raise ConfigError(f"{', '.join(sets)}: no labels, so there are no classes to train: name them in data.classes")
    first, shared = next(iter(known.items()))
    problems = [
        f"{first} and {name} do not agree, {difference}\n    Name in data.classes the classes to train on, into which "
        "all are mapped by name, or pack one of them again with --classes"
        for name, classes in known.items()
        if (difference := shared.difference(classes))
    ]
    if problems:
        raise ConfigError(problems)
    return shared


def _relabelled(folders: Mapping[str, ShardReader]) -> list[str]:
    """Say what becomes of the classes of data sets, where they do not stay what they are; alike ones together."""
    names: dict[str, list[str]] = {}
    for name, reader in folders.items():
        if reader.relabelling is not None:
            ignored, absent = (", ".join(some) for some in (reader.relabelling.ignored, reader.relabelling.absent))
            lines = [f"labels of {reader.index.manifest.classes}", f"  become {reader.classes}"]
            lines += [f"  ignored, as none of these: {ignored}"] if ignored else []
            lines += [f"  never labelled: {absent}"] if absent else []
            names.setdefault("\n".join(lines), []).append(name)
    return [f"{', '.join(alike)}: {text}" for text, alike in names.items()]


def classes_without_data(config: RunConfig) -> ClassSet:
    """Return the classes of networks that are built where no data is read. Raises ConfigError."""
    return load_class_set(config.data.classes or DEFAULT)


def train_pipeline(
    config: RunConfig, readers: Readers, rank: int, world_size: int, *, first_block: int
) -> TrainPipeline:
    """Build the pipeline of this rank's blocks of the run, from the step that begins with ``first_block``."""
    return TrainPipeline(
        source=readers.labelled,
        target=readers.target,
        target_labelled=readers.target_labelled,
        seed=config.seed,
        data=config.data,
        micro_batch=config.train.micro_batch,
        rank=rank,
        world_size=world_size,
        blocks_per_step=config.blocks_per_step,
        first_block=first_block,
    )


def render_scenes(config: RunConfig) -> None:
    """Render what the run names of the embedded data set, or what is missing of it, where it asks for that."""
    if rendered := rendered_sets(config):
        scenes = config.scenes
        write_scenes(
            config.data.root,
            train=scenes.train,
            val=scenes.val,
            size=scenes.size,
            seed=scenes.seed,
            gap=scenes.gap,
            report=print,
            only=rendered,
        )


def open_folder(data: DataSection, name: str, classes: ClassSet | None) -> ShardReader:
    """Open one folder of shards of a run, staged to the node's disk where that is asked for.

    Args:
        classes: that its labels are mapped into; None: its own.

    Raises:
        UserError: ConfigError, DataError or StorageError with what is wrong.
    """
    scratch = Scratch(data.scratch, partial(print, flush=True), limit_gib=data.scratch_gib) if data.scratch else None
    reader = ShardReader(
        data.root / name,
        classes=classes,
        decoder=data.decoder,
        bad_limit=data.bad_sample_limit,
        open_shard=scratch.open if scratch else open_tar,
    )
    if scratch and not data.lanes:
        scratch.stage(data.root / name)
    return reader


def open_stream(data: DataSection, url: str, classes: ClassSet) -> ShardStream:
    """Open shards behind a URL, whose labels are in these classes. Raises ConfigError."""
    return ShardStream(url, samples=data.stream_samples, num_classes=len(classes), decoder=data.decoder)
