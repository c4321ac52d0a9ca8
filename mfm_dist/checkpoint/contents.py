"""What a run puts into a checkpoint, and how it comes back out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mfm_dist.checkpoint.files import Checkpoint
from mfm_dist.distributed.deepspeed_engine import parameter_shape
from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import ConfigError
from mfm_dist.models.loaded_weights import not_finite, wrong_types
from mfm_dist.train_module import TrainModule

PARTS = ("student", "teacher", "rebuilder", "optimizer", "buffers")
"""Files of tensors that a checkpoint may have; what a run does not train with has none."""
OPTIMIZER_STATES = {"adamw": {"exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}
"""What ``optim.name`` keeps of each parameter, in fp32."""


def collect(module: TrainModule, engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Return everything a checkpoint holds, by file and tensor name, copied to the CPU memory of rank 0. Collective.

    Training may go on as soon as this returns: no tensor of it is shared with the module or the optimiser.
    """

    def keep(tensor: Tensor) -> Tensor:
        """Copy a tensor where it is written, also one that is on the CPU already; elsewhere drop it at once."""
        if not engine.is_main:
            return torch.empty(0)
        return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    files: dict[str, dict[str, Tensor]] = {name: {} for name in PARTS}
    for part, prefix in parts(module).items():
        file, _, _ = prefix.partition(".")
        parameters = dict(part.named_parameters())
        for name, whole in zip(parameters, engine.full_parameters(parameters.values()), strict=True):
            files[file][name] = keep(whole)
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        for name, state in zip(trained, engine.optimizer_states(trained.values()), strict=True):
            files["optimizer"] |= {f"{prefix}.{name}/{key}": keep(value) for key, value in state.items()}
    own = {name: buffer.to("cpu", copy=True) for name, buffer in module.student.named_buffers()}
    everyone: list[dict[str, Tensor]] = engine.gather_objects(own)
    for name, buffer in own.items():
        mean = torch.stack([buffers[name].double() for buffers in everyone]).mean(0)
        files["student"][name] = mean.to(buffer.dtype)
        files["buffers"] |= {f"{rank}/{name}": buffers[name] for rank, buffers in enumerate(everyone)}
    return {file: tensors for file, tensors in files.items() if tensors} if engine.is_main else {}


def parts(module: TrainModule) -> dict[nn.Module, str]:
    """Return the modules a checkpoint holds, with the prefix of their parameters' names in ``TrainModule``."""
    named: dict[nn.Module, str] = {module.student: "student"}
    if module.teacher is not None:
        named[module.teacher.segmentor] = "teacher.segmentor"
    if module.rebuilder is not None:
        named[module.rebuilder] = "rebuilder"
    return named


def load_state(checkpoint: Checkpoint, module: TrainModule, engine: Engine) -> None:
    """Put everything back, after the engine wrapped the module. Collective.

    Each rank gets its own BatchNorm statistics back if there are as many ranks as wrote the checkpoint. Otherwise all
    go on from the mean, which is what evaluation scores: no score changes with the number of processes.

    Raises:
        ConfigError: if the checkpoint is of another network.
    """
    same_world = checkpoint.world_size == engine.world_size
    load_modules(checkpoint, module, put=engine.set_parameter, statistics_of=engine.rank if same_world else None)
    load_optimizer(checkpoint, module, engine)


@torch.no_grad()
def set_plain(parameter: nn.Parameter, whole: Tensor) -> None:
    """Set a parameter that no engine cut or copied."""
    parameter.copy_(whole)


def load_modules(
    checkpoint: Checkpoint,
    module: TrainModule,
    *,
    put: Callable[[nn.Parameter, Tensor], None] = set_plain,
    statistics_of: int | None = None,
) -> None:
    """Put parameters and buffers back.

    Args:
        put: sets one parameter; the engine's, once it wrapped the module.
        statistics_of: rank whose own BatchNorm statistics to take; None for the mean over ranks.

    Raises:
        ConfigError: if the checkpoint is of another network.
    """
    buffers = {} if statistics_of is None else checkpoint.tensors("buffers")
    for part, prefix in parts(module).items():
        tensors = checkpoint.tensors(prefix.partition(".")[0])
        if part is module.student:
            prefix = f"{statistics_of}/"
            tensors |= {key.removeprefix(prefix): value for key, value in buffers.items() if key.startswith(prefix)}
        # The teacher's buffers are not kept. Training never looks at running statistics, which one bad batch can spoil.
        whole = part is module.student
        _load_part(checkpoint.path, part, tensors, put, buffers_needed=whole, buffers_finite=False)


