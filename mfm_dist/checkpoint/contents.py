"""What a run puts into a checkpoint, and how it comes back out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mfm_dist.checkpoint.files import Checkpoint, Snapshot, file_of, naming
from mfm_dist.checkpoint.host_memory import HostMemory
from mfm_dist.checkpoint.pieces import Piece, PieceReader, Place, TensorSpec, as_bytes, check_cover
from mfm_dist.distributed.deepspeed_engine import parameter_shape
from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import ConfigError
from mfm_dist.models.loaded_weights import not_finite, wrong_types
from mfm_dist.train_module import TrainModule

PARTS = ("student", "teacher", "rebuilder", "optimizer")
"""What the tensors of a checkpoint may be of; what a run does not train with is not there."""
OPTIMIZER_STATES = {"adamw": {"exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}
"""What ``optim.name`` keeps of each parameter, in fp32."""
BUCKET_BYTES = 32 << 20
"""Bytes that the ranks put together at a time when they load, unless a single tensor has more. Held twice meanwhile."""


def collect(module: TrainModule, engine: Engine, memory: HostMemory | None) -> Snapshot:
    """Return what this rank has to write: its own pieces, or of what all ranks hold an even share. Collective.

    Args:
        memory: where to put copies, so that training may go on while they are written; None for the tensors themselves.
    """
    specs: dict[str, TensorSpec] = {}
    held: list[Piece] = []

    def add(name: str, shape: torch.Size, pieces: list[tuple[slice, Tensor]]) -> None:
        specs[name] = TensorSpec(torch.float32, shape)
        held.extend(Piece(name, place.start, values.detach()) for place, values in pieces)

    for part, source in parts(module).items():
        for name, parameter in source.named_parameters():
            add(f"{part}/{name}", parameter_shape(parameter), engine.parameter_pieces(parameter))
        for name, parameter in source.named_parameters():
            if parameter.requires_grad:
                for key, pieces in engine.optimizer_pieces(parameter).items():
                    add(f"optimizer/{part}.{name}/{key}", parameter_shape(parameter), pieces)
    buffers = {f"student/{name}": buffer.detach() for name, buffer in module.student.named_buffers()}
    specs |= {name: TensorSpec(buffer.dtype, buffer.shape) for name, buffer in buffers.items()}
    if buffers:
        flat = torch.cat([buffer.double().flatten() for buffer in buffers.values()])
        means = engine.mean_on_main(flat).split([buffer.numel() for buffer in buffers.values()])
        if engine.is_main:
            held += [Piece(name, 0, mean) for name, mean in zip(buffers, means, strict=True)]
    count = len(held)
    held += [Piece(name, 0, buffer.flatten()) for name, buffer in buffers.items()]
    wanted = [(piece.values, specs[piece.name].dtype) for piece in held]
    values = memory.copies(wanted) if memory else [tensor.to(dtype) for tensor, dtype in wanted]
    written = [piece._replace(values=own) for piece, own in zip(held, values, strict=True)]
    return Snapshot(tensors=specs, pieces=written[:count], buffers=written[count:])


def parts(module: TrainModule) -> dict[str, nn.Module]:
    """Return the modules that a checkpoint holds, by the name that they have there."""
    held: dict[str, nn.Module] = {"student": module.student}
    if module.teacher is not None:
        held["teacher"] = module.teacher.segmentor
    if module.rebuilder is not None:
        held["rebuilder"] = module.rebuilder
    return held


def load_state(checkpoint: Checkpoint, module: TrainModule, engine: Engine) -> int:
    """Put everything back, after the engine wrapped the module, and return the bytes that this rank read. Collective.

    The ranks read the checkpoint once between them, an even share each, and pass on what they read; what a run on
    1,024 ranks reads is what one rank would.

    Each rank gets its own BatchNorm statistics back if there are as many ranks as wrote the checkpoint. Otherwise all
    go on from the mean, which is what evaluation scores: no score changes with the number of processes.

    Raises:
        ConfigError: if the checkpoint is of another network; nothing is changed then. Or if its numbers are not what a
            run writes.
        DamagedCheckpointError: on every rank, if a file is not as it was written. A part may be in place by then.
    """
    put = _targets(checkpoint, module, engine)
    reader = checkpoint.reader()
    for name, whole in _whole_tensors(checkpoint, reader, engine):
        if name not in put:  # of a part that this run trains without
            continue
        negative = [f"{name} holds numbers below 0"] if name.endswith("_sq") and (whole < 0).any() else []
        _refuse(checkpoint.path, [*not_finite({name: whole}), *negative])
        put[name](whole)
    if checkpoint.world_size == engine.world_size:
        own = engine.run_collectively(partial(_statistics, checkpoint, module.student, engine.rank))
        for name, buffer in module.student.named_buffers():
            buffer.copy_(own[name])
        reader.bytes_read += checkpoint.files[file_of("buffers", engine.rank)].size
    return reader.bytes_read


def _statistics(checkpoint: Checkpoint, student: nn.Module, rank: int) -> dict[str, Tensor]:
    """Read the BatchNorm statistics that a rank wrote. Raises ConfigError: some are not there, or not finite."""
    own = checkpoint.buffers(rank)
    missing = dict(student.named_buffers()).keys() - own.keys()
    _refuse(checkpoint.path, [*(f"rank {rank} wrote no {name}" for name in missing), *not_finite(own)])
    return own


def _targets(checkpoint: Checkpoint, module: TrainModule, engine: Engine) -> dict[str, Callable[[Tensor], object]]:
    """Say where each tensor goes, once all are known to fit, and make room for the optimiser's."""
    setters: dict[str, Callable[[Tensor], object]] = {}
    for part, held in parts(module).items():
        whole = part == "student"  # the teacher's buffers are not kept
        _refuse_misfit(checkpoint.path, held, checkpoint.part(part), buffers_needed=whole)
        for name, parameter in held.named_parameters():
            setters[f"{part}/{name}"] = partial(engine.set_parameter, parameter)
    setters |= {f"student/{name}": buffer.copy_ for name, buffer in module.student.named_buffers()}
    states = _optimizer_states(checkpoint, module, engine)
    keys = OPTIMIZER_STATES[engine.config.optim.name]
    applied = checkpoint.progress.applied
    engine.reset_optimizer(keys, applied)
    for name, (parameter, key) in states.items():
        setters[name] = partial(engine.set_optimizer_state, parameter, key, applied=applied)
    return setters


