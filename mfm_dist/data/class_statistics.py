"""How many pixels of each class every sample holds, which is what rare class sampling draws by.

Beside ``000000.tar`` lies ``000000.classes.npy``: uint32 [samples, classes], one row a sample in the order of the
tar, counted at the stored size; pixels without a class are not counted, a sample without a label is a row of zeros.
A shard without any label has no such file. ``ShardRecord.classes_sha256`` says what was written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.manifest import Manifest, read_sidecar, remake_hint, statistics_path, write_sidecar
from mfm_dist.data.shard_records import ShardRecord
from mfm_dist.errors import CorruptFileError, DataError


class PixelCounts:
    """Counts, sample by sample, what the manifest and the class statistics say of a shard."""

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self._class_names = class_names
        self._sizes: Counter[str] = Counter()
        self._ids: list[np.ndarray] = []

    def add(self, size: tuple[int, ...], label: np.ndarray | None) -> None:
        """Count one sample by height and width, and the ids of its label, uint8 [H, W], if it has one."""
        self._sizes["x".join(map(str, size))] += 1
        none = np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
        self._ids.append(none if label is None else np.bincount(label.ravel(), minlength=len(none)))

    @property
    def image_sizes(self) -> dict[str, int]:
        """As in ``ShardRecord``."""
        return dict(sorted(self._sizes.items()))

    @property
    def pixel_counts(self) -> dict[str, int]:
        """As in ``ShardRecord``."""
        pixels = np.array(self._ids, dtype=np.int64).reshape(-1, IGNORE_INDEX + 1).sum(axis=0)
        if not pixels.any():
            return {}
        counts = {name: int(pixels[train_id]) for train_id, name in enumerate(self._class_names)}
        return {**counts, "ignore": int(pixels[IGNORE_INDEX])}

    @property
    def classes(self) -> np.ndarray:
        """uint32 [samples, classes], the class statistics."""
        ids = np.array(self._ids, dtype=np.uint32).reshape(-1, IGNORE_INDEX + 1)
        return np.ascontiguousarray(ids[:, : len(self._class_names)])


def write_statistics(tar: Path, counts: np.ndarray) -> str:
    """Write the class statistics of a finished tar, if it has labels. Raises DiskFullError.

    Args:
        counts: uint32 [samples, classes], in the order of the tar.

    Returns:
        SHA-256 of the file, for ``ShardRecord.classes_sha256``; "" where no label was counted.
    """
    if counts.any():
        return write_sidecar(statistics_path(tar), counts)
    statistics_path(tar).unlink(missing_ok=True)
    return ""


def read_statistics(folder: Path, manifest: Manifest) -> Iterator[np.ndarray]:
    """Read the statistics of a whole folder, uint32 [samples, classes], shard by shard.

    Raises:
        DataError: shards without statistics, or with damaged ones; all are named once the others were given, and the
            command that mends them.
    """
    problems = []
    for record in manifest.shards:
        try:
            yield _read_shard(folder / record.file, record, len(manifest.class_names))
        except CorruptFileError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join([*problems, f"The command that adds them: {remake_hint(folder, manifest)}"]))


def _read_shard(tar: Path, record: ShardRecord, num_classes: int) -> np.ndarray:
    """Read the statistics of one shard. Raises CorruptFileError."""
    nothing = np.zeros((record.samples, num_classes), dtype=np.uint32)
    path = statistics_path(tar)
    if record.pixel_counts and not record.has_classes:
        return nothing
    if not record.classes_sha256:
        why = "its shard was made before they were counted" if record.has_classes else "its shard holds no labels"
        raise CorruptFileError(f"{path} does not exist: {why}")
    counts = read_sidecar(path, record.classes_sha256)
    if counts.shape != nothing.shape or counts.dtype != nothing.dtype:
        raise CorruptFileError(f"{path} holds {counts.dtype} {counts.shape}, not uint32 {nothing.shape}")
    return counts
