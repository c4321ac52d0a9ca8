"""PNG files whose chunks and checksums are right and whose pixel data are not."""

from __future__ import annotations

import struct
import zlib

import numpy as np

SIZE = (24, 40)
"""Height and width that all of them claim."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Of each kind of colours: grey, RGB, palette, grey with alpha, RGBA."""


def png(
    *parts: bytes, depth: int = 8, colour: int = 0, interlaced: int = 0, before: tuple[tuple[bytes, bytes], ...] = ()
) -> bytes:
    """A PNG of these parts of pixel data, each an IDAT of its own, with right checksums.

    Args:
        before: further chunks before the pixel data.
    """
    header = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], depth, colour, 0, 0, interlaced)
    palette = ((b"PLTE", bytes(range(3 * 19))),) if colour == 3 else ()
    chunks = [(b"IHDR", header), *palette, *before, *((b"IDAT", part) for part in parts), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def rows(generator: np.random.Generator, *, depth: int = 8, colour: int = 0, filters: tuple[int, ...] = (0,)) -> bytes:
    """Rows of random ids below 19, each after a filter byte that is drawn from ``filters``."""
    width = SIZE[1] * _CHANNELS[colour] * depth // 8
    data = generator.integers(0, 19, (SIZE[0], 1 + width), dtype=np.uint8)
    data[:, 0] = generator.choice(filters, SIZE[0])
    return data.tobytes()


def broken(generator: np.random.Generator, *, depth: int = 8, colour: int = 0) -> dict[str, bytes]:
    """One PNG of each way to be wrong inside, by name."""
    sound = rows(generator, depth=depth, colour=colour)
    filtered = rows(generator, depth=depth, colour=colour, filters=(0, 1, 2, 3, 4))
    packed, at = zlib.compress(sound, 9), int(generator.integers(20, 60))
    flipped = bytearray(packed)
    flipped[at] ^= 1 << int(generator.integers(8))

    def form(*parts: bytes, interlaced: int = 0) -> bytes:
        return png(*parts, depth=depth, colour=colour, interlaced=interlaced)

    return {
        "no pixel data": form(),
        "empty": form(b""),
        "empty pixel data": form(zlib.compress(b"")),
        "too few rows": form(zlib.compress(sound[: len(sound) // 2])),
        "too few filtered rows": form(zlib.compress(filtered[: len(filtered) // 2])),
        "one byte short": form(zlib.compress(sound[:-1])),
        "cut": form(packed[: len(packed) // 2]),
        "cut in two parts": form(packed[:at], packed[at : len(packed) // 2]),
        "no zlib": form(sound),
        "a flipped bit": form(bytes(flipped)),
        "a checksum of zlib that is wrong": form(packed[:-1] + bytes([packed[-1] ^ 1])),
        "filter 9": form(zlib.compress(rows(generator, depth=depth, colour=colour, filters=(9,)))),
        "filter 9 in some rows": form(zlib.compress(rows(generator, depth=depth, colour=colour, filters=(0, 1, 9)))),
        "interlaced with too few rows": form(zlib.compress(sound[: len(sound) // 3]), interlaced=1),
    }


def sound(generator: np.random.Generator) -> dict[str, tuple[bytes, np.ndarray]]:
    """8-bit grey that is unusual and right, and what it shows, by name."""
    plain = rows(generator)
    shown = np.frombuffer(plain, dtype=np.uint8).reshape(SIZE[0], -1)[:, 1:]
    packed = zlib.compress(plain, 9)
    up = np.frombuffer(plain, dtype=np.uint8).reshape(SIZE[0], -1).copy()
    up[:, 0] = 2
    up[1:, 1:] -= up[:-1, 1:].copy()
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    woven = b"".join(
        b"\0" + row.tobytes() for x, y, across, down in passes for row in shown[y::down, x::across] if row.size
    )
    return {
        "interlaced": (png(zlib.compress(woven), interlaced=1), shown),
        "in many parts": (png(*(packed[at : at + 7] for at in range(0, len(packed), 7))), shown),
        "with an empty part": (png(packed[:50], b"", packed[50:]), shown),
        "with a note": (png(packed, before=((b"tEXt", b"Comment\0street"),)), shown),
        "filtered": (png(zlib.compress(up.tobytes())), shown),
        "with bytes behind the pixels": (png(zlib.compress(plain + b"more")), shown),
    }