def _optimizer_states(
    checkpoint: Checkpoint, module: TrainModule, engine: Engine
) -> dict[str, tuple[nn.Parameter, str]]:
    """Say of each tensor of the optimiser whose it is, and which.

    Raises:
        ConfigError: if they are of other parameters.
    """
    stored = checkpoint.part("optimizer")
    states: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in stored.items():
        owner, _, key = name.rpartition("/")
        states.setdefault(owner, {})[key] = spec
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    shapes = {name: parameter_shape(parameter) for name, parameter in parameters.items()}
    # A parameter without state is one that no gradient has reached yet; it gets its state when one does.
    keys = OPTIMIZER_STATES[engine.config.optim.name]
    wrong = {
        name
        for name, state in states.items()
        if state.keys() != keys or any(spec.shape != shapes.get(name) for spec in state.values())
    }
    if wrong or (checkpoint.progress.applied and not states):
        example = f"{len(wrong)} parameters differ, e.g. {min(wrong)}" if wrong else "it is not there"
        raise ConfigError(
            f"the optimiser's state in {checkpoint.path} is of another network ({example}): restore the settings it "
            "was trained with, or choose another run.folder"
        )
    _refuse(checkpoint.path, [f"{n} is {spec.dtype}" for n, spec in stored.items() if spec.dtype != torch.float32])
    return {f"optimizer/{name}/{key}": (parameters[name], key) for name in states for key in states[name]}


