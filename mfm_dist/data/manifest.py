"""``dataset.json``: what a folder of shards holds and what made it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from mfm_dist.classes import ClassSet
from mfm_dist.config.class_files import DEFAULT, load_class_set
from mfm_dist.data.shard_records import ShardRecord, ShardRecords
from mfm_dist.errors import ConfigError, CorruptFileError, DataError
from mfm_dist.storage import read_json_in_parts, read_whole, write_atomically

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
LARGEST_MANIFEST = 256 << 20
"""Bytes; the manifest of 100,000 shards with 19 classes has 77 MiB."""
LARGEST_SHARD = 1 << 40
"""Bytes of a tar, and more than its samples."""
_UNREADABLE = (OSError, OverflowError, ValueError, KeyError, TypeError, AttributeError, ConfigError, CorruptFileError)
"""What reading a manifest that anybody may have written raises."""
_TAR = re.compile(r"[0-9]{6,20}\.tar")
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
class Manifest:
    """Contents of ``dataset.json``."""

    name: str
    classes: ClassSet | None
    """Of its labels; None without labels."""
    recipe: Recipe
    command: str
    """Command that makes the folder, without its ``--output``."""
    shards: ShardRecords = field(default_factory=ShardRecords)

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
        return any(count for name, count in self.pixel_counts.items() if name != "ignore")

    @property
    def samples(self) -> int:
        return sum(self.shards.samples)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over those of the shards in their order: two folders share it if every number is the same sample."""
        return hashlib.sha256(self.shards.sha256s.encode()).hexdigest()

    @property
    def pixel_counts(self) -> dict[str, int]:
        """Labelled pixels of the whole data set by class name."""
        return self.shards.pixel_counts

    @property
    def left_out(self) -> dict[str, str]:
        """Samples that cannot be used: key -> reason."""
        return self.shards.left_out

    @property
    def image_sizes(self) -> dict[str, int]:
        """Images of the whole data set by ``"<height>x<width>"``."""
        return self.shards.image_sizes

    def to_json(self) -> str:
        """Return the text of the file, a line for each shard; equal manifests give equal bytes."""
        content = asdict(replace(self, shards=ShardRecords()))
        del content["shards"]
        totals = {"samples": self.samples, "image_sizes": self.image_sizes, "pixel_counts": self.pixel_counts}
        head = json.dumps({"format": FORMAT_VERSION, **content, **totals}, indent=1).removesuffix("\n}")
        shards = ",\n".join(f"  {json.dumps(vars(record))}" for record in self.shards)
        return f'{head},\n "shards": [\n{shards}\n ]\n}}\n'

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest. Raise DataError when the file is not a manifest of this format."""
        content: dict[str, Any] = {}
        try:
            shards = ShardRecords(_read_shards(path, content))
            manifest = cls(
                name=content["name"],
                classes=_read_class_set(path, content),
                recipe=_typed(Recipe(**content["recipe"])),
                command=content["command"],
                shards=shards,
            )
            return _typed(manifest)
        except _UNREADABLE as error:
            raise DataError(f"{path} cannot be read as a manifest ({error!r:.500}); make the shards anew") from error


def _read_shards(path: Path, content: dict[str, Any]) -> Iterator[ShardRecord]:
    """Yield the shards of a manifest as they are read; put all else that it says into ``content``.

    Raises:
        DataError: it has another format.
        What ``read_json_in_parts`` and ``_shard`` raise.
    """
    for key, value in read_json_in_parts(path, "shards", LARGEST_MANIFEST):
        if key == "shards":
            yield _shard(value)
            continue
        if key == "format" and value not in (FORMAT_VERSION, WITHOUT_CLASS_SET):
            raise DataError(f"{path} has format {value}, not {FORMAT_VERSION}; make the shards anew")
        content[key] = value


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
    if max(record.samples, record.bytes) > LARGEST_SHARD:
        mistakes.append(f"samples or bytes are more than {LARGEST_SHARD}")
    if mistakes:
        raise ValueError(f"shard {record.file!r}: {'; '.join(mistakes)}")
    return record


def _typed(instance: _Part) -> _Part:
    """Return the same object. Raise TypeError for fields that are not of their type."""
    hints = _hints(type(instance))  # type: ignore[arg-type]
    wrong = [name for name, hint in hints.items() if not _is(getattr(instance, name), hint)]
    if wrong:
        raise TypeError(f"{type(instance).__name__}: {', '.join(wrong)} of the wrong type")
    return instance


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """Return the type of each field of a dataclass."""
    return get_type_hints(kind)


def _is(value: object, hint: Any) -> bool:
    """Tell whether a value has a type: a plain one, a union or ``dict[...]``."""
    if isinstance(value, dict) and get_origin(hint) is dict:
        of_keys, of_values = get_args(hint)
        return all(_is(key, of_keys) and _is(one, of_values) for key, one in value.items())
    if isinstance(hint, UnionType):
        return any(_is(value, one) for one in get_args(hint))
    return hint is Any or type(value) is hint


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
