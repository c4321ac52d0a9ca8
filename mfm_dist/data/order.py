"""The order of samples: a pure function of (seed, stream, position), the same for every rank and worker."""

from __future__ import annotations

import numpy as np

from mfm_dist.rng import Stream, keyed_generator

PERMUTE_UP_TO = 10_000_000
"""Up to this many samples an epoch's order is held as an array (80 MB, half a second); above, it is computed."""
FEISTEL_ROUNDS = 6
_WORD = 2**64 - 1


class SampleOrder:
    """An endless, shuffled stream over ``count`` samples in which every epoch is an exact cover.

    ``order[position]`` is the number of the sample at a global position. Any position costs the same, so a run
    resumes at step 1,000,000 as fast as it starts.
    """

    def __init__(self, *, count: int, seed: int, stream: Stream) -> None:
        assert count > 0
        self.count = count
        self.seed = seed
        self.stream = stream
        self._epoch = -1
        self._permutation: np.ndarray | FeistelPermutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        return self.probe(position, 0)

    def probe(self, position: int, attempt: int) -> int:
        """The sample number ``attempt`` places after ``position``, wrapping round inside the same epoch.

        Used in place of a damaged sample; attempt 0 is the sample itself.
        """
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._permutation = self._permutation_of(epoch)
            self._epoch = epoch
        return int(self._permutation[(place + attempt) % self.count])

    def _permutation_of(self, epoch: int) -> np.ndarray | FeistelPermutation:
        generator = keyed_generator(self.seed, self.stream, epoch)
        if self.count <= PERMUTE_UP_TO:
            return generator.permutation(self.count)
        return FeistelPermutation(self.count, generator)


class FeistelPermutation:
    """A keyed permutation of range(count) that is computed, not stored.

    A Feistel network permutes the next power of four; values outside the range are sent through again until one
    falls inside (cycle walking), which keeps the map a bijection and takes fewer than four passes on average.
    """

    def __init__(self, count: int, generator: np.random.Generator) -> None:
        self.count = count
        self._half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
        self._keys = [int(key) for key in generator.integers(0, _WORD, size=FEISTEL_ROUNDS, dtype=np.uint64)]

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self.count
        value = self._permute(index)
        while value >= self.count:
            value = self._permute(value)
        return value

    def _permute(self, value: int) -> int:
        half_mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & half_mask
        for key in self._keys:
            left, right = right, left ^ (_scramble(right ^ key) & half_mask)
        return left << self._half_bits | right


def _scramble(word: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