def load_student(checkpoint: Checkpoint, student: nn.Module) -> None:
    """Put the trained segmentor's weights into a plain one: parameters, and BatchNorm statistics averaged over ranks.

    Raises:
        ConfigError: if the checkpoint is of another network.
    """
    _load_part(checkpoint.path, student, checkpoint.tensors("student"), set_plain)


def load_teacher(checkpoint: Checkpoint, student: nn.Module) -> None:
    """Put the EMA teacher's weights into a plain segmentor instead.

    The teacher normalises with batch statistics and has no running ones, so BatchNorm gets the student's.

    Raises:
        ConfigError: if the run had no teacher, or the checkpoint is of another network.
    """
    teacher = checkpoint.tensors("teacher")
    if not teacher:
        raise ConfigError(f"{checkpoint.path} has no teacher, the method trains without one: take the student")
    _load_part(checkpoint.path, student, {**checkpoint.tensors("student"), **teacher}, set_plain)


def load_optimizer(checkpoint: Checkpoint, module: TrainModule, engine: Engine) -> None:
    """Put the optimiser's state back, after the engine wrapped the module. Collective.

    Raises:
        ConfigError: if it is of other parameters.
    """
    states: dict[str, dict[str, Tensor]] = {}
    stored = checkpoint.tensors("optimizer")
    for name, value in stored.items():
        parameter, _, key = name.rpartition("/")
        states.setdefault(parameter, {})[key] = value
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    shapes = {name: parameter_shape(parameter) for name, parameter in parameters.items()}
    # A parameter without state is one that no gradient has reached yet; it gets its state when one does.
    keys = OPTIMIZER_STATES[engine.config.optim.name]
    wrong = {
        name
        for name, state in states.items()
        if state.keys() != keys or any(value.shape != shapes.get(name) for value in state.values())
    }
    if wrong or (checkpoint.progress.applied and not states):
        example = f"{len(wrong)} parameters differ, e.g. {min(wrong)}" if wrong else "it is not there"
        raise ConfigError(
            f"the optimiser's state in {checkpoint.path} is of another network ({example}): restore the settings it "
            "was trained with, or choose another run.folder"
        )
    negative = [f"{name} holds numbers below 0" for name in stored if name.endswith("_sq") and (stored[name] < 0).any()]
    types = [f"{name} is {value.dtype}" for name, value in stored.items() if value.dtype != torch.float32]
    _refuse(checkpoint.path, [*types, *not_finite(stored), *negative])
    engine.load_optimizer_state(((parameters[name], states[name]) for name in states), checkpoint.progress.applied)


def _load_part(
    path: Path,
    part: nn.Module,
    tensors: Mapping[str, Tensor],
    put: Callable[[nn.Parameter, Tensor], None],
    *,
    buffers_needed: bool = True,
    buffers_finite: bool = True,
) -> None:
    """Put parameters, which must all be there and finite, and buffers back, once all are known to fit."""
    parameters, buffers = dict(part.named_parameters()), dict(part.named_buffers())
    shapes = {name: parameter_shape(p) for name, p in parameters.items()}
    shapes |= {name: buffer.shape for name, buffer in buffers.items()}
    wrong = (parameters.keys() | (buffers.keys() if buffers_needed else set())) - tensors.keys()
    wrong |= {name for name, tensor in tensors.items() if tensor.shape != shapes.get(name)}
    if wrong:
        raise ConfigError(
            f"{path} is of another network ({len(wrong)} tensors differ, e.g. {min(wrong)}): restore the "
            "model and rebuilder settings it was trained with, or choose another run.folder"
        )
    types = {name: tensor.dtype for name, tensor in {**parameters, **buffers}.items()}
    sound = tensors if buffers_finite else {name: tensors[name] for name in parameters}
    _refuse(path, [*wrong_types(tensors, types), *not_finite(sound)])
    for name, parameter in parameters.items():
        put(parameter, tensors[name])
    for name in buffers.keys() & tensors.keys():
        buffers[name].copy_(tensors[name])


def _refuse(path: Path, problems: list[str]) -> None:
    """Raise ConfigError for tensors that no run writes, under checksums that are right."""
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConfigError(
            f"{path} is not what a run wrote ({min(problems)}{more}): put a copy back, or move it away to go on from "
            "the checkpoint before"
        )
