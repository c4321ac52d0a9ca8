"""How many pixels of each class every sample holds, which is what rare class sampling draws by.

Beside ``000000.tar`` lies ``000000.classes.npy``: uint32 [samples, classes], one row a sample in the order of the
tar, counted at the stored size; pixels without a class are not counted, a sample without a label is a row of zeros.
A shard without any label has no such file. ``ShardRecord.classes_sha256`` says what was written.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.manifest import Manifest, ShardRecord, remake_hint, statistics_path
from mfm_dist.errors import DataError
from mfm_dist.storage import atomic_file


def count_pixels(label: np.ndarray | None, num_classes: int) -> np.ndarray:
    """uint32 [num_classes]: pixels of each class in a label, uint8 [H, W]; zeros where there is no label."""
    if label is None:
        return np.zeros(num_classes, dtype=np.uint32)
    return np.bincount(label.ravel(), minlength=IGNORE_INDEX + 1)[:num_classes].astype(np.uint32)


def write_statistics(tar: Path, counts: np.ndarray) -> str:
    """Writes the class statistics of a finished tar, if it has labels.

    Args:
        counts: uint32 [samples, classes], rows of ``count_pixels`` in the order of the tar.

    Returns:
        SHA-256 of the file, for ``ShardRecord.classes_sha256``; "" where no label was counted.

    Raises:
        StorageError: the disk is full.
    """
    path = statistics_path(tar)
    if not counts.any():
        path.unlink(missing_ok=True)
        return ""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(counts, dtype=np.uint32), allow_pickle=False)
    with atomic_file(path) as file:
        file.write(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_statistics(folder: Path, manifest: Manifest) -> np.ndarray:
    """uint32 [samples, classes] of a whole folder, in the order of its sample numbers.

    Raises:
        DataError: shards without statistics, or with damaged ones; all are named, and the command that mends them.
    """
    problems: list[str] = []
    parts = [
        _read_shard(folder / record.file, record, len(manifest.class_names), problems) for record in manifest.shards
    ]
    if problems:
        raise DataError("\n".join([*problems, f"The command that adds them: {remake_hint(folder, manifest)}"]))
    return np.concatenate(parts) if parts else np.empty((0, len(manifest.class_names)), dtype=np.uint32)


def _read_shard(tar: Path, record: ShardRecord, num_classes: int, problems: list[str]) -> np.ndarray:
    """The statistics of one shard; what is wrong with them is added to ``problems``."""
    nothing = np.zeros((record.samples, num_classes), dtype=np.uint32)
    path = statistics_path(tar)
    if record.pixel_counts and not record.has_classes:
        return nothing
    if not record.classes_sha256:
        why = "its shard was made before they were counted" if record.has_classes else "its shard holds no labels"
        problems.append(f"{path} does not exist: {why}")
        return nothing
    try:
        content = path.read_bytes()
    except OSError as error:
        problems.append(f"{path} cannot be read ({error.strerror})")
        return nothing
    if hashlib.sha256(content).hexdigest() != record.classes_sha256:
        problems.append(f"{path} is damaged: it differs from what was written (wrong SHA-256)")
        return nothing
    try:
        counts: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        problems.append(f"{path} is not a readable array ({error})")
        return nothing
    if counts.shape != nothing.shape or counts.dtype != nothing.dtype:
        problems.append(f"{path} holds {counts.dtype} {counts.shape}, not uint32 {nothing.shape}")
        return nothing
    return counts


def count_shard(tar: Path, rows: np.ndarray, num_classes: int) -> np.ndarray:
    """The statistics of a tar from its labels: uint32 [samples, classes]. Decodes every label.

    Args:
        rows: the index of the tar, ``index_dtype``.

    Raises:
        DataError: a label cannot be decoded.
    """
    import torch  # here, because packing starts without torch
    from torchvision.io import ImageReadMode, decode_png

    counts = np.zeros((len(rows), num_classes), dtype=np.uint32)
    with open(tar, "rb") as file:
        for number, row in enumerate(rows):
            offset, size, _ = row["label"].tolist()
            if offset < 0:
                continue
            payload = torch.frombuffer(bytearray(os.pread(file.fileno(), size, offset)), dtype=torch.uint8)
            try:
                label = decode_png(payload, mode=ImageReadMode.UNCHANGED)
            except RuntimeError as error:
                raise DataError(f"{tar}, sample {row['key'].decode()!r}: its label is no readable png") from error
            counts[number] = count_pixels(label.numpy()[0], num_classes)
    return counts
