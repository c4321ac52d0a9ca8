"""The structure of PNG files of any origin, and the pixels of those that hold a label as it is written here.

Nothing decodes a PNG by libpng: in torchvision 0.29 it ends the process at most errors in the pixel data.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from mfm_dist.errors import CorruptFileError
from mfm_dist.storage import CHUNK_BYTES

PNG_START = b"\x89PNG\r\n\x1a\n"
_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps of both, of each pass of an interlaced picture."""
_PLAIN_GREY = (8, 0, 0, 0, 0)
"""Bits a channel, kind of colours, compression, filtering, interlacing."""

Chunks = list[tuple[bytes, memoryview]]
"""Kind and content of each chunk up to the last, IEND."""


def read_chunks(content: memoryview) -> Chunks:
    """Return the chunks of a PNG. Raises CorruptFileError: one is cut or has a wrong CRC-32, or the first is no IHDR.

    Decoders do not compare the checksums of all of them.
    """
    chunks, at, kind = [], len(PNG_START), b""
    while kind != b"IEND":
        size = int.from_bytes(content[at : at + 4], "big")
        kind, end = bytes(content[at + 4 : at + 8]), at + 8 + size
        if end + 4 > len(content):
            raise CorruptFileError("cannot be decoded: a chunk is damaged or cut")
        if zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise CorruptFileError("cannot be decoded: a chunk is damaged or cut")
        chunks.append((kind, content[at + 8 : end]))
        at = end + 4
    kind, header = chunks[0]
    if kind != b"IHDR" or len(header) != 13:
        raise CorruptFileError("cannot be decoded: it has no header")
    return chunks


def png_kind(content: bytes | memoryview) -> str | None:
    """Tell from its header what a PNG is: ``8-bit palette``, ``16-bit RGB`` …; None for anything else."""
    if len(content) < 33 or content[:8] != PNG_START or content[25] not in _COLOURS:
        return None
    return f"{content[24]}-bit {_COLOURS[content[25]]}"


def plain_grey(chunks: Chunks) -> np.ndarray | None:
    """Decode 8-bit grey without filters or interlacing: uint8 [H, W]; None for any other PNG, and for damaged ones.

    Labels are written so. No more is inflated than the header claims, which the caller has looked at.
    """
    width, height, *form = struct.unpack(">IIBBBBB", chunks[0][1])
    if tuple(form) != _PLAIN_GREY:
        return None
    inflate, size = zlib.decompressobj(), height * (width + 1)
    try:
        # One byte more than there should be: zlib then reads on to its own checksum.
        raw = inflate.decompress(_packed(chunks), size + 1)
    except zlib.error:
        return None
    if len(raw) != size or not inflate.eof:
        return None
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(height, width + 1)
    return None if rows[:, 0].any() else np.array(rows[:, 1:])


def is_interlaced(chunks: Chunks) -> bool:
    """Tell whether a PNG comes in seven passes."""
    return chunks[0][1][12] != 0


def check_length(chunks: Chunks) -> None:
    """Raise CorruptFileError where there are fewer pixel data than the header claims, or they cannot be inflated."""
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", chunks[0][1])
    size = 0
    for column, row, across, down in _ADAM7 if is_interlaced(chunks) else ((0, 0, 1, 1),):
        columns, rows = len(range(column, width, across)), len(range(row, height, down))
        size += rows * (1 + (columns * depth * _CHANNELS[colour] + 7) // 8) if columns else 0
    inflate, packed = zlib.decompressobj(), _packed(chunks)
    try:
        while size > 0 and packed and not inflate.eof:
            size -= len(inflate.decompress(packed, CHUNK_BYTES))
            packed = inflate.unconsumed_tail
    except zlib.error as error:
        raise CorruptFileError(f"cannot be decoded: {error}") from error
    if size > 0:
        raise CorruptFileError(f"cannot be decoded: {size} bytes of its pixels are missing")


def _packed(chunks: Chunks) -> bytes:
    return b"".join(part for kind, part in chunks if kind == b"IDAT")
