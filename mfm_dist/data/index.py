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
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mfm_dist.data.manifest import MANIFEST_FILE, UNFINISHED_FILE, Manifest, ShardRecord, index_path, remake_hint
from mfm_dist.data.tar_scan import IMAGE_EXTENSIONS as IMAGE_EXTENSIONS
from mfm_dist.data.tar_scan import LABEL_EXTENSION as LABEL_EXTENSION
from mfm_dist.data.tar_scan import META_EXTENSION as META_EXTENSION
from mfm_dist.data.tar_scan import index_dtype, scan_tar
from mfm_dist.errors import ConfigError, DataError


def build_index(tar: Path) -> np.ndarray:
    """The index of a tar that is whole, one row of ``index_dtype`` for each sample in the order of the file.

    Raises:
        DataError: the tar or its structure is damaged; ``scan_tar`` tells what can still be used.
    """
    found = scan_tar(tar)
    if found.bad:
        raise DataError(str(found.bad[0]))
    return found.rows


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
    def open(cls, folder: Path, *, bad_limit: float = 0.0) -> DatasetIndex:
        """Opens a finished folder and checks everything that costs no read of the tars.

        Args:
            bad_limit: share of the samples that may be lost with missing or truncated shards; reading one of them
                tells that it is.

        Raises:
            ConfigError: there is no such folder.
            DataError: it is unfinished, its manifest or an index is unreadable, or shards are missing or truncated
                beyond the limit (all named).
        """
        manifest = Manifest.read(_manifest_of(folder))
        problems: list[str] = []
        rows = [_open_index(folder, record, problems) for record in manifest.shards]
        losses = [_lost(folder / one.file, one, part) for one, part in zip(manifest.shards, rows, strict=True)]
        damaged = [loss.reason for loss in losses if loss.reason]
        lost = sum(loss.samples for loss in losses)
        if damaged and (bad_limit == 0 or lost > bad_limit * manifest.samples):
            problems = sorted([*damaged, *problems])
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
        shard = bisect_right(self.starts, number) - 1
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


class _Loss(NamedTuple):
    """What is certainly gone from a shard, and why; nothing where the file is the size it should be."""

    samples: int
    reason: str


def _lost(tar: Path, record: ShardRecord, rows: np.ndarray) -> _Loss:
    if not tar.is_file():
        return _Loss(record.samples, f"{tar} is missing")
    size = tar.stat().st_size
    if size == record.bytes:
        return _Loss(0, "")
    state = "truncated" if size < record.bytes else "not the file that was written"
    ends = np.maximum(*(rows[member]["offset"] + rows[member]["size"] for member in ("image", "label")))
    reason = f"{tar} is {state}: it has {size} bytes, {record.bytes} were written"
    return _Loss(int((ends > size).sum()), reason)


def _open_index(folder: Path, record: ShardRecord, problems: list[str]) -> np.ndarray:
    """The index of one shard; what is wrong with it is added to ``problems``."""
    index = index_path(folder / record.file)
    try:
        content = index.read_bytes()
    except OSError as error:
        problems.append(f"{index} cannot be read ({error.strerror})")
        return np.empty(0, dtype=index_dtype(1))
    if hashlib.sha256(content).hexdigest() != record.index_sha256:
        problems.append(f"{index} is damaged: it differs from what was written (wrong SHA-256)")
        return np.empty(0, dtype=index_dtype(1))
    rows: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    if len(rows) != record.samples:
        problems.append(f"{index} has {len(rows)} samples, {record.samples} were written")
    return rows
