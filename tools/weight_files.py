"""Published weights files: reading them without running code, and fitting what they hold to a network of ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mfm_dist.errors import ConfigError

NETWORKS = {"student": "model.", "teacher": "ema_model."}
"""Prefixes of the networks in a checkpoint of DAFormer, HRDA and MIC."""

OTHER_NETWORKS = "imnet_model."
"""The frozen ImageNet encoder of the feature distance."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of a BatchNorm layer."""


@dataclass(frozen=True)
class Source:
    """The network of a published file that is to be converted."""

    tensors: dict[str, Tensor]
    ignored: Counter[str]
    """Tensors left out, counted by the beginning of their names."""
    step: int
    """Training step that the file states, 0 if none."""


def read_source(path: Path, weights: str, ignore: Sequence[str]) -> Source:
    """Read one network of a published file: names as in the file, without the prefix of the network.

    Args:
        path: a safetensors or torch file, or the name of an installed package that carries one.
        weights: ``student`` or ``teacher``, of a checkpoint that holds both.
        ignore: beginnings of names that are to be left out.
    """
    content = _read_file(path)
    meta = content.get("meta")
    step = meta.get("iter", 0) if isinstance(meta, Mapping) else 0
    for wrapper in ("state_dict", "model"):  # where training scripts keep the weights
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{path} holds no state dict (names and tensors)")
    ignored: Counter[str] = Counter()
    tensors = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    tensors = leave_out(tensors, tuple(ignore), ignored)
    prefix = NETWORKS[weights]
    chosen = inside(tensors, prefix)
    if weights == "teacher":
        if not chosen:
            raise ConfigError(f"{path} holds no teacher (names that begin with {prefix}): take --weights student")
        # The teacher's own statistics are those of single batches, left over from training; nothing ever read them.
        student = inside(tensors, NETWORKS["student"])
        chosen |= {name: student[name] for name in chosen if name.endswith(STATISTICS) and name in student}
    if chosen:
        others = tuple(other for other in (*NETWORKS.values(), OTHER_NETWORKS) if other != prefix)
        rest = leave_out(tensors, others, ignored)
        # What belongs to no network stays, and is found to be unexpected.
        tensors = {name: tensor for name, tensor in rest.items() if not name.startswith(prefix)} | chosen
    return Source(tensors, ignored, int(step))


def _read_file(path: Path) -> Mapping[str, Any]:
    """Read a file. Nothing but tensors, plain containers, numbers and texts is ever built from it."""
    path = path if path.exists() else _inside_package(str(path))
    if not path.is_file():
        raise ConfigError(f"there is no file {path}, nor an installed package of that name with a weights file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # of many kinds
        found = _other_objects(path, error)
        reason = f"it holds {', '.join(found)}" if found else str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{path} is no file of tensors ({reason}). A file with other objects is not opened, because that can run "
            "code. Where it was made, keep its tensors alone: torch.save(checkpoint['state_dict'], PATH)"
        ) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content


def _inside_package(name: str) -> Path:
    """Find the weights file of an installed package, which is not imported; the name itself where there is none."""
    try:
        files = metadata.files(name) or []
    except (metadata.PackageNotFoundError, ValueError):  # not installed; no name
        return Path(name)
    found = [Path(str(file.locate())) for file in files if file.suffix in (".pth", ".safetensors")]
    return found[0] if len(found) == 1 else Path(name)


def _other_objects(path: Path, error: Exception) -> list[str]:
    """Return names of functions and classes that a torch file would call; empty where that cannot be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no torch file, or one from before torch 1.6, of which torch.load names the first
        return sorted(set(re.findall(r"\bGLOBAL ([\w.]+)", str(error))))


def fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Pick the tensors that a network of ours expects, all of them and no other.

    Counters of BatchNorm batches, which files from before torch 0.4.1 lack and inference never reads, start at 0.

    Raises:
        ConfigError: with the names that are missing, those that have no place, and those of another shape.
    """
    tensors = dict(tensors)
    for name in expected:
        if name.endswith(".num_batches_tracked"):
            tensors.setdefault(name, torch.zeros((), dtype=torch.int64))
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    kinds = {"missing (our names)": missing, "without a place (see --ignore)": unexpected, "of another shape": shapes}
    problems = [f"{what}: {len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ConfigError(problems)
    return {name: tensors[name] for name in expected}


def _some(names: Sequence[str], most: int = 40) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def leave_out(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...], ignored: Counter[str]) -> dict[str, Tensor]:
    """Return all tensors but those whose names begin so, which are counted in ``ignored``."""
    kept = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            kept[name] = tensor
        else:
            ignored[prefix.rstrip(".")] += 1
    return kept
