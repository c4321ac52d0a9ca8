"""Several shard sets as one."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

import numpy as np

from mfm_dist.classes import ClassSet
from mfm_dist.data.reader import Sample, ShardReader
from mfm_dist.errors import BadSample


class ConcatenatedReader:
    """The samples of several readers, numbered one after another. Their labels are in the same classes."""

    def __init__(self, readers: Sequence[ShardReader], shares: Sequence[float] | None = None) -> None:
        """
        Args:
            shares: of each in what is drawn, relative to their sum; None: they are one large set.
        """
        self.readers = tuple(readers)
        self.shares = None if shares is None else tuple(shares)
        self._firsts = [0, *accumulate(map(len, readers))]

    def __len__(self) -> int:
        return self._firsts[-1]

    @property
    def classes(self) -> ClassSet | None:
        """Of the labels; None where there are none."""
        return next((reader.classes for reader in self.readers if reader.classes), None)

    @property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1], number of the first sample of each shard, and the count of all."""
        parts = [reader.starts[:-1] + first for reader, first in zip(self.readers, self._firsts, strict=False)]
        return np.concatenate([*parts, [len(self)]])

    @property
    def fingerprint(self) -> str:
        """Two share it if every number is the same sample and every share is the same."""
        parts = [reader.fingerprint for reader in self.readers]
        shares = [] if self.shares is None else [share / sum(self.shares) for share in self.shares]
        return hashlib.sha256(repr((parts, shares)).encode()).hexdigest()

    @property
    def relabelling_fingerprint(self) -> str:
        """As that of ``ShardReader``, of all."""
        parts = [reader.relabelling_fingerprint for reader in self.readers]
        return hashlib.sha256(repr(parts).encode()).hexdigest() if any(parts) else ""

    def class_statistics(self) -> Iterator[np.ndarray]:
        """Count the pixels of each class, as ``ShardReader.class_statistics`` does, of one set after another."""
        return chain.from_iterable(reader.class_statistics() for reader in self.readers)

    def read(self, number: int, *, with_label: bool = True) -> Sample | BadSample:
        """Read sample ``number``; a bad one has its number in its own set."""
        place = bisect_right(self._firsts, number) - 1
        return self.readers[place].read(number - self._firsts[place], with_label=with_label)
