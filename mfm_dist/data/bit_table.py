"""Which samples stand for which class: a table of truth values, one bit each."""

from __future__ import annotations

from array import array
from bisect import bisect_right

import numpy as np

BLOCK = 4096
"""Rows whose truths are counted together; ``select`` looks through one block."""


class BitTable:
    """bool [rows, columns], in whole bytes a row, which grows by rows and finds the k-th row that is true in a column.

    10 M rows of 19 columns take 30 MB (rank and select as in succinct bit vectors, Jacobson 1989).
    """

    def __init__(self, columns: int) -> None:
        self._width = -(-columns // 8)
        """Bytes of a row."""
        self._bits = bytearray()
        self._starts = array("q", [0])
        """First row of each block, and the number of all."""
        self._before = [array("q", [0]) for _ in range(columns)]
        """Of each column: how often it is true before each block, and in all."""

    def __len__(self) -> int:
        return self._starts[-1]

    def extend(self, rows: np.ndarray) -> None:
        """Add rows, bool [n, columns]."""
        for first in range(0, len(rows), BLOCK):
            block = rows[first : first + BLOCK]
            self._bits += np.packbits(block, axis=1).tobytes()
            self._starts.append(len(self) + len(block))
            for before, count in zip(self._before, block.sum(axis=0).tolist(), strict=True):
                before.append(before[-1] + count)

    def count(self, column: int) -> int:
        """Return in how many rows a column is true."""
        return self._before[column][-1]

    def select(self, column: int, k: int) -> int:
        """Return the k-th row, from 0 on, of those in which a column is true. Raise IndexError if there is none."""
        if not 0 <= k < self.count(column):
            raise IndexError(f"row {k} of {self.count(column)}")
        before = self._before[column]
        block = bisect_right(before, k) - 1
        first, end = self._starts[block], self._starts[block + 1]
        byte, bit = divmod(column, 8)
        stored = np.frombuffer(self._bits, np.uint8, (end - first) * self._width, first * self._width)
        truths = stored.reshape(-1, self._width)[:, byte] & (128 >> bit)
        return first + int(np.flatnonzero(truths)[k - before[block]])
