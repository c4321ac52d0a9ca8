"""Random access to the samples of a shard folder, checked on the way in."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mfm_dist.batch import BadSample
from mfm_dist.data.class_statistics import read_statistics
from mfm_dist.data.decoding import UnusableError, decode_image, decode_label, header_size, jpeg_decoder
from mfm_dist.data.index import DatasetIndex
from mfm_dist.data.manifest import ShardRecord
from mfm_dist.errors import DataError

OPEN_FILES = 128
"""Shards a reader keeps open; a process may usually hold 1024 files."""


@dataclass(frozen=True)
class Sample:
    """One decoded sample."""

    key: str
    image: Tensor
    """uint8 [3, H, W], RGB; a view of rows of triples."""
    label: Tensor | None
    """uint8 [H, W], train ids or ``IGNORE_INDEX``; None where it was not asked for."""


class SampleError(DataError):
    """One sample cannot be used.

    Attributes:
        bad: which sample, and why.
    """

    def __init__(self, bad: BadSample) -> None:
        self.bad = bad
        super().__init__(bad)

    def __str__(self) -> str:
        return str(self.bad)


def open_tar(tar: Path, record: ShardRecord) -> int:  # noqa: ARG001  a copy would be found by it
    """A descriptor of a shard where it lies. Raises OSError."""
    return os.open(tar, os.O_RDONLY)


class ShardReader:
    """The samples of one folder by number.

    Files are opened when first read and never travel to another process. A forked worker may go on using those its
    parent had open, because ``pread`` neither moves nor needs the shared file offset.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        decoder: str = "torchvision",
        bad_limit: float = 0.0,
        open_shard: Callable[[Path, ShardRecord], int] = open_tar,
    ) -> None:
        """
        Args:
            decoder: ``torchvision`` or ``simplejpeg``.
            bad_limit: share of the samples that may be lost with missing or truncated shards.
            open_shard: gives a descriptor of a shard, or of a copy of it (``staging``).

        Raises:
            What ``DatasetIndex.open`` and ``jpeg_decoder`` raise.
        """
        self._files: OrderedDict[int, int] = OrderedDict()
        self._decoder = decoder
        self._decode_jpeg = jpeg_decoder(decoder)
        self._open_shard = open_shard
        self.index = DatasetIndex.open(Path(folder), bad_limit=bad_limit)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_classes(self) -> int:
        return len(self.index.manifest.class_names)

    @property
    def fingerprint(self) -> str:
        """Two data sets share it if every number is the same sample."""
        return self.index.manifest.fingerprint

    def class_statistics(self) -> np.ndarray:
        """uint32 [samples, classes]: pixels of each class. Raises what ``read_statistics`` raises."""
        return read_statistics(self.index.folder, self.index.manifest)

    def read(self, number: int, *, with_label: bool = True) -> Sample:
        """Reads, verifies and decodes sample ``number``.

        Raises:
            SampleError: the bytes differ from those written, do not decode, or the label is missing or impossible.
        """
        shard, row = self.index.locate(number)
        # One call for the whole row; each field by itself would cost as much.
        name, image_format, image_at, label_at, _ = self.index.rows[shard][row].item()
        key = name.decode(errors="replace")
        try:
            encoded, kind = self._bytes(shard, image_at, "image"), image_format.decode()
            label = None
            if with_label:
                payload = self._bytes(shard, label_at, "label")
                # Where the writer counted the pixels of each class and the bytes are the same, no id is wrong.
                counted = bool(self.index.manifest.shards[shard].pixel_counts)
                num_classes = None if counted else self.num_classes
                label = decode_label(payload, num_classes, header_size(encoded, kind, "image"))
            image = decode_image(encoded, kind, self._decode_jpeg)
        except UnusableError as error:
            tar = self.index.folder / self.index.manifest.shards[shard].file
            raise SampleError(BadSample(shard=str(tar), key=key, number=number, reason=str(error))) from error
        return Sample(key=key, image=image, label=label)

    def _bytes(self, shard: int, member: tuple[int, int, int], what: str) -> np.ndarray:
        """The payload of one member, given by offset, size and CRC-32: uint8 [size]."""
        offset, size, crc32 = member
        if offset < 0:
            raise UnusableError(f"it has no {what}")
        if size == 0:
            raise UnusableError(f"its {what} is empty")
        try:
            payload = np.empty(size, dtype=np.uint8)
            count = self._fill(shard, payload, offset)
        except (OSError, MemoryError) as error:
            raise UnusableError(f"its {what} cannot be read ({error})") from error
        if count != size:
            raise UnusableError(f"the shard ends inside its {what}: {count} of {size} bytes")
        if zlib.crc32(payload.data) != crc32:
            raise UnusableError(f"its {what} differs from what was written (wrong CRC-32)")
        return payload

    def _fill(self, shard: int, payload: np.ndarray, offset: int) -> int:
        """Reads a shard from ``offset`` on; returns how many bytes there were. Raises OSError, the second time."""
        try:
            return os.preadv(self._file(shard), [payload.data], offset)
        except OSError:  # a disk on the network may be back, and its old descriptors stale
            self._close(shard)
            return os.preadv(self._file(shard), [payload.data], offset)

    def _file(self, shard: int) -> int:
        """The descriptor of a shard; the least recently used is closed when too many are open."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._close(next(iter(self._files)))
            record = self.index.manifest.shards[shard]
            self._files[shard] = self._open_shard(self.index.folder / record.file, record)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _close(self, shard: int) -> None:
        if shard in self._files:
            os.close(self._files.pop(shard))

    def close(self) -> None:
        for shard in list(self._files):
            self._close(shard)

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "decoder": self._decoder, "open_shard": self._open_shard}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.index = state["index"]
        self._files = OrderedDict()
        self._decoder = state["decoder"]
        self._decode_jpeg = jpeg_decoder(self._decoder)
        self._open_shard = state["open_shard"]
