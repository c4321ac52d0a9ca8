"""Pieces of tensors in safetensors files: each flat, named by its tensor and its place there, verified by chunk.

A piece is called ``student/decoder.head.weight[512:1024]``: elements 512 to 1023 of the flattened tensor. Files are
read by ``PieceReader.read`` alone, with ``os.preadv``: mapping them, as safetensors does, reads several times as much.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from mfm_dist.errors import CorruptFileError
from mfm_dist.storage import open_regular

CHUNK_BYTES = 4 << 20
"""Bytes that have a checksum of their own, the last ones of a file excepted."""
HEADER_LIMIT = 64 << 20
"""Bytes of a header at most; one of 5,000 pieces has half a million."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By the names that safetensors gives them."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = re.compile(r"(.+)\[(\d{1,18}):(\d{1,18})\]", re.DOTALL)


@dataclass(frozen=True)
class TensorSpec:
    """What a whole tensor is, without its values."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * self.dtype.itemsize

    def to_tree(self) -> list[Any]:
        """Return what JSON holds of it."""
        return [_NAMES[self.dtype], list(self.shape)]

    @classmethod
    def from_tree(cls, tree: Any) -> TensorSpec:
        """Read ``to_tree``. Raises CorruptFileError."""
        dtype, shape = tree
        if dtype not in DTYPES or not all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
            raise CorruptFileError(f"{tree!r:.80} is no type and shape of a tensor")
        return cls(DTYPES[dtype], torch.Size(shape))


class Piece(NamedTuple):
    """A part of a tensor to be written."""

    name: str
    """Of the whole tensor."""
    first: int
    """Place of the first value in the flattened whole."""
    values: Tensor
    """Flat."""


class Place(NamedTuple):
    """A part of a tensor in a file; in bytes."""

    name: str
    offset: int
    """In the flattened whole."""
    start: int
    """In the file."""
    length: int


class FileSums(NamedTuple):
    """What a file has to be."""

    size: int
    """Bytes."""
    chunks: Sequence[str]
    """SHA-256 in hex digits of every ``CHUNK_BYTES`` of it."""


def write_pieces(path: Path, pieces: Sequence[Piece]) -> FileSums:
    """Write a safetensors file of pieces, and have it on the disk when this returns."""
    specs = {
        f"{name}[{first}:{first + values.numel()}]": TensorSpec(values.dtype, values.shape)
        for name, first, values in pieces
    }
    with path.open("wb") as file:
        summed = _Summed(file)
        write_tensors(summed, specs, (values for _, _, values in pieces))
        file.flush()
        os.fsync(file.fileno())
    return summed.sums()


def write_tensors(file: BinaryIO | _Summed, specs: Mapping[str, TensorSpec], tensors: Iterable[Tensor]) -> None:
    """Write what a safetensors file holds: tensors in the order of ``specs``, which are asked for one by one."""
    header: dict[str, Any] = {}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        dtype, shape = spec.to_tree()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        file.write(as_bytes(tensor.cpu()))


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def check_cover(specs: Mapping[str, TensorSpec], held: Iterable[int]) -> None:
    """Raise CorruptFileError unless there are as many bytes of each tensor, in the same order, as it has."""
    for (name, spec), size in zip(specs.items(), held, strict=True):
        if size != spec.nbytes:
            raise CorruptFileError(f"there are {size} bytes of {name} instead of {spec.nbytes}")


class _Summed:
    """A file being written, and the checksums of what was."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0
        self._chunks: list[str] = []
        self._digest = hashlib.sha256()

    def write(self, payload: bytes | memoryview) -> None:
        payload = memoryview(payload)
        self._file.write(payload)
        while payload:
            part = payload[: CHUNK_BYTES - self._size % CHUNK_BYTES]
            self._digest.update(part)
            self._size += len(part)
            payload = payload[len(part) :]
            if self._size % CHUNK_BYTES == 0:
                self._end_chunk()

    def sums(self) -> FileSums:
        """Return what was written; call once, at the end."""
        if self._size % CHUNK_BYTES:
            self._end_chunk()
        return FileSums(self._size, self._chunks)

    def _end_chunk(self) -> None:
        self._chunks.append(self._digest.hexdigest())
        self._digest = hashlib.sha256()


