"""One checkpoint as a folder on disk: written whole, verified, found again, and in time removed."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfm_dist.checkpoint.progress import Progress
from mfm_dist.classes import ClassSet
from mfm_dist.config.class_files import DEFAULT, load_class_set
from mfm_dist.errors import ConfigError, CorruptFileError
from mfm_dist.storage import read_json, require_regular, sha256_of, whole_folder, write_atomically

FORMAT = 2
"""Any format keeps its number in ``state.json``, and bytes and SHA-256 of every file in ``manifest*.json``."""
SET_ASIDE = "set_aside"
"""Folder beside the checkpoints that nothing is looked for in, and nothing removed from."""
JSON_LIMIT = 4 << 20
"""Bytes read of a JSON file at most; ours are some kilobytes."""

_STEP = re.compile(r"step_(\d{8,})")
_REPLACED = re.compile(r"\.step_(\d{8,})\.old")
"""What ``whole_folder`` moves aside before a new folder of the same name takes its place."""
_FILE = re.compile(r"state\.json|[a-z]+\.safetensors")
_NEEDED = frozenset({"state.json", "student.safetensors"})


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint on disk."""

    path: Path
    progress: Progress
    config: dict[str, Any]
    """The configuration it was written under, as nested plain values."""
    data: dict[str, str]
    """Fingerprints of the shard sets it was trained on, by what they served as."""
    classes: ClassSet
    """That its networks tell apart."""
    world_size: int
    """Processes that wrote it."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of one file, e.g. ``student``; empty if the run had no such part."""
        path = self.path / f"{name}.safetensors"
        return load_file(require_regular(path)) if path.exists() else {}


def step_folder(folder: Path, step: int) -> Path:
    """Return the final name of a checkpoint in ``folder``."""
    return folder / f"step_{step:08d}"


def write_checkpoint(
    final: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    *,
    progress: Progress,
    config: Mapping[str, Any],
    data: Mapping[str, str],
    classes: ClassSet,
    world_size: int,
    keep: int,
) -> None:
    """Write the folder ``final``, point ``latest`` beside it at it, then remove all but the last ``keep``.

    Amid steps that are not applied nothing is removed: a run that has to go back needs one from before.

    Raises:
        OSError, SafetensorError: if the disk is full or not writable. Earlier checkpoints are then as they were.
    """
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "config": config,
        "data": data,
        "classes": classes.to_tree(),
        "world_size": world_size,
        "torch": torch.__version__,
    }
    # There is one already if it is damaged, or if the run was resumed from an earlier step.
    with whole_folder(final) as temporary:
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for name, tensors in files.items():
            path = temporary / f"{name}.safetensors"
            save_file(dict(tensors), path)
            shutil.copymode(temporary / "state.json", path)  # safetensors lets the owner alone read, whatever the umask
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps({"files": manifest}, indent=1), encoding="utf-8")
    write_atomically(final.with_name("latest"), final.name + "\n")
    if not progress.skipped:
        _remove_old(final, keep)


