"""Writing shards: deterministic bytes, nothing half under a final name, and resumable.

The same samples give the same files, whoever writes them and however often the work was interrupted.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
from PIL import Image

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.class_statistics import PixelCounts, write_statistics
from mfm_dist.data.decoding import decode_label, header_size
from mfm_dist.data.index import LABEL_EXTENSION, META_EXTENSION, build_index
from mfm_dist.data.manifest import (
    MANIFEST_FILE,
    UNFINISHED_FILE,
    DatasetPlan,
    Manifest,
    index_path,
    remake_hint,
    size_problem,
    started_manifest,
    statistics_path,
    write_sidecar,
)
from mfm_dist.data.png import PNG_START
from mfm_dist.data.reader import read_member, reads_of
from mfm_dist.data.shard_records import ShardRecord, ShardRecords
from mfm_dist.errors import CorruptFileError, DataError, StorageError
from mfm_dist.storage import atomic_file, no_space_left, open_regular, sha256_of, write_atomically

JPEG_QUALITY = 95
_KEY = re.compile(r"[A-Za-z0-9_\-]{1,80}")  # no dot: WebDataset would cut the key there; 100 bytes fit a tar header


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One sample to be packed."""

    key: str
    """Letters, digits, ``_`` and ``-``; at most 80."""
    image: np.ndarray
    """uint8 [H, W, 3], RGB."""
    label: np.ndarray | None
    """uint8 [H, W], indices of classes or ``IGNORE_INDEX``; None for a sample without a label."""
    meta: dict[str, Any]
    """Anything JSON can hold; stored beside the image."""
    image_file: tuple[str, bytes] | None = None
    """Format (``jpg`` or ``png``) and bytes of a file that holds ``image``, to be stored as they are; None: a JPEG."""


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] as baseline JPEG, 4:2:0, quality 95; progressive files would halve the decoding rate."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0", progressive=False)
    return buffer.getvalue()


def encode_label_png(label: np.ndarray) -> bytes:
    """Encode an 8-bit grey PNG without row filters at zlib's level 9, from uint8 [H, W].

    Any reader opens it; against Pillow's default, whose filters suit photographs, a label map is a quarter smaller
    and decodes twice as fast.
    """
    height, width = label.shape
    rows = np.zeros((height, 1 + width), dtype=np.uint8)  # each row starts with its filter type, 0 = none
    rows[:, 1:] = label
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey, default methods, not interlaced
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    return PNG_START + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def write_shard(folder: Path, number: int, samples: Iterable[RawSample], class_names: tuple[str, ...]) -> ShardRecord:
    """Write ``<number>.tar``, its index and its class statistics; each gets its name when it is whole and on the disk.

    Raises:
        DataError: a sample is impossible.
        StorageError: the disk is full.
    """
    tar = folder / f"{number:06d}.tar"
    counts = PixelCounts(class_names)
    with (
        atomic_file(tar) as file,
        # A fixed owner and time, so that equal samples give equal bytes.
        webdataset.TarWriter(file, user="", group="", mtime=0, compress=False, encoder=False) as writer,
    ):
        for sample in samples:
            _check(sample, len(class_names), tar)
            writer.write(_members(sample))
            counts.add(sample.image.shape[:2], sample.label)
    return ShardRecord(
        file=tar.name,
        samples=len(counts.classes),
        bytes=tar.stat().st_size,
        sha256=sha256_of(tar),
        index_sha256=write_index(tar),
        image_sizes=counts.image_sizes,
        pixel_counts=counts.pixel_counts,
        classes_sha256=write_statistics(tar, counts.classes),
    )


def write_index(tar: Path) -> str:
    """Write the sidecar index of a finished tar; return its SHA-256."""
    return write_sidecar(index_path(tar), build_index(tar))


def _members(sample: RawSample) -> dict[str, str | bytes]:
    """Give the members the form TarWriter takes: extension -> bytes."""
    meta = json.dumps({"key": sample.key, **sample.meta}, sort_keys=True)
    image_format, image = sample.image_file or ("jpg", encode_jpeg(sample.image))
    members: dict[str, str | bytes] = {"__key__": sample.key, image_format: image}
    if sample.label is not None:
        members[LABEL_EXTENSION] = encode_label_png(sample.label)
    return {**members, META_EXTENSION: meta.encode()}


def _check(sample: RawSample, num_classes: int, tar: Path) -> None:
    """Refuse what the reader would refuse later."""
    where = f"{tar}, sample {sample.key!r}"
    if not _KEY.fullmatch(sample.key):
        raise DataError(f"{where}: a key is 1 to 80 letters, digits, _ or -")
    if sample.image.dtype != np.uint8 or sample.image.ndim != 3 or sample.image.shape[2] != 3:
        raise DataError(f"{where}: the image is {sample.image.dtype} {sample.image.shape}, not uint8 [H, W, 3]")
    if sample.label is None:
        return
    if sample.label.dtype != np.uint8 or sample.label.shape != sample.image.shape[:2]:
        raise DataError(
            f"{where}: the label is {sample.label.dtype} {sample.label.shape}, not uint8 {sample.image.shape[:2]}"
        )
    unknown = sample.label[(sample.label >= num_classes) & (sample.label != IGNORE_INDEX)]
    if unknown.size:
        ids = ", ".join(map(str, np.unique(unknown)))
        raise DataError(f"{where}: class ids {ids}; allowed are 0 to {num_classes - 1} and {IGNORE_INDEX}")


