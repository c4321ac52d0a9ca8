"""Checkpoints that appear whole or not at all, say what they hold, and are verified before they are used.

Layout of ``checkpoints/step_XXXXXXXX/``, all tensors whole and by parameter name, so that neither the world size nor
the ZeRO stage of the writer matters to the reader:

    student.safetensors     parameters, and BatchNorm statistics averaged over ranks: the trained segmenter
    teacher.safetensors     parameters of the EMA teacher
    rebuilder.safetensors   parameters of the Rebuilder
    optimizer.safetensors   "<parameter>/<key>", e.g. ".../exp_avg"
    buffers.safetensors     "<rank>/<buffer>": each rank's own BatchNorm statistics
    state.json              progress, versions, configuration
    manifest.json           size and SHA-256 of every other file; written last

``checkpoints/latest`` names the newest. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mfm_dist.config.loader import to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import ConfigError, StorageError
from mfm_dist.metrics import write_atomically
from mfm_dist.train_module import TrainModule

FORMAT = 1


@dataclass(kw_only=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Global batches consumed, whether their update was applied or skipped."""
    applied: int = 0
    """Updates applied; also the number of teacher updates."""
    block: int = 0
    """Next block of the data streams: their whole state."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint on disk."""

    path: Path
    progress: Progress
    config: dict[str, Any]
    """The configuration it was written under, as nested plain values."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of one file, e.g. ``student``; empty if the run had no such part."""
        path = self.path / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}


def save_checkpoint(folder: Path, module: TrainModule, engine: Engine, progress: Progress, config: RunConfig) -> Path:
    """Write ``folder/step_XXXXXXXX`` and point ``folder/latest`` at it. Collective; rank 0 writes.

    Raises:
        StorageError: on every rank, if the disk is full or not writable. Nothing half is left under a final name.
    """
    files = collect(module, engine)
    final = folder / f"step_{progress.step:08d}"
    problem = None
    if engine.is_main:
        state = {"format": FORMAT, "progress": asdict(progress), "config": to_tree(config), "torch": torch.__version__}
        try:
            _write(final, files, state)
            write_atomically(folder / "latest", final.name + "\n")
            _remove_old(final, config.checkpoint.keep)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(_temporary(final), ignore_errors=True)
            problem = (
                f"{final} could not be written: {error}. Earlier checkpoints are intact; free some space "
                f"({shutil.disk_usage(folder).free / 2**30:.2f} GiB are free) and start the same command again"
            )
    problem = engine.gather_objects(problem)[0]
    if problem:
        raise StorageError(problem)
    return final


