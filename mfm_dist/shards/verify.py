"""Checks a folder of shards byte by byte and sample by sample; damage in one place hides none in another."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mfm_dist.data.class_statistics import PixelCounts
from mfm_dist.data.index import index_problem, scan_tar
from mfm_dist.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    index_path,
    read_sidecar,
    size_problem,
    statistics_path,
)
from mfm_dist.data.reader import decode_sample, read_member, reads_of
from mfm_dist.data.shard_records import ShardRecord
from mfm_dist.errors import CorruptFileError
from mfm_dist.storage import open_regular, sha256_of


@dataclass
class ShardCheck:
    """What was found in one shard."""

    file: str
    problems: list[str] = field(default_factory=list)
    """What is wrong with its files and with what the manifest says of it."""
    bad: dict[str, str] = field(default_factory=dict)
    """Samples that cannot be used: key -> reason."""


def check_manifest(folder: Path, manifest: Manifest) -> list[str]:
    """Say what is wrong with the folder as a whole."""
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
    """Compare a tar, its index, its class statistics and its record, and decode every sample."""
    tar = folder / record.file
    check = ShardCheck(record.file)
    if problem := size_problem(tar, record):
        check.problems.append(problem)
    if not tar.is_file():
        return check
    if sha256_of(tar) != record.sha256:
        check.problems.append(f"{tar}: its SHA-256 is not the one in {MANIFEST_FILE}")
    scan = scan_tar(tar)
    check.problems += [str(bad) for bad in scan.bad]
    try:
        rows = read_sidecar(index_path(tar), record.index_sha256)
        if problem := index_problem(rows, record.bytes):
            raise CorruptFileError(f"{index_path(tar)} is no index of a tar: {problem}")
        if not np.array_equal(rows, scan.rows):
            check.problems.append(f"{tar}: its index differs from its contents")
    except CorruptFileError as error:
        check.problems.append(str(error))
        rows = scan.rows
    counts = _check_samples(tar, rows, record, class_names, check)
    if len(rows) != record.samples:
        check.problems.append(f"{tar}: {MANIFEST_FILE} counts {record.samples} samples, there are {len(rows)}")
    if check.bad:
        return check
    if (counts.image_sizes, counts.pixel_counts) != (record.image_sizes, record.pixel_counts):
        check.problems.append(f"{tar}: {MANIFEST_FILE} counts other pixels or sizes")
    if record.has_classes:
        try:
            if not np.array_equal(read_sidecar(statistics_path(tar), record.classes_sha256), counts.classes):
                check.problems.append(f"{statistics_path(tar)} does not count the pixels of the labels")
        except CorruptFileError as error:
            check.problems.append(str(error))
    return check


def _check_samples(
    tar: Path, rows: np.ndarray, record: ShardRecord, class_names: tuple[str, ...], check: ShardCheck
) -> PixelCounts:
    """Decode every sample and count what the manifest counts."""
    counts = PixelCounts(class_names)
    with open_regular(tar) as file:
        read_into = reads_of(file)
        for row in rows:
            name, image_format, image_at, label_at, meta_at = row.item()
            key = name.decode(errors="surrogateescape")
            try:
                image = read_member(read_into, image_at, "image")
                labelled = record.pixel_counts or label_at[0] >= 0
                label = read_member(read_into, label_at, "label") if labelled else None
                sample = decode_sample(key, image_format.decode(), image, label, len(class_names))
            except CorruptFileError as error:
                check.bad[key] = str(error)
                continue
            counts.add(tuple(sample.image.shape[1:]), None if sample.label is None else sample.label.numpy())
            if meta_at[0] >= 0:
                try:
                    read_member(read_into, meta_at, "description")
                except CorruptFileError as error:  # no training reads it
                    check.problems.append(f"{tar}, sample {key!r}: {error}")
    return counts
