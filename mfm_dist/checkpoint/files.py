"""One checkpoint as a folder on disk: written whole, verified, found again, and in time removed."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import chain, count, groupby
from operator import itemgetter
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from mfm_dist.checkpoint.pieces import (
    CHUNK_BYTES,
    FileSums,
    Piece,
    PieceReader,
    Place,
    TensorSpec,
    as_bytes,
    check_cover,
    write_pieces,
)
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.classes import ClassSet
from mfm_dist.errors import ConfigError, CorruptFileError, StorageError
from mfm_dist.storage import (
    fsync,
    make_empty,
    put_in_place,
    read_json,
    sha256_of,
    temporary_folder,
    write_atomically,
)

FORMAT = 3
"""Any format keeps its number in ``state.json``, and bytes and SHA-256 of every file in ``manifest*.json``."""
SET_ASIDE = "set_aside"
"""Folder beside the checkpoints that nothing is looked for in, and nothing removed from."""
STATE_LIMIT = 4 << 20
"""Bytes read of ``state.json`` at most; ours are some kilobytes."""
POLL_SECONDS = 0.02
"""Between two looks of rank 0 at who else has written its pieces."""

_STEP = re.compile(r"step_(\d{8,})")
_REPLACED = re.compile(r"\.step_(\d{8,})\.old")
"""What ``put_in_place`` moves aside before a new folder of the same name takes its place."""
_FILE = re.compile(r"state\.json|(rank|buffers)_\d{5,}\.safetensors")


class DamagedCheckpointError(StorageError):
    """Bytes of a checkpoint are not those that were written; an earlier one may be whole."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what is wrong with a file of the checkpoint at ``path`` into a DamagedCheckpointError that names it."""
    try:
        yield
    except CorruptFileError as error:
        reason = " ".join(str(error).split())[:300]  # what a damaged file says may be anything
        raise DamagedCheckpointError(f"{path} is damaged ({reason})") from error


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one rank has to write of a run."""

    tensors: Mapping[str, TensorSpec]
    """Every whole tensor of the checkpoint, as ``<part>/<name>``, the same on all ranks."""
    pieces: Sequence[Piece]
    """What this rank writes of them, in the order of ``tensors``."""
    buffers: Sequence[Piece] = ()
    """This rank's own BatchNorm statistics, each whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose frame is sound: its state, its manifest, and the size of every file.

    What is in the files is verified as it is read.
    """

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
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    """Every tensor in it, by ``<part>/<name>``."""
    files: dict[str, FileSums] = field(default_factory=dict)
    """Those of tensors."""

    def reader(self) -> PieceReader:
        """Give what reads its files."""
        return PieceReader(self.path, self.files, self.specs)

    def part(self, name: str) -> dict[str, TensorSpec]:
        """Return the tensors of one part, e.g. ``student``; empty if the run had no such part."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): spec for key, spec in self.specs.items() if key.startswith(prefix)}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of one part whole, in one process. Raises DamagedCheckpointError."""
        return {key.removeprefix(f"{name}/"): whole for key, whole in self.stream(f"{name}/")}

    def stream(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Read every tensor whole whose name begins so, one after another, in one process.

        Raises:
            DamagedCheckpointError: if a file is not as it was written.
        """
        specs = {name: spec for name, spec in self.specs.items() if name.startswith(prefix)}
        if not specs:
            return
        reader = self.reader()
        share = self.share(reader, 0, 1)
        with naming(self.path):
            check_cover(specs, (sum(place.length for _, place in share.get(name, [])) for name in specs))
            for name, spec in specs.items():
                whole = torch.empty(spec.shape, dtype=spec.dtype)
                for file, place in share.get(name, []):
                    reader.read(file, place.start, as_bytes(whole)[place.offset : place.offset + place.length])
                yield name, whole

    def buffers(self, rank: int) -> dict[str, Tensor]:
        """Read one rank's own BatchNorm statistics. Raises DamagedCheckpointError."""
        file, reader = file_of("buffers", rank), self.reader()
        found: dict[str, Tensor] = {}
        with naming(self.path):
            for place in reader.places(file):
                spec = self.specs[place.name]
                check_cover({place.name: spec}, [place.length])
                whole = found[place.name.removeprefix("student/")] = torch.empty(spec.shape, dtype=spec.dtype)
                reader.read(file, place.start, as_bytes(whole))
        return found

    def verify(self) -> None:
        """Read every byte. Raises DamagedCheckpointError."""
        reader, buffer = self.reader(), memoryview(bytearray(CHUNK_BYTES))
        with naming(self.path):
            for file, sums in self.files.items():
                for start in range(0, sums.size, CHUNK_BYTES):
                    reader.read(file, start, buffer[: min(CHUNK_BYTES, sums.size - start)])
                reader.forget(file)
            held = dict.fromkeys(self.specs, 0)
            for rank in range(self.world_size):
                for place in reader.places(file_of("rank", rank)):
                    held[place.name] += place.length
            check_cover(self.specs, held.values())
        for rank in range(self.world_size):
            self.buffers(rank)

    def share(self, reader: PieceReader, rank: int, world_size: int) -> dict[str, list[tuple[str, Place]]]:
        """Return what a rank has to read so that all ranks together read everything once, by tensor and file.

        The chunks of all files are dealt out evenly, in order, whoever wrote them.

        Raises:
            DamagedCheckpointError: if the header of a file is not as it was written.
        """
        ranks = [file_of("rank", number) for number in range(self.world_size)]
        chunks = [(file, number) for file in ranks for number in range(len(self.files[file].chunks))]
        first, stop = (len(chunks) * part // world_size for part in (rank, rank + 1))
        share: dict[str, list[tuple[str, Place]]] = {}
        with naming(self.path):
            for file, own in groupby(chunks[first:stop], key=itemgetter(0)):
                numbers = [number for _, number in own]
                low, high = numbers[0] * CHUNK_BYTES, (numbers[-1] + 1) * CHUNK_BYTES
                for place in reader.places(file):
                    begin, end = max(place.start, low), min(place.start + place.length, high)
                    if begin < end:
                        part = Place(place.name, place.offset + begin - place.start, begin, end - begin)
                        share.setdefault(place.name, []).append((file, part))
        return share


def file_of(kind: str, rank: int) -> str:
    """Return the name of a rank's file: of its pieces (``rank``), or of its own BatchNorm statistics (``buffers``)."""
    return f"{kind}_{rank:05d}.safetensors"


def step_folder(folder: Path, step: int) -> Path:
    """Return the final name of a checkpoint in ``folder``."""
    return folder / f"step_{step:08d}"


def begin_checkpoint(final: Path) -> None:
    """Make the folder that all ranks write to before ``final`` has its name. Rank 0 does, before any of them.

    Raises:
        OSError: if it cannot be made.
    """
    make_empty(temporary_folder(final))


def discard_checkpoint(final: Path) -> None:
    """Remove what was written of a checkpoint that will not be complete."""
    shutil.rmtree(temporary_folder(final), ignore_errors=True)


def write_rank(final: Path, rank: int, snapshot: Snapshot) -> None:
    """Write what one rank has to, on the disk when this returns, and leave word of it for rank 0.

    Raises:
        OSError: if the disk is full or not writable.
    """
    folder = temporary_folder(final)
    sums = {
        file_of(kind, rank): write_pieces(folder / file_of(kind, rank), pieces)
        for kind, pieces in (("rank", snapshot.pieces), ("buffers", snapshot.buffers))
    }
    write_atomically(_word_of(folder, rank), json.dumps({file: [one.size, one.chunks] for file, one in sums.items()}))


def complete_checkpoint(
    final: Path,
    tensors: Mapping[str, TensorSpec],
    *,
    progress: Progress,
    config: Mapping[str, Any],
    data: Mapping[str, str],
    classes: ClassSet,
    world_size: int,
    keep: int,
    patience: float,
    abandoned: Event,
) -> None:
    """Once every rank has written: add state and manifest, name the folder, point ``latest`` at it, remove old ones.

    Rank 0 alone does so, and hears of the others by their files. Of all but the last ``keep`` nothing stays; but amid
    steps that are not applied nothing is removed: a run that has to go back needs one from before.

    Args:
        patience: seconds to wait for the other ranks.
        abandoned: set when it is known that they will not come.

    Raises:
        StorageError: naming the ranks that have not written in time. There is no such checkpoint then.
        OSError, CorruptFileError: if the disk is full or not writable. Earlier checkpoints are then as they were.
    """
    temporary = temporary_folder(final)
    files = _words(final, world_size, patience, abandoned)
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "config": config,
        "data": data,
        "classes": classes.to_tree(),
        "world_size": world_size,
        "torch": torch.__version__,
    }
    path = temporary / "state.json"
    path.write_text(json.dumps(state, indent=1), encoding="utf-8")
    fsync(path)
    manifest = {
        "chunk_bytes": CHUNK_BYTES,
        "files": {
            "state.json": {"bytes": path.stat().st_size, "sha256": sha256_of(path)},
            **{name: {"bytes": size, "sha256": chunks} for name, (size, chunks) in files.items()},
        },
        "tensors": {name: spec.to_tree() for name, spec in tensors.items()},
    }
    (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    fsync(temporary / "manifest.json")
    for rank in range(world_size):
        _word_of(temporary, rank).unlink()
    # There is one already if it is damaged, or if the run was resumed from an earlier step.
    put_in_place(temporary, final)
    write_atomically(final.with_name("latest"), final.name + "\n")
    if not progress.skipped:
        _remove_old(final, keep)


def write_checkpoint(final: Path, tensors: Mapping[str, Mapping[str, Tensor]], **settings: Any) -> None:
    """Write a checkpoint of whole tensors, by part and name, in one process; else as ``complete_checkpoint``."""
    whole = {f"{part}/{name}": tensor for part, named in tensors.items() for name, tensor in named.items()}
    specs = {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in whole.items()}
    pieces = [Piece(name, 0, tensor.flatten()) for name, tensor in whole.items() if tensor.numel()]
    begin_checkpoint(final)
    write_rank(final, 0, Snapshot(tensors=specs, pieces=pieces))
    complete_checkpoint(final, specs, world_size=1, patience=0.0, abandoned=Event(), **settings)


def _word_of(folder: Path, rank: int) -> Path:
    """Return the file by which a rank says that its pieces are on the disk."""
    return folder / f"rank_{rank:05d}.json"


def _words(final: Path, world_size: int, patience: float, abandoned: Event) -> dict[str, Sequence[Any]]:
    """Wait for the word of every rank: size and checksums of each file."""
    folder, until = temporary_folder(final), time.monotonic() + patience
    words: dict[str, Sequence[Any]] = {}
    for rank in range(world_size):
        while not _word_of(folder, rank).exists():
            if abandoned.wait(POLL_SECONDS) or time.monotonic() > until:
                missing = [str(rank) for rank in range(world_size) if not _word_of(folder, rank).exists()]
                raise StorageError(
                    f"{final} is not complete: rank {', '.join(missing[:8])} has not written its pieces"
                    + ("" if abandoned.is_set() else f" within {patience:g} s")
                )
        words |= read_json(_word_of(folder, rank))
    return words


def find_latest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Find the newest complete checkpoint of ``folder``, every byte of it verified, or None; report damaged ones."""
    for checkpoint in newest_first(folder, report):
        try:
            checkpoint.verify()
        except DamagedCheckpointError as error:
            report(f"{error}; looking for an earlier one")
        else:
            return checkpoint
    return None


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


def sound_first(folder: Path, before: int | None, report: Callable[[str], None]) -> Iterator[Checkpoint]:
    """Yield where a run can go back to, the best place first: checkpoints not saved amid steps not applied.

    Args:
        before: rather one of an earlier step than this; the earliest there is where none is early enough.
    """
    sound = [one for one in newest_first(folder, report) if not one.progress.skipped]
    early = [one for one in sound if before is None or one.progress.step < before]
    yield from early
    yield from (one for one in reversed(sound) if one not in early)


def newest_first(folder: Path, report: Callable[[str], None]) -> Iterator[Checkpoint]:
    """Open checkpoints from the newest to the oldest; report those whose frame is damaged."""
    for path in reversed(_folders(folder)):
        try:
            yield open_checkpoint(path)
        except DamagedCheckpointError as error:
            report(f"{error}; looking for an earlier one")


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and verify every byte of it. Raises what ``open_checkpoint`` does."""
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    return checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify the frame of a checkpoint and read its state.

    Raises:
        DamagedCheckpointError: if a file is not as it was written, or says what no run of ours writes.
        ConfigError: if it is whole and of another format than this code reads.
    """
    with naming(path):
        return _open(path)


def _open(path: Path) -> Checkpoint:
    """Open a checkpoint. Raises CorruptFileError, and ConfigError for another format."""
    try:
        state = _read_state(path)
        checkpoint = _from_state(path, state)
        manifest = read_json(path / "manifest.json")
        files = {name: FileSums(entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if foreign := [name for name in files if not _FILE.fullmatch(name)]:
            raise CorruptFileError(f"manifest.json names {foreign[0]!r}, which is no file of a checkpoint")
        ranks = range(checkpoint.world_size)
        needed = {"state.json", *(file_of(kind, rank) for kind in ("rank", "buffers") for rank in ranks)}
        present = {entry.name for entry in path.glob("*.safetensors")}
        if unnamed := sorted((present | needed) - set(files)):
            raise CorruptFileError(f"manifest.json does not name {' and '.join(unnamed[:3])}")
        if manifest["chunk_bytes"] != CHUNK_BYTES:
            raise CorruptFileError(f"manifest.json has checksums of {manifest['chunk_bytes']!r:.20} bytes each")
        for name, sums in files.items():
            if (actual := (path / name).stat().st_size) != sums.size:
                raise CorruptFileError(f"{name} has {actual} bytes instead of {sums.size}")
        del files["state.json"]
        specs = {name: TensorSpec.from_tree(tree) for name, tree in manifest["tensors"].items()}
        return replace(checkpoint, specs=specs, files=files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{type(error).__name__}: {error}") from error


def _read_state(path: Path) -> dict[str, Any]:
    """Read ``state.json`` if it is as it was written, and of this format: of another nothing else is known."""
    for manifest in path.glob("manifest*.json"):
        if written := read_json(manifest)["files"].get("state.json"):
            if (actual := (path / "state.json").stat().st_size) != written["bytes"]:
                raise CorruptFileError(f"state.json has {actual} bytes instead of {written['bytes']}")
            if sha256_of(path / "state.json") != written["sha256"]:
                raise CorruptFileError("state.json differs from what was written")
            break
    else:
        raise CorruptFileError("no manifest names state.json")
    state = read_json(path / "state.json", STATE_LIMIT)
    found = state.get("format")
    if type(found) is int and found != FORMAT:
        raise ConfigError(
            f"{path} has format {found} of checkpoints, this code reads {FORMAT}: go on with the version of mfm_dist "
            "that wrote it, or choose another run.folder"
        )
    if found != FORMAT:
        raise CorruptFileError(f"its format is {found!r:.40}, this code reads {FORMAT}")
    return state


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
    """Read the classes of a checkpoint."""
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
