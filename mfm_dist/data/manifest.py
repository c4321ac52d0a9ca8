"""``dataset.json``: what a folder of shards holds and what made it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from mfm_dist.classes import ClassSet
from mfm_dist.config.class_files import DEFAULT, load_class_set
from mfm_dist.errors import ConfigError, CorruptFileError, DataError
from mfm_dist.storage import read_json, read_whole, write_atomically

FORMAT_VERSION = 2
WITHOUT_CLASS_SET = 1
"""The format before, which named classes but said nothing else of them; read where they are those of ``DEFAULT``."""
MANIFEST_FILE = "dataset.json"
UNFINISHED_FILE = "dataset.unfinished.json"
"""The manifest of a folder still being written: its recipe and the shards that are done."""
OUR_COMMANDS = {("mfm-shards", "make"), ("python", "tools/make_shards.py")}
"""What makes shards, as manifests name it; the second is from before there were console commands."""
LARGEST_SIDECAR = 1 << 30
"""Bytes; an index takes some 100 a sample."""
_TAR = re.compile(r"[0-9]{6,}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_Part = TypeVar("_Part")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What determines every byte of a data set. Two recipes that are equal give the same shards."""

    generator: str
    """The sub-command of ``mfm-shards make``."""
    version: int
    """Version of that generator."""
    arguments: dict[str, Any]
    """Everything the generator was told that changes its output."""

    def differences(self, other: Recipe) -> list[str]:
        """Return one line a difference, from this recipe to the other."""
        mine, theirs = ({"generator": r.generator, "version": r.version, **r.arguments} for r in (self, other))
        names = {**mine, **theirs}
        return [f"{n}: {mine.get(n)} -> {theirs.get(n)}" for n in names if mine.get(n) != theirs.get(n)]


def class_arguments(classes: ClassSet | None) -> dict[str, Any]:
    """Return what a recipe says of the classes of labels: nothing of ``DEFAULT``, as before there were others."""
    if classes is None or classes == load_class_set(DEFAULT):
        return {}
    return {"classes": classes.to_tree()}


@dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """A folder of shards that is to be written."""

    folder: Path
    recipe: Recipe
    command: str
    """The command that writes it, without its ``--output``."""
    classes: ClassSet | None
    """Of its labels; None without labels."""
    samples: int
    """How many there are."""
    shard_size: int
    """Samples a shard."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Index = value of a stored label."""
        return () if self.classes is None else self.classes.names


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One finished shard."""

    file: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    """Of the sidecar index, which is checked whenever the folder is opened; being small, that costs little."""
    image_sizes: dict[str, int]
    """Number of images by size, keyed ``"<height>x<width>"``."""
    pixel_counts: dict[str, int]
    """Labelled pixels by class name, and those that carry no class under ``"ignore"``; empty without labels."""
    classes_sha256: str = ""
    """Of the class statistics (``class_statistics``); empty without labels, and where never counted."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Samples that were to be here and cannot be used: key -> reason."""

    @property
    def has_classes(self) -> bool:
        """Whether any pixel carries a class."""
        return any(count for name, count in self.pixel_counts.items() if name != "ignore")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of ``dataset.json``."""

    name: str
    classes: ClassSet | None
    """Of its labels; None without labels."""
    recipe: Recipe
    command: str
    """Command that makes the folder, without its ``--output``."""
    shards: tuple[ShardRecord, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Index = value of a stored label."""
        return () if self.classes is None else self.classes.names

    @property
    def label_classes(self) -> ClassSet | None:
        """The classes, if any sample has a label."""
        return self.classes if self.pixel_counts else None

    @property
    def has_labels(self) -> bool:
        """Whether any pixel of any sample carries a class."""
        return any(record.has_classes for record in self.shards)

    @property
    def samples(self) -> int:
        return sum(record.samples for record in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over those of the shards in their order: two folders share it if every number is the same sample."""
        return hashlib.sha256("".join(record.sha256 for record in self.shards).encode()).hexdigest()

    @property
    def pixel_counts(self) -> dict[str, int]:
        """Labelled pixels of the whole data set by class name."""
        return _total([record.pixel_counts for record in self.shards])

    @property
    def left_out(self) -> dict[str, str]:
        """Samples that cannot be used: key -> reason."""
        return {key: reason for record in self.shards for key, reason in record.left_out.items()}

    @property
    def image_sizes(self) -> dict[str, int]:
        """Images of the whole data set by ``"<height>x<width>"``."""
        return _total([record.image_sizes for record in self.shards])

    def to_json(self) -> str:
        """Return the text of the file; equal manifests give equal bytes."""
        content = {"format": FORMAT_VERSION, **asdict(self)}
        shards = content.pop("shards")
        totals = {"samples": self.samples, "image_sizes": self.image_sizes, "pixel_counts": self.pixel_counts}
        return json.dumps({**content, **totals, "shards": shards}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest. Raise DataError when the file is not a manifest of this format."""
        try:
            content = read_json(path)
            version = content["format"]
            if version not in (FORMAT_VERSION, WITHOUT_CLASS_SET):
                raise DataError(f"{path} has format {version}, not {FORMAT_VERSION}; make the shards anew")
            manifest = cls(
                name=content["name"],
                classes=_read_class_set(path, content),
                recipe=_typed(Recipe(**content["recipe"])),
                command=content["command"],
                shards=tuple(_shard(record) for record in content["shards"]),
            )
            return _typed(manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError, CorruptFileError) as error:
            raise DataError(f"{path} cannot be read as a manifest ({error!r:.500}); make the shards anew") from error


def _read_class_set(path: Path, content: dict[str, Any]) -> ClassSet | None:
    """Read the classes of the labels.

    Raises:
        ConfigError: they are no class set.
        DataError: they are only named, by names that do not tell what they are.
    """
    if content["format"] == FORMAT_VERSION:
        return None if content["classes"] is None else ClassSet.from_tree(content["classes"], "classes")
    known = load_class_set(DEFAULT)
    if tuple(content["class_names"]) == known.names:
        return known
    raise DataError(
        f"{path} has format {WITHOUT_CLASS_SET}, which says of its classes only the names, "
        f"{', '.join(map(str, content['class_names']))}: pack it anew, giving --classes a file that describes them "
        f"({content['command']} --output {path.parent.parent} --overwrite)"
    )


def _shard(fields: dict[str, Any]) -> ShardRecord:
    """Make a record out of a file that anybody may have written: its name and checksums become paths."""
    record = _typed(ShardRecord(**fields))
    checksums = {"sha256": record.sha256, "index_sha256": record.index_sha256}
    if record.classes_sha256:
        checksums["classes_sha256"] = record.classes_sha256
    mistakes = [f"{name} is not 64 hex digits" for name, text in checksums.items() if not _SHA256.fullmatch(text)]
    if not _TAR.fullmatch(record.file):
        mistakes.append("file is no name such as 000000.tar")
    if min(record.samples, record.bytes) < 0:
        mistakes.append("samples or bytes are negative")
    if mistakes:
        raise ValueError(f"shard {record.file!r}: {'; '.join(mistakes)}")
    return record


def _typed(instance: _Part) -> _Part:
    """Return the same object. Raise TypeError for fields that are not of their type."""
    hints = get_type_hints(type(instance))
    wrong = [name for name, hint in hints.items() if not _is(getattr(instance, name), hint)]
    if wrong:
        raise TypeError(f"{type(instance).__name__}: {', '.join(wrong)} of the wrong type")
    return instance


def _is(value: object, hint: Any) -> bool:
    """Tell whether a value has a type: a plain one, a union, ``dict[...]`` or ``tuple[..., ...]``."""
    if isinstance(value, dict) and get_origin(hint) is dict:
        of_keys, of_values = get_args(hint)
        return all(_is(key, of_keys) and _is(one, of_values) for key, one in value.items())
    if isinstance(value, tuple) and get_origin(hint) is tuple:
        return all(_is(one, get_args(hint)[0]) for one in value)
    if isinstance(hint, UnionType):
        return any(_is(value, one) for one in get_args(hint))
    return hint is Any or type(value) is hint


def _total(counts: list[dict[str, int]]) -> dict[str, int]:
    """Sum dictionaries key by key, keeping keys whose count is 0."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(total)


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """Tell whether ``folder`` is finished, made by ``recipe``, and holds every shard with its size. Reads no shard."""
    if not (folder / MANIFEST_FILE).is_file():
        return False
    manifest = Manifest.read(folder / MANIFEST_FILE)
    for shard in manifest.shards:
        tar = folder / shard.file
        counted = statistics_path(tar).exists() or not shard.has_classes
        if size_problem(tar, shard) or not index_path(tar).exists() or not counted:
            return False
    return manifest.recipe == recipe


def size_problem(tar: Path, record: ShardRecord) -> str:
    """Say what the size of a shard gives away: "" where it is the one that was written."""
    if not tar.is_file():
        return f"{tar} is missing"
    size = tar.stat().st_size
    if size == record.bytes:
        return ""
    state = "truncated" if size < record.bytes else "not the file that was written"
    return f"{tar} is {state}: it has {size} bytes, {record.bytes} were written"


def started_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, finished or not; None where nothing was begun."""
    for name in (UNFINISHED_FILE, MANIFEST_FILE):
        if (folder / name).is_file():
            return Manifest.read(folder / name)
    return None


def conflict(folder: Path, recipe: Recipe) -> str | None:
    """Say why ``recipe`` may not write into ``folder``: it holds other shards. None when it may."""
    try:
        started = started_manifest(folder)
    except DataError as error:
        return str(error)
    if started is None:
        return f"{folder} holds tars that this command did not write" if any(folder.glob("*.tar")) else None
    differences = started.recipe.differences(recipe)
    return f"{folder} was made by another recipe ({'; '.join(differences)})" if differences else None


def index_path(tar: Path) -> Path:
    """Return the path of the sidecar index of a tar."""
    return tar.with_name(f"{tar.stem}.index.npy")


def statistics_path(tar: Path) -> Path:
    """Return the path of the class statistics of a tar."""
    return tar.with_name(f"{tar.stem}.classes.npy")


def write_sidecar(path: Path, array: np.ndarray) -> str:
    """Write an index or class statistics; return the SHA-256 of the file. Raises DiskFullError."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_sidecar(path: Path, sha256: str) -> np.ndarray:
    """Read an index or class statistics.

    Raises:
        CorruptFileError: it is gone, or not what was written.
    """
    try:
        content = read_whole(path, LARGEST_SIDECAR)
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read ({error.strerror})") from error
    except CorruptFileError as error:
        raise CorruptFileError(f"{path.parent}: {error}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CorruptFileError(f"{path} is damaged: it differs from what was written (wrong SHA-256)")
    try:
        return _read_array(content)
    except Exception as error:  # numpy reads the header as Python text, and raises whatever that raises
        raise CorruptFileError(f"{path} is not a readable array ({str(error)[:200]})") from error


def _read_array(content: bytes) -> np.ndarray:
    """Read an array as ``np.save`` writes it, if its header claims what is there. Raises ValueError."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("of another version of numpy's format")
    shape, columnwise, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or columnwise:
        raise ValueError("it holds objects, or is in another order")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"its header claims {dtype.itemsize} bytes x {shape}, there are {len(content) - file.tell()}")
    return np.ndarray(shape, dtype=dtype, buffer=content, offset=file.tell()).copy()


def remake_hint(folder: Path, manifest: Manifest) -> str:
    """Return the command that remakes what is damaged in ``folder``, or finishes it; it keeps what is whole.

    Whoever wrote the manifest may have written any command there: only one of ours is passed on as advice.
    """
    if not _is_ours(manifest.command):
        own = f"what {MANIFEST_FILE} gives for it is none of ours"
        return f"the command that made it, with --output {folder.parent} ({own})"
    return f"{manifest.command} --output {folder.parent}"


def _is_ours(command: str) -> bool:
    """Tell whether a command starts one of our tools and, as a shell reads it, nothing else."""
    try:
        words = shlex.split(command)
    except ValueError:
        return False
    return tuple(words[:2]) in OUR_COMMANDS and shlex.join(words) == command and "\n" not in command
