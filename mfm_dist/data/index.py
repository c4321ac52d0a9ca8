"""What a folder of shards holds: its manifest ``dataset.json`` and, beside each tar, where every sample lies.

A folder ``camera_train`` looks like this::

    000000.tar         samples as <key>.jpg (or .png), <key>.label.png and <key>.json; any WebDataset tool reads it
    000000.index.npy   one row a sample: key, and offset, size and CRC-32 of each member (``index_dtype``)
    dataset.json       the ``Manifest``; written last, so a folder without it is unfinished

WebDataset splits a file name at its first dot, so the label's extension is ``label.png`` and keys contain no dot.
"""

from __future__ import annotations

import tarfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mfm_dist.data.manifest import (
    MANIFEST_FILE,
    UNFINISHED_FILE,
    Manifest,
    index_path,
    read_sidecar,
    remake_hint,
    size_problem,
)
from mfm_dist.data.shard_records import ShardRecord
from mfm_dist.errors import BadSample, ConfigError, CorruptFileError, DataError
from mfm_dist.storage import CHUNK_BYTES, open_regular


def build_index(tar: Path) -> np.ndarray:
    """Make the index of a tar that is whole, one row of ``index_dtype`` for each sample in the order of the file.

    Raises:
        DataError: the tar or its structure is damaged; ``scan_tar`` tells what can still be used.
    """
    found = scan_tar(tar)
    if found.bad:
        raise DataError(str(found.bad[0]))
    return found.rows


CHECKED_AT_OPEN = 2000
"""Shards of a folder whose indexes are all read and checked when it is opened."""
HELD_BYTES = 64 << 20
"""Of indexes that are held for reuse: some 600,000 samples."""


class IndexRows(Sequence[np.ndarray]):
    """The index of each shard, one row a sample; read when it is asked for, and held while there is room."""

    def __init__(self, folder: Path, records: Sequence[ShardRecord]) -> None:
        self._folder = folder
        self._records = records
        self._held: OrderedDict[int, np.ndarray] = OrderedDict()
        self._held_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict(), "_held_bytes": 0}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, shard: Any) -> Any:
        """Return the index of a shard. Raises CorruptFileError: it is gone, or not what was written."""
        if shard not in self._held:
            rows = self._held[shard] = _read_index(self._folder, self._records[shard])
            self._held_bytes += rows.nbytes
            while self._held_bytes > HELD_BYTES and len(self._held) > 1:
                self._held_bytes -= self._held.popitem(last=False)[1].nbytes
        self._held.move_to_end(shard)
        return self._held[shard]


def _read_index(folder: Path, record: ShardRecord) -> np.ndarray:
    """Read the index of one shard. Raises CorruptFileError."""
    index = index_path(folder / record.file)
    rows = read_sidecar(index, record.index_sha256)
    if problem := index_problem(rows, record.bytes):
        raise CorruptFileError(f"{index} is no index of a tar: {problem}")
    if len(rows) != record.samples:
        raise CorruptFileError(f"{index} has {len(rows)} samples, {record.samples} were written")
    return rows