def find_latest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Find the newest complete checkpoint of ``folder``, or None; report damaged ones and try those before."""
    return next(_complete(folder, report), None)


def set_aside_later(checkpoint: Checkpoint) -> list[Path]:
    """Move checkpoints later than the one that a run goes on from, which would be in its way; return where they are."""
    folder, moved = checkpoint.path.parent, []
    folders = _folders(folder)
    for path in folders[folders.index(checkpoint.path) + 1 :]:
        names = (f"{path.name.strip('.')}{suffix}" for suffix in chain([""], (f".{n}" for n in count(1))))
        target = next(place for name in names if not (place := folder / SET_ASIDE / name).exists())
        target.parent.mkdir(exist_ok=True)
        moved.append(path.rename(target))
    if moved:
        write_atomically(folder / "latest", checkpoint.path.name + "\n")
    return moved


def find_sound(folder: Path, before: int | None, report: Callable[[str], None]) -> Checkpoint | None:
    """Find where a run can go back to: the newest complete checkpoint not saved amid steps not applied; or None.

    Args:
        before: look for one of an earlier step than this; the earliest there is where none is early enough.
    """
    sound = None
    for sound in _complete(folder, report, wanted=lambda checkpoint: not checkpoint.progress.skipped):
        if before is None or sound.progress.step < before:
            break
    return sound


def _complete(
    folder: Path,
    report: Callable[[str], None],
    wanted: Callable[[Checkpoint], bool] = lambda _: True,
) -> Iterator[Checkpoint]:
    """Read complete checkpoints from the newest to the oldest; report damaged ones."""
    for path in reversed(_folders(folder)):
        try:
            checkpoint = read_checkpoint(path)
        except CorruptFileError as error:
            reason = " ".join(str(error).split())[:300]  # what a damaged file says may be anything
            report(f"{path} is damaged ({reason}); looking for an earlier one")
        else:
            if wanted(checkpoint):
                yield checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint, every byte of it, and read its state.

    Raises:
        CorruptFileError: if a file is not as it was written, or says what no run of ours writes.
        ConfigError: if it is whole and of another format than this code reads.
    """
    try:
        state = _read_state(path)
        manifest = read_json(path / "manifest.json", JSON_LIMIT)["files"]
        if foreign := [name for name in manifest if not _FILE.fullmatch(name)]:
            raise CorruptFileError(f"manifest.json names {foreign[0]!r}, which is no file of a checkpoint")
        present = {entry.name for entry in path.glob("*.safetensors")}
        if unnamed := sorted((present | _NEEDED) - set(manifest)):
            raise CorruptFileError(f"manifest.json does not name {' and '.join(unnamed)}")
        for name, written in manifest.items():
            _verify_file(path / name, written["bytes"], written["sha256"])
        return _from_state(path, state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CorruptFileError(f"{type(error).__name__}: {error}") from error


def _read_state(path: Path) -> dict[str, Any]:
    """Read ``state.json`` if it is as it was written, and of this format: of another nothing else is known."""
    for manifest in path.glob("manifest*.json"):
        if written := read_json(manifest, JSON_LIMIT)["files"].get("state.json"):
            _verify_file(path / "state.json", written["bytes"], written["sha256"])
            break
    else:
        raise CorruptFileError("no manifest names state.json")
    state = read_json(path / "state.json", JSON_LIMIT)
    found = state.get("format")
    if type(found) is int and found != FORMAT:
        raise ConfigError(
            f"{path} has format {found} of checkpoints, this code reads {FORMAT}: go on with the version of mfm_dist "
            "that wrote it, or choose another run.folder"
        )
    if found != FORMAT:
        raise CorruptFileError(f"its format is {found!r:.40}, this code reads {FORMAT}")
    return state


def _verify_file(path: Path, size: int, sha256: str) -> None:
    if (actual := path.stat().st_size) != size:
        raise CorruptFileError(f"{path.name} has {actual} bytes instead of {size}")
    if sha256_of(path) != sha256:
        raise CorruptFileError(f"{path.name} differs from what was written")
    if path.suffix == ".safetensors":
        # This reads the header, which a checksum written beside it does not vouch for.
        with safe_open(require_regular(path), "pt") as file:
            file.keys()


def _from_state(path: Path, state: dict[str, Any]) -> Checkpoint:
    """Read ``state.json``, each part checked by value: a checksum in the same folder does not vouch for them."""
    counts, config, data, world_size = (state[key] for key in ("progress", "config", "data", "world_size"))
    kinds = {entry.name: list if entry.default is MISSING else int for entry in fields(Progress)}
    if not {"step", "applied", "block"} <= set(counts) <= set(kinds) or not all(
        type(value) is kinds[name] and all(map(_is_number, value if isinstance(value, list) else [value]))
        for name, value in counts.items()
    ):
        raise CorruptFileError(f"state.json: progress is not {', '.join(sorted(kinds))} as counts and lists of numbers")
    if counts["step"] != _step_of(path):
        raise CorruptFileError("state.json is of another step than the folder's name")
    if not isinstance(config, dict) or not all(isinstance(value, dict | int) for value in config.values()):
        raise CorruptFileError("state.json: config is not a configuration by section")
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise CorruptFileError("state.json: data is not a fingerprint by name")
    if type(world_size) is not int or world_size < 1:
        raise CorruptFileError("state.json: world_size is not a number of processes")
    return Checkpoint(path, Progress(**counts), config, data, _class_set(state), world_size)


def _class_set(state: dict[str, Any]) -> ClassSet:
    """Read the classes of a checkpoint; those written before they were a matter of the data have ``DEFAULT``."""
    if "classes" not in state:
        return load_class_set(DEFAULT)
    try:
        return ClassSet.from_tree(state["classes"], "classes")
    except ConfigError as error:
        raise CorruptFileError(f"state.json: {error.problems[0]:.200}") from error


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _step_of(path: Path) -> int | None:
    found = _STEP.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
    return int(found[1]) if found else None


def _folders(folder: Path) -> list[Path]:
    """List what may be a checkpoint, from the oldest to the newest.

    One moved aside counts too, before the one of its name: a kill may have come before that one was in place.
    """
    found = [path for path in folder.glob("*step_*") if _step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: (_step_of(path), not path.name.startswith(".")))


def _remove_old(newest: Path, keep: int) -> None:
    """Keep the last ``keep`` checkpoints up to ``newest``; later steps are of a time line given up."""
    folder = newest.parent
    folders = [path for path in _folders(folder) if _STEP.fullmatch(path.name)]
    kept = folders[: folders.index(newest) + 1][-keep:]
    for path in set(folders) - set(kept):
        # Out of sight first: a kill in the middle of the removal must not leave half a checkpoint under its name.
        shutil.rmtree(hidden := path.with_name(f".{path.name}.tmp"), ignore_errors=True)
        path.rename(hidden)
    # With what kills left behind: the new checkpoint is complete, so none of it is needed any more. A file that a
    # reader on another machine has open cannot go yet on some file systems; the next save tries again.
    for path in (*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")):
        shutil.rmtree(path, ignore_errors=True)