class PieceReader:
    """Reads files of pieces, every chunk of them compared with its checksum before a byte of it is used.

    Of each file it keeps the chunk read last: pieces that follow one another cost no chunk twice.
    """

    def __init__(self, folder: Path, files: Mapping[str, FileSums], tensors: Mapping[str, TensorSpec]) -> None:
        self.bytes_read = 0
        self._folder = folder
        self._files = files
        self._tensors = tensors
        self._kept: dict[str, tuple[int, memoryview]] = {}

    def read(self, file: str, start: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes of a file from ``start`` on.

        Raises:
            CorruptFileError: if a chunk of it is not as it was written, or not to be read.
        """
        for number in range(start // CHUNK_BYTES, -(-(start + len(target)) // CHUNK_BYTES)):
            chunk, first = self._chunk(file, number), number * CHUNK_BYTES
            low, high = max(start, first), min(start + len(target), first + len(chunk))
            target[low - start : high - start] = chunk[low - first : high - first]

    def forget(self, file: str) -> None:
        """Drop the chunk kept of a file that nothing more is read of."""
        self._kept.pop(file, None)

    def places(self, file: str) -> list[Place]:
        """Read the header of a file: where its pieces are.

        Raises:
            CorruptFileError: if it is not as it was written, or says what no run writes.
        """
        size = self._files[file].size
        head = memoryview(bytearray(8))
        if size < len(head):
            raise CorruptFileError(f"{file} is no file of tensors")
        self.read(file, 0, head)
        length = int.from_bytes(head, "little")
        if length > min(HEADER_LIMIT, size - 8):
            raise CorruptFileError(f"{file} is no file of tensors: its header would have {length} bytes")
        text = memoryview(bytearray(length))
        self.read(file, 8, text)
        try:
            entries = json.loads(bytes(text)).items()
            return [self._place(key, entry, 8 + length, size) for key, entry in entries]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptFileError(f"{file} is no file of tensors ({type(error).__name__}: {error!s:.80})") from error
        except CorruptFileError as error:
            raise CorruptFileError(f"{file}: {error}") from error

    def _place(self, key: str, entry: Mapping[str, Any], data: int, size: int) -> Place:
        """Read one entry of a header, of a file of ``size`` bytes whose values begin at ``data``."""
        parsed = _PIECE.fullmatch(key)
        spec = self._tensors.get(parsed[1]) if parsed else None
        if parsed is None or spec is None:
            raise CorruptFileError(f"{key!r:.80} is no piece of a tensor of this checkpoint")
        first, stop = int(parsed[2]), int(parsed[3])
        start, end = entry["data_offsets"]
        item = spec.dtype.itemsize
        if not (
            first <= stop <= spec.numel
            and type(start) is int
            and type(end) is int
            and 0 <= start <= end <= size - data
            and end - start == (stop - first) * item
            and DTYPES.get(entry["dtype"]) == spec.dtype
        ):
            raise CorruptFileError(f"{key!r:.80} does not have the type, place or length of such a piece")
        return Place(parsed[1], first * item, data + start, end - start)

    def _chunk(self, file: str, number: int) -> memoryview:
        """Return one chunk of a file, verified."""
        kept = self._kept.get(file)
        if kept is not None and kept[0] == number:
            return kept[1]
        size, sums = self._files[file]
        offset = number * CHUNK_BYTES
        chunk = memoryview(bytearray(max(0, min(CHUNK_BYTES, size - offset))))
        try:
            with open_regular(self._folder / file) as opened:
                done = 0
                while done < len(chunk):
                    if not (count := os.preadv(opened.fileno(), [chunk[done:]], offset + done)):
                        raise CorruptFileError(f"{file} has fewer than {size} bytes")
                    done += count
        except OSError as error:
            raise CorruptFileError(f"{file} cannot be read ({error.strerror})") from error
        self.bytes_read += len(chunk)
        if number >= len(sums) or hashlib.sha256(chunk).hexdigest() != sums[number]:
            raise CorruptFileError(f"{file} differs from what was written")
        self._kept[file] = number, chunk
        return chunk