def _whole_tensors(checkpoint: Checkpoint, reader: PieceReader, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint whole, on every rank, in order. Collective.

    They share the memory of a bucket: copy what is to be kept.
    """

    share = engine.run_collectively(lambda: checkpoint.share(reader, engine.rank, engine.world_size))
    held = torch.tensor([sum(place.length for _, place in share.get(name, [])) for name in checkpoint.specs])
    with naming(checkpoint.path):
        check_cover(checkpoint.specs, engine.sum(held.to(engine.device)).tolist())
    for bucket in _buckets(checkpoint.specs):
        flat = torch.zeros(sum(_words(checkpoint.specs[name]) for name in bucket), 2, dtype=torch.int32)
        engine.run_collectively(partial(_fill, flat, bucket, share, checkpoint, reader))
        # Added as integers: to zeros that gives any bits as they are, also those of -0.0 and of a NaN.
        parts = engine.sum(flat.to(engine.device)).split([_words(checkpoint.specs[name]) for name in bucket])
        for name, words in zip(bucket, parts, strict=True):
            spec = checkpoint.specs[name]
            yield name, words.view(-1).view(torch.uint8)[: spec.nbytes].view(spec.dtype).view(spec.shape)


def _fill(
    flat: Tensor,
    bucket: Iterable[str],
    share: Mapping[str, Iterable[tuple[str, Place]]],
    checkpoint: Checkpoint,
    reader: PieceReader,
) -> None:
    """Read this rank's share of the tensors of a bucket, which follow one another in ``flat``, into it."""
    memory, start = as_bytes(flat), 0
    with naming(checkpoint.path):
        for name in bucket:
            for file, place in share.get(name, ()):
                first = start + place.offset
                reader.read(file, place.start, memory[first : first + place.length])
            start += 8 * _words(checkpoint.specs[name])


def _words(spec: TensorSpec) -> int:
    """Return in how many words of 8 bytes a tensor fits, so that the next one begins where any type may."""
    return -(-spec.nbytes // 8)


def _buckets(specs: Mapping[str, TensorSpec]) -> Iterator[list[str]]:
    """Put names of tensors together, in order, up to ``BUCKET_BYTES``."""
    bucket: list[str] = []
    size = 0
    for name, spec in specs.items():
        if bucket and size + spec.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size += spec.nbytes
    if bucket:
        yield bucket


def load_modules(checkpoint: Checkpoint, module: TrainModule) -> None:
    """Put parameters, and BatchNorm statistics averaged over ranks, into a module that no engine wrapped.

    Raises:
        ConfigError: if the checkpoint is of another network.
    """
    for part, held in parts(module).items():
        whole = part == "student"  # the teacher's buffers are not kept
        _load_part(checkpoint.path, held, checkpoint.tensors(part), buffers_needed=whole)


def load_student(checkpoint: Checkpoint, student: nn.Module) -> None:
    """Put the trained segmentor's weights into a plain one: parameters, and BatchNorm statistics averaged over ranks.

    Raises:
        ConfigError: if the checkpoint is of another network.
    """
    _load_part(checkpoint.path, student, checkpoint.tensors("student"))


def load_teacher(checkpoint: Checkpoint, student: nn.Module) -> None:
    """Put the EMA teacher's weights into a plain segmentor instead.

    The teacher normalises with batch statistics and has no running ones, so BatchNorm gets the student's.

    Raises:
        ConfigError: if the run had no teacher, or the checkpoint is of another network.
    """
    teacher = checkpoint.tensors("teacher")
    if not teacher:
        raise ConfigError(f"{checkpoint.path} has no teacher, the method trains without one: take the student")
    _load_part(checkpoint.path, student, {**checkpoint.tensors("student"), **teacher})


def _load_part(path: Path, part: nn.Module, tensors: Mapping[str, Tensor], *, buffers_needed: bool = True) -> None:
    """Put parameters, which must all be there and finite, and buffers back, once all are known to fit."""
    parameters, buffers = dict(part.named_parameters()), dict(part.named_buffers())
    _refuse_misfit(path, part, tensors, buffers_needed=buffers_needed)
    _refuse(path, [*not_finite(tensors)])
    with torch.no_grad():
        for name, tensor in {**parameters, **buffers}.items():
            if name in tensors:
                tensor.copy_(tensors[name])


def _refuse_misfit(
    path: Path, part: nn.Module, stored: Mapping[str, Tensor | TensorSpec], *, buffers_needed: bool
) -> None:
    """Raise ConfigError unless what is stored has the names, shapes and types of a module's own."""
    parameters, buffers = dict(part.named_parameters()), dict(part.named_buffers())
    shapes = {name: parameter_shape(p) for name, p in parameters.items()}
    shapes |= {name: buffer.shape for name, buffer in buffers.items()}
    wrong = (parameters.keys() | (buffers.keys() if buffers_needed else set())) - stored.keys()
    wrong |= {name for name, tensor in stored.items() if tensor.shape != shapes.get(name)}
    if wrong:
        raise ConfigError(
            f"{path} is of another network ({len(wrong)} tensors differ, e.g. {min(wrong)}): restore the "
            "model and rebuilder settings it was trained with, or choose another run.folder"
        )
    own = {name: tensor.dtype for name, tensor in {**parameters, **buffers}.items()}
    _refuse(path, [*wrong_types({name: tensor.dtype for name, tensor in stored.items()}, own)])


def _refuse(path: Path, problems: list[str]) -> None:
    """Raise ConfigError for tensors that no run writes, under checksums that are right."""
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConfigError(
            f"{path} is not what a run wrote ({min(problems)}{more}): put a copy back, or move it away to go on from "
            "the checkpoint before"
        )
