"""Checks a folder of shards byte by byte and sample by sample; damage in one place hides none in another."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.class_statistics import count_pixels
from mfm_dist.data.decoding import UnusableError, decode_image, decode_label
from mfm_dist.data.index import scan_tar
from mfm_dist.data.manifest import MANIFEST_FILE, UNFINISHED_FILE, Manifest, ShardRecord, index_path, statistics_path
from mfm_dist.errors import DataError
from mfm_dist.storage import sha256_of


@dataclass
class ShardCheck:
    """What was found in one shard."""

    file: str
    problems: list[str] = field(default_factory=list)
    """What is wrong with its files and with what the manifest says of it."""
    bad: dict[str, str] = field(default_factory=dict)
    """Samples that cannot be used: key -> reason."""
    is_written_tar: bool = False
    """Whether the tar is, byte for byte, the one that was written."""
    image_sizes: dict[str, int] = field(default_factory=dict)
    """As in ``ShardRecord``, of the samples that can be used."""
    pixel_counts: dict[str, int] = field(default_factory=dict)
    """Likewise."""
    class_counts: np.ndarray = field(default_factory=lambda: np.empty((0, 0), dtype=np.uint32))
    """uint32 [samples, classes] of the samples that can be used."""

    def is_well(self) -> bool:
        return not self.problems and not self.bad


def open_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder.

    Raises:
        DataError: it is unreadable, or the folder is unfinished.
    """
    if not (folder / MANIFEST_FILE).is_file():
        raise DataError(f"{folder} is unfinished: there is {UNFINISHED_FILE} but no {MANIFEST_FILE}")
    return Manifest.read(folder / MANIFEST_FILE)