class PlannedShard(NamedTuple):
    """A shard that has still to be written."""

    number: int
    samples: range
    """Numbers of its samples."""


class ShardSetWriter:
    """Fills one folder shard by shard and goes on where an earlier run stopped.

    Shards may be written by other processes, with ``write_shard``; one process owns the writer and adds the records.
    Call ``conflict`` first: the folder must be new or begun by the same recipe.
    """

    def __init__(self, plan: DatasetPlan) -> None:
        """Keep the shards whose checksum is right; their index is built anew, being cheaper than to verify."""
        self.folder = folder = plan.folder
        folder.mkdir(parents=True, exist_ok=True)
        numbers = range(plan.samples)
        starts = numbers[:: plan.shard_size]
        self._planned = [PlannedShard(i, numbers[at : at + plan.shard_size]) for i, at in enumerate(starts)]
        names = plan.class_names
        self._manifest = Manifest(name=folder.name, classes=plan.classes, recipe=plan.recipe, command=plan.command)
        self._records: dict[str, ShardRecord] = {}
        started = started_manifest(folder)
        for record in started.shards if started else ():
            tar = folder / record.file
            if not size_problem(tar, record) and sha256_of(tar) == record.sha256:
                write_index(tar)
                self._records[record.file] = replace(record, classes_sha256=_keep_statistics(tar, record, names))
        self._save(UNFINISHED_FILE)
        (folder / MANIFEST_FILE).unlink(missing_ok=True)

    @property
    def pending(self) -> list[PlannedShard]:
        """What is still to be written."""
        return [shard for shard in self._planned if f"{shard.number:06d}.tar" not in self._records]

    def add(self, record: ShardRecord) -> None:
        """Take note of a finished shard; from now on a restart keeps it.

        Above 100 shards the note is written once in a hundredth of them, or all notes together would grow with the
        square of the shards; a restart may then make the last hundredth again.
        """
        self._records[record.file] = record
        if len(self._records) >= 1.01 * self._saved:
            self._save(UNFINISHED_FILE)

    def finish(self) -> Manifest:
        """Declare the folder complete."""
        assert not self.pending
        self._save(MANIFEST_FILE)
        (self.folder / UNFINISHED_FILE).unlink()
        return self._manifest

    def require_free_space(self, bytes_per_sample: int) -> None:
        """Raise StorageError when the disk cannot take what is pending."""
        need = bytes_per_sample * sum(len(shard.samples) for shard in self.pending)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise StorageError(no_space_left(self.folder, need, free, remake_hint(self.folder, self._manifest)))

    def _save(self, name: str) -> None:
        shards = ShardRecords(self._records[file] for file in sorted(self._records))
        self._manifest = replace(self._manifest, shards=shards)
        self._saved = len(shards)
        write_atomically(self.folder / name, self._manifest.to_json())


def _keep_statistics(tar: Path, record: ShardRecord, class_names: tuple[str, ...]) -> str:
    """Count the classes of a finished tar again where their file is not the one that was written."""
    path = statistics_path(tar)
    if not record.has_classes or (path.is_file() and sha256_of(path) == record.classes_sha256):
        return record.classes_sha256
    return write_statistics(tar, count_shard(tar, build_index(tar), class_names).classes)


def count_shard(tar: Path, rows: np.ndarray, class_names: tuple[str, ...]) -> PixelCounts:
    """Decode every label of a tar, whose index is ``rows``, and count its pixels; sizes are those of the labels.

    Raises:
        DataError: a label cannot be decoded.
    """
    counts = PixelCounts(class_names)
    with open_regular(tar) as file:
        for row in rows:
            label = None
            try:
                if row["label"]["offset"] >= 0:
                    payload = read_member(reads_of(file), row["label"].item(), "label")
                    label = decode_label(payload, len(class_names), header_size(payload, "png", "label")).numpy()
            except CorruptFileError as error:
                raise DataError(f"{tar}, sample {row['key'].decode()!r}: {error}") from error
            counts.add(() if label is None else label.shape, label)
    return counts


def remove_shards(folder: Path) -> None:
    """Remove a data set and leave every other file alone; the manifest goes first, so nothing looks finished."""
    for pattern in (MANIFEST_FILE, UNFINISHED_FILE, "[0-9]*.tar", "[0-9]*.index.npy", "[0-9]*.classes.npy"):
        for path in folder.glob(pattern):
            path.unlink()