def collect(module: TrainModule, engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Everything a checkpoint holds, by file and tensor name, on the CPU of rank 0. Collective."""

    def keep(tensor: Tensor) -> Tensor:
        """A copy where it is written; elsewhere nothing, as soon as possible."""
        return tensor.detach().cpu().contiguous() if engine.is_main else torch.empty(0)

    files: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}, "rebuilder": {}, "optimizer": {}}
    for part, prefix in parts(module).items():
        for name, parameter in part.named_parameters():
            file, _, _ = prefix.partition(".")
            files[file][name] = keep(engine.full_parameter(parameter))
            if parameter.requires_grad:
                for key, value in engine.optimizer_state(parameter).items():
                    files["optimizer"][f"{prefix}.{name}/{key}"] = keep(value)
    for name, buffer in module.student.named_buffers():
        mean = engine.mean(buffer.double()).to(buffer.dtype)
        files["student"][name] = keep(mean)
    own = {name: buffer.cpu() for name, buffer in module.student.named_buffers()}
    files["buffers"] = {
        f"{rank}/{name}": value
        for rank, buffers in enumerate(engine.gather_objects(own))
        for name, value in buffers.items()
    }
    return {file: tensors for file, tensors in files.items() if tensors} if engine.is_main else {}


def parts(module: TrainModule) -> dict[nn.Module, str]:
    """The modules a checkpoint holds, with the prefix of their parameters' names in ``TrainModule``."""
    named: dict[nn.Module, str] = {module.student: "student"}
    if module.teacher is not None:
        named[module.teacher.segmentor] = "teacher.segmentor"
    if module.rebuilder is not None:
        named[module.rebuilder] = "rebuilder"
    return named


def load_modules(checkpoint: Checkpoint, module: TrainModule, rank: int) -> None:
    """Put parameters and buffers back, before the engine wraps the module.

    A rank that the writer did not have starts from the all-rank mean of the BatchNorm statistics.

    Raises:
        ConfigError: if the checkpoint is of another network.
    """
    buffers = checkpoint.tensors("buffers")
    for part, prefix in parts(module).items():
        tensors = checkpoint.tensors(prefix.partition(".")[0])
        if part is module.student:
            own = {
                name: buffers.get(f"{rank}/{name}", tensors[name])
                for name, _ in part.named_buffers()
                if name in tensors
            }
            tensors = {**tensors, **own}
        _load_part(checkpoint.path, part, tensors)


def load_student(checkpoint: Checkpoint, student: nn.Module) -> None:
    """Put the trained segmenter's weights into a plain one: parameters, and BatchNorm statistics averaged over ranks.

    Raises:
        ConfigError: if the checkpoint is of another network.
    """
    _load_part(checkpoint.path, student, checkpoint.tensors("student"))


def load_optimizer(checkpoint: Checkpoint, module: TrainModule, engine: Engine) -> None:
    """Put the optimiser's state back, after the engine wrapped the module. Collective."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in checkpoint.tensors("optimizer").items():
        parameter, _, key = name.rpartition("/")
        states.setdefault(parameter, {})[key] = value
    parameters = dict(module.named_parameters())
    engine.load_optimizer_state(
        ((parameters[name], states[name]) for name in states if name in parameters), checkpoint.progress.applied
    )


def _load_part(path: Path, part: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = {name: tensor.shape for name, tensor in (*part.named_parameters(), *part.named_buffers())}
    parameters = {name for name, _ in part.named_parameters()}
    wrong = [name for name in parameters if name not in tensors or tensors[name].shape != expected[name]]
    wrong += [name for name in tensors if name not in expected]
    if wrong:
        raise ConfigError(
            f"{path} is of another network ({len(wrong)} tensors differ, e.g. {sorted(wrong)[0]}): restore the "
            "model and rebuilder settings it was trained with, or choose another run.folder"
        )
    part.load_state_dict(dict(tensors), strict=False)


def find_latest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint of ``folder``; a damaged one is reported and the one before it is tried."""
    candidates = sorted((p for p in folder.glob("step_*") if p.is_dir()), reverse=True)
    for path in candidates:
        problem = verify(path)
        if problem is None:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(path, Progress(**state["progress"]), state["config"])
        report(f"{path} is damaged ({problem}); trying the one before it")
    return None


def verify(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file is as it was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, written in manifest["files"].items():
            if Path(name).name != name:
                return f"manifest.json names a file outside the folder: {name}"
            if (path / name).stat().st_size != written["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {written['bytes']}"
            if _sha256(path / name) != written["sha256"]:
                return f"{name} differs from what was written"
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if state.get("format") == FORMAT else f"its format is {state.get('format')}, this code reads {FORMAT}"


def _write(final: Path, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    temporary = _temporary(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(dict(tensors), temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    manifest = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
    (temporary / "manifest.json").write_text(json.dumps({"files": manifest}, indent=1), encoding="utf-8")
    for path in temporary.iterdir():
        _fsync(path)
    _fsync(temporary)
    replaced = final.with_name(f".{final.name}.old")
    if final.exists():  # the same step again: a damaged one, or the run was resumed from an earlier step
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _remove_old(newest: Path, keep: int) -> None:
    """Keep the last ``keep`` checkpoints up to ``newest``; later steps are damaged or of a time line given up."""
    folder = newest.parent
    complete = sorted(path for path in folder.glob("step_*") if path.name <= newest.name)
    for path in set(folder.glob("step_*")) - set(complete[-keep:]):
        shutil.rmtree(path)
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