@dataclass(frozen=True)
class DatasetIndex:
    """Every sample of a folder by number, in the order of the shards."""

    folder: Path
    manifest: Manifest
    rows: IndexRows
    """The index of each shard."""
    starts: np.ndarray
    """int64 [shards + 1]: number of the first sample of each shard, and the count of all."""

    @classmethod
    def open(cls, folder: Path, *, bad_limit: float = 0.0) -> DatasetIndex:
        """Open a finished folder and check everything that costs no read of the tars.

        With more than ``CHECKED_AT_OPEN`` shards an index is checked when it is first read.

        Args:
            bad_limit: share of the samples that may be lost with missing or truncated shards; reading one of them
                tells that it is.

        Raises:
            ConfigError: there is no such folder.
            DataError: it is unfinished, its manifest or an index is unreadable, or shards are missing or truncated
                beyond the limit (all named).
        """
        manifest = open_manifest(folder)
        if manifest.samples == 0:
            raise DataError(f"{folder}: its {MANIFEST_FILE} counts no samples; make the shards anew")
        problems: list[str] = []
        rows = IndexRows(folder, manifest.shards)
        for shard in range(len(rows) if len(rows) <= CHECKED_AT_OPEN else 0):
            try:
                rows[shard]
            except CorruptFileError as error:
                problems.append(str(error))
        damaged, lost = [], 0
        for shard, record in enumerate(manifest.shards):
            if problem := size_problem(folder / record.file, record):
                damaged.append(problem)
                with suppress(CorruptFileError):
                    lost += _lost(folder / record.file, rows[shard])
        if damaged and (bad_limit == 0 or lost > bad_limit * manifest.samples):
            problems = sorted([*damaged, *problems])
        if problems:
            fix = f"Remake what is damaged: {remake_hint(folder, manifest)}"
            raise DataError("\n".join([*problems, fix]))
        starts = np.array([0, *accumulate(manifest.shards.samples)], dtype=np.int64)
        return cls(folder=folder, manifest=manifest, rows=rows, starts=starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, number: int) -> tuple[int, int]:
        """Find (shard, row inside it) of a sample number."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in {self.folder}")
        shard = bisect_right(self.starts, number) - 1
        return shard, number - int(self.starts[shard])


def open_manifest(folder: Path) -> Manifest:
    """Read the manifest of a finished folder.

    Raises:
        ConfigError: there is no such folder.
        DataError: it is unfinished, or its manifest is unreadable.
    """
    if (folder / MANIFEST_FILE).is_file():
        return Manifest.read(folder / MANIFEST_FILE)
    if (folder / UNFINISHED_FILE).is_file():
        unfinished = Manifest.read(folder / UNFINISHED_FILE)
        raise DataError(f"{folder} is unfinished. Run it to its end: {remake_hint(folder, unfinished)}")
    if folder.is_dir():
        raise DataError(f"{folder} has no {MANIFEST_FILE}, so it is no finished folder of shards")
    beside = sorted(found.parent.name for found in folder.parent.glob(f"*/{MANIFEST_FILE}"))
    exist = f"beside it exist: {', '.join(beside)}" if beside else f"{folder.parent} holds no shards yet"
    raise ConfigError(
        f"there is no shard folder {folder}; {exist}. "
        f"The embedded scenes are made by: mfm-shards make scenes --output {folder.parent}"
    )


def _lost(tar: Path, rows: np.ndarray) -> int:
    """Count the samples that are certainly gone from a shard whose size is wrong."""
    size = tar.stat().st_size if tar.is_file() else 0
    ends = np.maximum(*(rows[member]["offset"] + rows[member]["size"] for member in ("image", "label")))
    return int((ends > size).sum())


def index_problem(rows: np.ndarray, size: int) -> str:
    """Say what an index claims that cannot be in a tar of ``size`` bytes; its checksum vouches for none of it."""
    key = rows.dtype.fields["key"][0].itemsize if rows.dtype.fields and "key" in rows.dtype.fields else 0
    if rows.ndim != 1 or not 0 < key <= _LONGEST_KEY or rows.dtype != index_dtype(key):
        return f"it holds {str(rows.dtype)[:100]} {rows.shape}"
    if set(np.unique(rows["image_format"]).tolist()) - {extension.encode() for extension in IMAGE_EXTENSIONS}:
        return "it names images of formats that there are not"
    for member in ("image", "label", "meta"):
        offset, length = rows[member]["offset"], rows[member]["size"]
        if (offset < -1).any() or (length < 0).any() or (offset > size).any() or (length > size).any():
            return f"it places its {member} outside the tar"
    return ""


IMAGE_EXTENSIONS = ("jpg", "png")
LABEL_EXTENSION = "label.png"
META_EXTENSION = "json"

_MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])
_ABSENT = (-1, 0, 0)
_LONGEST_KEY = 1000
"""Bytes; every row of an index is as long as the longest key of its shard."""


def index_dtype(key_bytes: int) -> np.dtype:
    """Describe one row of a sidecar index. Offsets and sizes are bytes in the tar; an absent member has offset -1."""
    return np.dtype(
        [("key", f"S{key_bytes}"), ("image_format", "S4"), ("image", _MEMBER), ("label", _MEMBER), ("meta", _MEMBER)]
    )


class Scan(NamedTuple):
    """What a tar holds."""

    rows: np.ndarray
    """One row of ``index_dtype`` for each sample whose members are all there, in the order of the file."""
    bad: tuple[BadSample, ...]
    """What cannot be used."""


class _Member(NamedTuple):
    """A file in the tar, or a place (``name`` empty) where nothing can be read."""

    name: str
    place: tuple[int, int, int]
    """Offset, size, CRC-32."""
    trouble: str


def scan_tar(tar: Path) -> Scan:
    """Scan a tar of unknown origin: the samples that are whole, and the name of everything that is not.

    Nothing is extracted, nothing is decoded, and no damage ends the scan: behind a broken header it goes on with the
    next one that is sound. Raises what ``open_regular`` does where the file itself cannot be read.
    """
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}
    reasons: dict[str, str] = {}
    nameless: list[BadSample] = []
    current = ""
    with open_regular(tar) as file:
        for member in _members(file, tar.stat().st_size):
            key, extension = split_name(member.name)
            if not key:
                nameless.append(_bad(tar, "", member.trouble or f"a member without a key: {member.name!r}"))
                continue
            again = key != current and key in samples
            current = key
            trouble = member.trouble or wrong_name(member.name, key)
            if again or f"{key}\0" in reasons:
                # What came first is whole; this is another sample of the same name.
                reasons[f"{key}\0"] = f"its members are not side by side or its key is used twice: {member.name!r}"
                continue
            if extension in samples.setdefault(key, {}):
                trouble = f"{member.name} occurs twice"
            samples[key][extension] = member.place
            if trouble:
                reasons[key] = trouble
    rows = []
    for key, members in samples.items():
        images = [extension for extension in IMAGE_EXTENSIONS if extension in members]
        if key not in reasons and len(images) != 1:
            reasons[key] = f"it needs exactly one image (.jpg or .png), it has {sorted(members)}"
        if key not in reasons:
            places = [members.get(one, _ABSENT) for one in (images[0], LABEL_EXTENSION, META_EXTENSION)]
            rows.append((key.encode(errors="surrogateescape"), images[0].encode(), *places))
    longest = max((len(row[0]) for row in rows), default=1)
    bad = [_bad(tar, key.rstrip("\0"), reason) for key, reason in reasons.items()]
    return Scan(np.array(rows, dtype=index_dtype(longest)), tuple(bad + nameless))


def _bad(tar: Path, key: str, reason: str) -> BadSample:
    return BadSample(shard=str(tar), key=key, number=-1, reason=reason)


def split_name(name: str) -> tuple[str, str]:
    """Split key and extension as WebDataset does: at the first dot of the file's own name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (folder + slash + stem if stem else ""), extension


