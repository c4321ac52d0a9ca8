"""What a folder of shards holds: its manifest ``dataset.json`` and, beside each tar, where every sample lies.

A folder ``camera_train`` looks like this::

    000000.tar         samples as <key>.jpg (or .png), <key>.label.png and <key>.json; any WebDataset tool reads it
    000000.index.npy   one row a sample: key, and offset, size and CRC-32 of each member (``index_dtype``)
    dataset.json       the ``Manifest``; written last, so a folder without it is unfinished

WebDataset splits a file name at its first dot, so the label's extension is ``label.png`` and keys contain no dot.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mfm_dist.data.manifest import MANIFEST_FILE, UNFINISHED_FILE, Manifest, ShardRecord, index_path, remake_hint
from mfm_dist.errors import ConfigError, DataError

IMAGE_EXTENSIONS = ("jpg", "png")
LABEL_EXTENSION = "label.png"
META_EXTENSION = "json"

_MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])
_ABSENT = (-1, 0, 0)
_COPY_BYTES = 1 << 20


def index_dtype(key_bytes: int) -> np.dtype:
    """One row of a sidecar index. Offsets and sizes are bytes in the tar; an absent member has offset -1."""
    return np.dtype(
        [("key", f"S{key_bytes}"), ("image_format", "S4"), ("image", _MEMBER), ("label", _MEMBER), ("meta", _MEMBER)]
    )


def build_index(tar: Path) -> np.ndarray:
    """Scans a tar and returns its index, one row of ``index_dtype`` for each sample in the order of the file.

    Raises:
        DataError: the tar is truncated or damaged, a key comes back after another one, or a sample has no image.
    """
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}
    current = None
    with open(tar, "rb") as file:
        for key, extension, member in _members(tar, file):
            if key != current and key in samples:
                raise DataError(f"{tar}: the members of sample {key!r} are not side by side; WebDataset needs them so")
            current = key
            if extension in samples.setdefault(key, {}):
                raise DataError(f"{tar}: {key}.{extension} occurs twice")
            samples[key][extension] = member
    rows = [_row(tar, key, members) for key, members in samples.items()]
    return np.array(rows, dtype=index_dtype(max((len(row[0]) for row in rows), default=1)))


def _members(tar: Path, file: BinaryIO) -> list[tuple[str, str, tuple[int, int, int]]]:
    """(key, extension, (offset, size, crc32)) of every regular file in the tar."""
    found = []
    length = tar.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue
                if info.offset_data + info.size > length:
                    raise DataError(f"{tar}: truncated inside {info.name!r}")
                file.seek(info.offset_data)
                crc = zlib.crc32(file.read(info.size))
                folder, slash, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                found.append((folder + slash + stem, extension, (info.offset_data, info.size, crc)))
            end = archive.offset
    except tarfile.TarError as error:
        raise DataError(f"{tar}: not a readable tar ({error})") from error
    _check_end(tar, file, end, length)
    return found


def _check_end(tar: Path, file: BinaryIO, end: int, length: int) -> None:
    """A broken header in the middle looks like the end of the archive to ``tarfile``; only zeros may follow it."""
    if length - end < tarfile.BLOCKSIZE:
        raise DataError(f"{tar}: truncated after {length} bytes, the end mark is missing")
    file.seek(end)
    while chunk := file.read(_COPY_BYTES):
        if chunk.count(0) != len(chunk):
            raise DataError(f"{tar}: damaged header at byte {end}; what follows cannot be read")


def _row(tar: Path, key: str, members: dict[str, tuple[int, int, int]]) -> tuple:
    formats = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if len(formats) != 1:
        raise DataError(f"{tar}: sample {key!r} needs exactly one image (.jpg or .png), it has {sorted(members)}")
    label, meta = members.get(LABEL_EXTENSION, _ABSENT), members.get(META_EXTENSION, _ABSENT)
    return key.encode(), formats[0].encode(), members[formats[0]], label, meta


@dataclass(frozen=True)
class DatasetIndex:
    """Every sample of a folder by number, in the order of the shards."""

    folder: Path
    manifest: Manifest
    rows: tuple[np.ndarray, ...]
    """The index of each shard."""
    starts: np.ndarray
    """int64 [shards + 1]: number of the first sample of each shard, and the count of all."""

    @classmethod
    def open(cls, folder: Path) -> DatasetIndex:
        """Opens a finished folder and checks everything that costs no read of the tars.

        Raises:
            ConfigError: there is no such folder.
            DataError: it is unfinished, its manifest is unreadable, or shards are missing or truncated (all named).
        """
        manifest = Manifest.read(_manifest_of(folder))
        problems: list[str] = []
        rows = [_open_shard(folder, record, problems) for record in manifest.shards]
        if problems:
            fix = f"Remake what is damaged: {remake_hint(folder, manifest)}"
            raise DataError("\n".join([*problems, fix]))
        starts = np.array([0, *accumulate(len(part) for part in rows)], dtype=np.int64)
        return cls(folder=folder, manifest=manifest, rows=tuple(rows), starts=starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, row inside it) of a sample number."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])


def _manifest_of(folder: Path) -> Path:
    """The path of the manifest, or a message on why there is none."""
    path = folder / MANIFEST_FILE
    if path.is_file():
        return path
    if (folder / UNFINISHED_FILE).is_file():
        unfinished = Manifest.read(folder / UNFINISHED_FILE)
        raise DataError(f"{folder} is unfinished. Run it to its end: {remake_hint(folder, unfinished)}")
    if folder.is_dir():
        raise DataError(f"{folder} has no {MANIFEST_FILE}, so it is no finished folder of shards")
    beside = sorted(found.parent.name for found in folder.parent.glob(f"*/{MANIFEST_FILE}"))
    exist = f"beside it exist: {', '.join(beside)}" if beside else f"{folder.parent} holds no shards yet"
    raise ConfigError(
        f"there is no shard folder {folder}; {exist}. "
        f"The embedded scenes are made by: python tools/make_shards.py scenes --output {folder.parent}"
    )


def _open_shard(folder: Path, record: ShardRecord, problems: list[str]) -> np.ndarray:
    """The index of one shard; what is wrong with the shard is added to ``problems``."""
    tar = folder / record.file
    index = index_path(tar)
    if not tar.is_file():
        problems.append(f"{tar} is missing")
    elif (actual := tar.stat().st_size) != record.bytes:
        state = "truncated" if actual < record.bytes else "not the file that was written"
        problems.append(f"{tar} is {state}: it has {actual} bytes, {record.bytes} were written")
    try:
        content = index.read_bytes()
    except OSError as error:
        problems.append(f"{index} cannot be read ({error.strerror})")
        return np.empty(0, dtype=index_dtype(1))
    if hashlib.sha256(content).hexdigest() != record.index_sha256:
        problems.append(f"{index} is damaged: it differs from what was written (wrong SHA-256)")
        return np.empty(0, dtype=index_dtype(1))
    rows: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    assert len(rows) == record.samples
    return rows