def check_manifest(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the folder as a whole."""
    problems = []
    names = {record.file for record in manifest.shards}
    strangers = sorted(path.name for path in folder.glob("*.tar") if path.name not in names)
    if strangers:
        problems.append(f"{folder}: {MANIFEST_FILE} does not know {', '.join(strangers)}")
    planned = manifest.recipe.arguments.get("samples")
    if planned is not None and planned != manifest.samples + len(manifest.left_out):
        problems.append(
            f"{folder}: {planned} samples were planned; {MANIFEST_FILE} has {manifest.samples} "
            f"and names {len(manifest.left_out)} as left out"
        )
    return problems


def check_shard(folder: Path, record: ShardRecord, class_names: tuple[str, ...]) -> ShardCheck:
    """Compares a tar, its index, its class statistics and its record, and decodes every sample."""
    tar = folder / record.file
    check = ShardCheck(record.file)
    if not tar.is_file():
        check.problems.append(f"{tar} is missing")
        return check
    if (size := tar.stat().st_size) != record.bytes:
        state = "truncated" if size < record.bytes else "not the file that was written"
        check.problems.append(f"{tar} is {state}: it has {size} bytes, {record.bytes} were written")
    check.is_written_tar = sha256_of(tar) == record.sha256
    if not check.is_written_tar:
        check.problems.append(f"{tar}: its SHA-256 is not the one in {MANIFEST_FILE}")
    scan = scan_tar(tar)
    check.problems += [str(damage) for damage in scan.bad]
    rows = written_index(tar, record)
    if rows is None:
        check.problems.append(f"{index_path(tar)} is missing or not the one that was written (wrong SHA-256)")
        rows = scan.rows
    elif not np.array_equal(rows, scan.rows):
        check.problems.append(f"{tar}: its index differs from its contents")
    _check_samples(tar, rows, record, class_names, check)
    if len(rows) != record.samples:
        check.problems.append(f"{tar}: {MANIFEST_FILE} counts {record.samples} samples, there are {len(rows)}")
    if not check.bad and (check.image_sizes != record.image_sizes or check.pixel_counts != record.pixel_counts):
        check.problems.append(f"{tar}: {MANIFEST_FILE} counts other pixels or sizes")
    if record.has_classes and not check.bad and not _statistics_are(tar, record, check.class_counts):
        check.problems.append(f"{statistics_path(tar)} is missing or does not count the pixels of the labels")
    return check


def written_index(tar: Path, record: ShardRecord) -> np.ndarray | None:
    """The index that was written with a tar; None where it is gone or damaged."""
    try:
        content = index_path(tar).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest() != record.index_sha256:
        return None
    rows: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return rows


def _statistics_are(tar: Path, record: ShardRecord, counts: np.ndarray) -> bool:
    try:
        content = statistics_path(tar).read_bytes()
    except OSError:
        return False
    if hashlib.sha256(content).hexdigest() != record.classes_sha256:
        return False
    return np.array_equal(np.load(io.BytesIO(content), allow_pickle=False), counts)


def _check_samples(
    tar: Path, rows: np.ndarray, record: ShardRecord, class_names: tuple[str, ...], check: ShardCheck
) -> None:
    """Decodes every sample and counts what the manifest counts."""
    sizes: Counter[str] = Counter()
    pixels = np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
    by_sample = []
    for key, found in read_rows(tar, rows, len(class_names), labelled=bool(record.pixel_counts)):
        if isinstance(found, str):
            check.bad[key] = found
            continue
        if found.trouble:
            check.problems.append(f"{tar}, sample {key!r}: {found.trouble}")
        sizes["x".join(map(str, found.image.shape[1:]))] += 1
        label = None if found.label is None else found.label.numpy()
        by_sample.append(count_pixels(label, len(class_names)))
        if label is not None:
            pixels += np.bincount(label.ravel(), minlength=len(pixels))
    check.image_sizes = dict(sorted(sizes.items()))
    if pixels.any():
        named = {name: int(pixels[train_id]) for train_id, name in enumerate(class_names)}
        check.pixel_counts = {**named, "ignore": int(pixels[IGNORE_INDEX])}
    check.class_counts = np.array(by_sample, dtype=np.uint32).reshape(-1, len(class_names))


class Content(NamedTuple):
    """One sample as it lies in a tar, and decoded."""

    image_format: str
    image_file: bytes
    image: Tensor
    """uint8 [3, H, W]."""
    label: Tensor | None
    """uint8 [H, W]."""
    meta: bytes
    """Its description; empty where it has none, or a damaged one."""
    trouble: str
    """What is wrong with the description, which no training reads."""


def read_rows(tar: Path, rows: np.ndarray, num_classes: int, *, labelled: bool) -> Iterator[tuple[str, Content | str]]:
    """Key and content of each sample of an index, or why it cannot be used."""
    with open(tar, "rb") as file:
        for row in rows:
            key = row["key"].decode(errors="surrogateescape")
            try:
                yield key, _read_row(file, row, num_classes, labelled)
            except UnusableError as error:
                yield key, str(error)


def _read_row(file: BinaryIO, row: np.void, num_classes: int, labelled: bool) -> Content:
    image_format = row["image_format"].decode()
    image_file = _payload(file, row["image"], "image")
    image = decode_image(_array(image_file), image_format)
    label = None
    if labelled or row["label"]["offset"] >= 0:
        payload = _array(_payload(file, row["label"], "label"))
        label = decode_label(payload, num_classes, (image.shape[1], image.shape[2]))
    meta, trouble = b"", ""
    if row["meta"]["offset"] >= 0:
        try:
            meta = _payload(file, row["meta"], "description")
        except UnusableError as error:
            trouble = str(error)
    return Content(image_format, image_file, image, label, meta, trouble)


def _payload(file: BinaryIO, member: np.void, what: str) -> bytes:
    offset, size, crc32 = member.item()
    if offset < 0:
        raise UnusableError(f"it has no {what}")
    if size == 0:
        raise UnusableError(f"its {what} is empty")
    payload = os.pread(file.fileno(), size, offset)
    if len(payload) != size:
        raise UnusableError(f"the shard ends inside its {what}: {len(payload)} of {size} bytes")
    if zlib.crc32(payload) != crc32:
        raise UnusableError(f"its {what} differs from what was written (wrong CRC-32)")
    return payload


def _array(payload: bytes) -> np.ndarray:
    """uint8 [size], writable, as torch wants it."""
    return np.frombuffer(bytearray(payload), dtype=np.uint8)
