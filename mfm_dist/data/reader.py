"""Random access to the samples of a shard folder, checked on the way in."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mfm_dist.classes import ClassSet
from mfm_dist.data.class_statistics import read_statistics
from mfm_dist.data.decoding import (
    JpegDecoder,
    decode_image,
    decode_label,
    header_size,
    jpeg_decoder,
    torchvision_jpeg,
)
from mfm_dist.data.index import DatasetIndex, wrong_name
from mfm_dist.data.shard_records import ShardRecord
from mfm_dist.errors import BadSample, ConfigError, CorruptFileError
from mfm_dist.storage import regular_descriptor

OPEN_FILES = 128
"""Shards a reader keeps open; a process may usually hold 1024 files."""


@dataclass(frozen=True)
class Sample:
    """One decoded sample."""

    key: str
    image: Tensor
    """uint8 [3, H, W], RGB; a view of rows of triples."""
    label: Tensor | None
    """uint8 [H, W], indices of classes or ``IGNORE_INDEX``; None where it was not asked for."""


ReadInto = Callable[[memoryview, int], int]
"""Fills a buffer from an offset of a tar on, as ``os.preadv``; returns how many bytes there were."""
Place = tuple[int, int, int]
"""Offset, size and CRC-32 of a member, as in a row of the index."""


def read_member(read_into: ReadInto, place: Place, what: str) -> np.ndarray:
    """Read a member of a tar and compare it with what was written: uint8 [size].

    Args:
        what: the member is, for the error.

    Raises:
        CorruptFileError: it is not there, or not as it was written.
    """
    offset, size, crc32 = place
    if offset < 0:
        raise CorruptFileError(f"it has no {what}")
    if size == 0:
        raise CorruptFileError(f"its {what} is empty")
    try:
        payload = np.empty(size, dtype=np.uint8)
        count = read_into(payload.data, offset)
    except (OSError, MemoryError) as error:
        raise CorruptFileError(f"its {what} cannot be read ({error})") from error
    if count != size:
        raise CorruptFileError(f"the shard ends inside its {what}: {count} of {size} bytes")
    if zlib.crc32(payload.data) != crc32:
        raise CorruptFileError(f"its {what} differs from what was written (wrong CRC-32)")
    return payload


def reads_of(file: BinaryIO) -> ReadInto:
    """Return how to read an open tar."""
    return lambda payload, offset: os.preadv(file.fileno(), [payload], offset)


def decode_sample(
    key: str,
    image_format: str,
    image: np.ndarray,
    label: np.ndarray | None,
    num_classes: int | None,
    decode: JpegDecoder = torchvision_jpeg,
) -> Sample:
    """Decode image and label (None: no label), uint8 [size] each, as ``decode_image`` and ``decode_label`` do."""
    decoded = None
    if label is not None:
        decoded = decode_label(label, num_classes, header_size(image, image_format, "image"))
    return Sample(key=key, image=decode_image(image, image_format, decode), label=decoded)


def open_tar(tar: Path, record: ShardRecord) -> int:  # noqa: ARG001  a copy would be found by it
    """Open a shard where it lies; return its descriptor. Raises what ``regular_descriptor`` does."""
    return regular_descriptor(tar)


class ShardReader:
    """The samples of one folder by number.

    Files are opened when first read and never travel to another process. A forked worker may go on using those its
    parent had open, because ``pread`` neither moves nor needs the shared file offset.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        classes: ClassSet | None = None,
        decoder: str = "torchvision",
        bad_limit: float = 0.0,
        open_shard: Callable[[Path, ShardRecord], int] = open_tar,
    ) -> None:
        """
        Args:
            classes: what labels and class statistics are to be in; None: in those of the shards.
            decoder: ``torchvision`` or ``simplejpeg``.
            bad_limit: share of the samples that may be lost with missing or truncated shards.
            open_shard: gives a descriptor of a shard, or of a copy of it (``staging``).

        Raises:
            ConfigError: no class of the shards is one of ``classes``.
            What ``DatasetIndex.open`` and ``jpeg_decoder`` raise.
        """
        self._files: OrderedDict[int, int] = OrderedDict()
        self._decode_jpeg = jpeg_decoder(decoder)
        self._open_shard = open_shard
        self.index = DatasetIndex.open(Path(folder), bad_limit=bad_limit)
        stored = self.index.manifest.label_classes
        self.classes = classes or stored
        """Of the labels that it gives; None where there are none and nothing was said."""
        self.relabelling = classes.relabelling(stored) if classes and stored else None
        """What becomes of the stored labels; None where they stay."""
        if self.relabelling is not None and not self.relabelling.matches:
            raise ConfigError(
                f"{folder}: none of its classes is, or is merged into, one that is asked for:\n"
                f"    stored {stored}\n    asked for {classes}"
            )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        """Two data sets share it if every number is the same sample."""
        return self.index.manifest.fingerprint

    @property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1], number of the first sample of each shard, and the count of all."""
        return self.index.starts

    @property
    def relabelling_fingerprint(self) -> str:
        """Of what becomes of the stored labels; "" where they stay."""
        return "" if self.relabelling is None else self.relabelling.fingerprint

    def class_statistics(self) -> Iterator[np.ndarray]:
        """Count the pixels of each class, shard by shard, as ``read_statistics`` does, with its errors."""
        for counts in read_statistics(self.index.folder, self.index.manifest):
            yield counts if self.relabelling is None else self.relabelling.sum_counts(counts)

    def read(self, number: int, *, with_label: bool = True) -> Sample | BadSample:
        """Read, verify and decode sample ``number``.

        Returns:
            a ``BadSample`` if the bytes differ from those written, do not decode, or the label is missing or
            impossible; without a key if the index of its shard is damaged.
        """
        shard, row = self.index.locate(number)
        record = self.index.manifest.shards[shard]
        key = ""
        # Where the writer counted the pixels of each class and the bytes are the same, no id is wrong.
        num_classes = None if record.pixel_counts else len(self.index.manifest.class_names)
        read_into = partial(self.read_into, shard)
        try:
            # One call for the whole row; each field by itself would cost as much.
            name, image_format, image_at, label_at, _ = self.index.rows[shard][row].item()
            key = name.decode(errors="replace")
            if problem := wrong_name(key, key):  # an index of any origin; files are named by what it says
                raise CorruptFileError(problem)
            image = read_member(read_into, image_at, "image")
            label = read_member(read_into, label_at, "label") if with_label else None
            sample = decode_sample(key, image_format.decode(), image, label, num_classes, self._decode_jpeg)
        except CorruptFileError as error:
            tar = self.index.folder / record.file
            return BadSample(shard=str(tar), key=key, number=number, reason=str(error))
        if sample.label is None or self.relabelling is None:
            return sample
        return replace(sample, label=torch.from_numpy(self.relabelling.apply(sample.label.numpy())))

    def read_into(self, shard: int, payload: memoryview, offset: int) -> int:
        """Read a shard from ``offset`` on; return how many bytes there were. Raises OSError, the second time."""
        try:
            return os.preadv(self._file(shard), [payload], offset)
        except OSError:  # a disk on the network may be back, and its old descriptors stale
            self._close(shard)
            return os.preadv(self._file(shard), [payload], offset)

    def _file(self, shard: int) -> int:
        """Return the descriptor of a shard; the least recently used is closed when too many are open."""
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
        """Give a copy files and held indexes of its own: it may be for another thread."""
        index = replace(self.index, rows=copy(self.index.rows))
        return {**self.__dict__, "_files": OrderedDict(), "index": index}