def wrong_name(name: str, key: str) -> str:
    """Say why a key may not be used: whoever names a file by it would write outside their folder."""
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
        return f"its path leads out of the folder: {name!r}"
    if len(key.encode(errors="surrogateescape")) > _LONGEST_KEY:
        return f"its key is longer than {_LONGEST_KEY} bytes"
    return ""


def _members(file: BinaryIO, length: int) -> Iterator[_Member]:
    """Yield every regular file; after each damaged place the next sound header."""
    start: int | None = 0
    while start is not None:
        end, behind, named = start, start, False
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for info in archive:
                    regular = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
                    if regular:
                        yield _read(file, info, length)
                    if not end < archive.offset < length + tarfile.BLOCKSIZE:
                        named = regular  # its size leads back, or far beyond the end
                        break
                    end = archive.offset
        except RecursionError:  # thousands of headers that only announce the next
            behind = file.tell()
        except (tarfile.TarError, ValueError, OverflowError, EOFError, MemoryError):
            pass  # told below, at the place where no header was found
        if length - end < tarfile.BLOCKSIZE:
            yield _Member("", _ABSENT, f"truncated after {length} bytes, the end mark is missing")
            return
        if _only_zeros(file, end):
            return
        if not named:
            yield _Member("", _ABSENT, f"damaged header at byte {end}; what it belonged to cannot be read")
        start = _next_header(file, max(end + tarfile.BLOCKSIZE, behind), length)
        if named and start is None:
            yield _Member("", _ABSENT, f"truncated, or nothing sound behind the header at byte {end}")


def _read(file: BinaryIO, info: tarfile.TarInfo, length: int) -> _Member:
    """Read a member and take its checksum."""
    nowhere = (info.offset_data, 0, 0)
    if info.size < 0:
        return _Member(info.name, nowhere, f"{info.name!r} claims {info.size} bytes")
    crc, left = 0, info.size
    if info.offset_data + info.size <= length:
        file.seek(info.offset_data)
        while left and (chunk := file.read(min(left, CHUNK_BYTES))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    if left:
        return _Member(info.name, nowhere, f"truncated inside {info.name!r}")
    return _Member(info.name, (info.offset_data, info.size, crc), "")


def _only_zeros(file: BinaryIO, start: int) -> bool:
    """Tell the end of the archive from a broken header, which ``tarfile`` takes for it: only zeros may follow."""
    file.seek(start)
    while chunk := file.read(CHUNK_BYTES):
        if chunk.count(0) != len(chunk):
            return False
    return True


def _next_header(file: BinaryIO, start: int, length: int) -> int | None:
    """Find the offset of the next block that is a tar header with the right checksum."""
    for at in range(start, length - tarfile.BLOCKSIZE + 1, tarfile.BLOCKSIZE):
        file.seek(at)
        block = file.read(tarfile.BLOCKSIZE)
        if block[257:262] != b"ustar":
            continue
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError:
            continue
        return at
    return None
