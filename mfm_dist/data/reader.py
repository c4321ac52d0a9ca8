"""Random access to the samples of a shard folder, checked on the way in."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from mfm_dist.batch import BadSample
from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.index import DatasetIndex
from mfm_dist.errors import DataError

OPEN_FILES = 128
"""Shards a reader keeps open; a process may usually hold 1024 files."""


@dataclass(frozen=True)
class Sample:
    """One decoded sample."""

    key: str
    image: Tensor
    """uint8 [3, H, W], RGB."""
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


class ShardReader:
    """The samples of one folder by number.

    Files are opened when first read and never travel to another process. A forked worker may go on using those its
    parent had open, because ``pread`` neither moves nor needs the shared file offset.
    """

    def __init__(self, folder: Path | str) -> None:
        """Raises what ``DatasetIndex.open`` raises."""
        self._files: OrderedDict[int, int] = OrderedDict()
        self.index = DatasetIndex.open(Path(folder))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_classes(self) -> int:
        return len(self.index.manifest.class_names)

    def read(self, number: int, *, with_label: bool = True) -> Sample:
        """Reads, verifies and decodes sample ``number``.

        Raises:
            SampleError: the bytes differ from those written, do not decode, or the label is missing or impossible.
        """
        shard, row_number = self.index.locate(number)
        row = self.index.rows[shard][row_number]
        try:
            image = _decode_image(self._bytes(shard, row["image"], "image"), row["image_format"].decode())
            label = None
            if with_label:
                label = _decode_label(self._bytes(shard, row["label"], "label"))
                _check_label(label, image, self.num_classes)
        except _UnusableError as error:
            tar = self.index.folder / self.index.manifest.shards[shard].file
            raise SampleError(
                BadSample(shard=str(tar), key=row["key"].decode(), number=number, reason=str(error))
            ) from error
        return Sample(key=row["key"].decode(), image=image, label=label)

    def _bytes(self, shard: int, member: np.void, what: str) -> Tensor:
        """The payload of one member, uint8 [size]."""
        offset, size = int(member["offset"]), int(member["size"])
        if offset < 0:
            raise _UnusableError(f"it has no {what}")
        if size == 0:
            raise _UnusableError(f"its {what} is empty")
        payload = bytearray(size)
        try:
            count = os.preadv(self._file(shard), [payload], offset)
        except OSError as error:
            raise _UnusableError(f"its {what} cannot be read ({error})") from error
        if count != size:
            raise _UnusableError(f"the shard ends inside its {what}: {count} of {size} bytes")
        if zlib.crc32(payload) != member["crc32"]:
            raise _UnusableError(f"its {what} differs from what was written (wrong CRC-32)")
        return torch.frombuffer(payload, dtype=torch.uint8)

    def _file(self, shard: int) -> int:
        """The descriptor of a shard; the least recently used is closed when too many are open."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.index.folder / self.index.manifest.shards[shard].file, os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_files": OrderedDict()}


class _UnusableError(Exception):
    """Why a sample cannot be used; ``read`` adds which one it is."""


def _decode_image(payload: Tensor, image_format: str) -> Tensor:
    """uint8 [size] -> uint8 [3, H, W]."""
    decode = decode_jpeg if image_format == "jpg" else decode_png
    try:
        image = decode(payload, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise _UnusableError(f"its image is no readable {image_format} ({_first_line(error)})") from error
    if image.dtype != torch.uint8:
        raise _UnusableError(f"its image has {image.dtype} pixels; 8 bits a channel are needed")
    return image


def _decode_label(payload: Tensor) -> Tensor:
    """uint8 [size] -> uint8 [H, W]."""
    try:
        label = decode_png(payload, mode=ImageReadMode.UNCHANGED)
    except RuntimeError as error:
        raise _UnusableError(f"its label is no readable png ({_first_line(error)})") from error
    if label.shape[0] != 1 or label.dtype != torch.uint8:
        raise _UnusableError(f"its label has {label.shape[0]} channels of {label.dtype}; one of 8 bits is needed")
    return label[0]


def _check_label(label: Tensor, image: Tensor, num_classes: int) -> None:
    if label.shape != image.shape[1:]:
        sizes = [f"{height}x{width}" for height, width in (label.shape, image.shape[1:])]
        raise _UnusableError(f"its label is {sizes[0]} pixels and its image {sizes[1]} (height x width)")
    unknown = (label >= num_classes) & (label != IGNORE_INDEX)
    if unknown.any():
        ids = ", ".join(str(i) for i in label[unknown].unique().tolist())
        raise _UnusableError(f"its label holds class ids {ids}; allowed are 0 to {num_classes - 1} and {IGNORE_INDEX}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
