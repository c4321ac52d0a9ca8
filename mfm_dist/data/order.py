"""The order of samples: a pure function of (seed, stream, position), the same for every rank and worker.

Any position costs the same, so a run resumes at step 1,000,000 as fast as it starts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np

from mfm_dist.data.bit_table import BitTable
from mfm_dist.errors import ConfigError
from mfm_dist.rng import Stream, keyed_generator

PERMUTE_UP_TO = 10_000_000
"""Up to this many samples an epoch's order is held as an array (40 MB, half a second); above, it is computed."""
FEISTEL_ROUNDS = 6
CYCLE = 1000
"""Positions over which shares of several sets are exact, but for rounding."""
_WORD = 2**64 - 1


class Order(ABC):
    """Which sample stands at a position of an endless stream."""

    count: int
    """Samples there are."""

    def __getitem__(self, position: int) -> int:
        return self.sample_at(position, 0)

    @abstractmethod
    def sample_at(self, position: int, attempt: int) -> int:
        """Return the number of the sample; each ``attempt`` above 0 names another in place of a damaged one."""

    def wanted(self, position: int, attempt: int) -> int | None:  # noqa: ARG002  no class is wanted in most orders
        """Return the class that ``sample_at`` drew its sample for, if it did."""
        return None


class SampleOrder(Order):
    """An endless, shuffled stream over ``count`` samples in which every epoch is an exact cover."""

    def __init__(self, *, count: int, seed: int, stream: Stream) -> None:
        assert count > 0
        self.count = count
        self.seed = seed
        self.stream = stream
        self._epoch = -1
        self._permutation: np.ndarray | FeistelPermutation = np.empty(0, dtype=np.int64)

    def sample_at(self, position: int, attempt: int) -> int:
        """Return the sample ``attempt`` places after ``position``, wrapping round inside the same epoch."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            generator = keyed_generator(self.seed, self.stream, epoch)
            if self.count <= PERMUTE_UP_TO:  # as permutation(count), in half the bytes
                self._permutation = np.arange(self.count, dtype=np.uint32)
                generator.shuffle(self._permutation)
            else:
                self._permutation = FeistelPermutation(self.count, generator)
            self._epoch = epoch
        return int(self._permutation[(place + attempt) % self.count])


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
    """Apply the finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


class LaneOrder(Order):
    """An endless, shuffled stream over all samples, as ``SampleOrder`` is, but local in each lane: for data
    larger than the local disk.

    In each epoch the shards are put in a new order, laid end to end and cut into lanes of equal length. Block ``k``
    belongs to lane ``k mod lanes``; since it goes to rank ``k mod world_size``, a rank meets the same lanes in a whole
    epoch wherever the world size divides their number. Inside a lane samples are shuffled in windows, so a rank reads a
    few shards at a time. Which samples a block holds does not depend on the world size.

    An epoch covers every sample; lanes being equally long, up to ``lanes - 1`` samples come twice in it.
    """

    def __init__(
        self, starts: np.ndarray, *, lanes: int, window: int, micro_batch: int, seed: int, stream: Stream
    ) -> None:
        """
        Args:
            starts: int64 [shards + 1], number of the first sample of each shard, and the count of all.
            lanes: a multiple of every world size that is to see the same order.
            window: samples of a lane that are shuffled among themselves.
            micro_batch: consecutive positions that make a block.
        """
        self.count = int(starts[-1])
        self.lanes = lanes
        self.window = window
        self.micro_batch = micro_batch
        self.seed = seed
        self.stream = stream
        self.length = -(-self.count // lanes)
        """Samples of a lane in an epoch."""
        self._starts = starts
        self._epoch = -1
        self._shards = np.empty(0, dtype=np.int64)
        self._ends = np.empty(0, dtype=np.int64)
        self._windows: dict[tuple[int, int, int], FeistelPermutation] = {}

    def sample_at(self, position: int, attempt: int) -> int:
        """Return the sample ``attempt`` places after ``position`` in its lane, wrapping round inside the epoch."""
        block, place = divmod(position, self.micro_batch)
        turn, lane = divmod(block, self.lanes)
        epoch, depth = divmod(turn * self.micro_batch + place, self.length)
        number, inside = divmod((depth + attempt) % self.length, self.window)
        first = number * self.window
        key = (epoch, lane, number)
        if key not in self._windows:
            if len(self._windows) > 2 * self.lanes:
                self._windows.clear()
            generator = keyed_generator(self.seed, self.stream, epoch, 1 + lane * self.length + number)
            self._windows[key] = FeistelPermutation(min(self.window, self.length - first), generator)
        laid = (lane * self.length + first + self._windows[key][inside]) % self.count
        return self._sample_at(epoch, laid)

    def _sample_at(self, epoch: int, laid: int) -> int:
        """Return the sample at a place of the shards laid end to end."""
        if epoch != self._epoch:
            self._shards = keyed_generator(self.seed, self.stream, epoch).permutation(len(self._starts) - 1)
            self._ends = np.cumsum(np.diff(self._starts)[self._shards])
            self._epoch = epoch
        which = int(np.searchsorted(self._ends, laid, side="right"))
        shard = self._shards[which]
        size = int(self._starts[shard + 1] - self._starts[shard])
        return int(self._starts[shard]) + laid - (int(self._ends[which]) - size)


class MixedOrder(Order):
    """An endless stream over several sets with a given share of each, which stays in an order of its own.

    A cycle of about ``CYCLE`` positions holds a fixed number of each set, scattered anew in every cycle. So the shares
    are exact, and the place in each set's own order is known at any position without a walk.
    """

    def __init__(self, orders: Sequence[Order], shares: Sequence[float], *, seed: int, stream: Stream) -> None:
        """
        Args:
            orders: of each set, of the numbers from 0; the stream numbers the samples of all sets one after another.
            shares: of each set, relative to their sum; they are rounded to a thousandth of it, and at least one.
        """
        self.count = sum(order.count for order in orders)
        self.seed = seed
        self.stream = stream
        self._orders = orders
        self._firsts = [0, *accumulate(order.count for order in orders)]
        self.per_cycle = [max(1, round(CYCLE * share / sum(shares))) for share in shares]
        """Positions of each set in a cycle."""
        self._cycle = -1
        self._sets = np.empty(0, dtype=np.int64)
        self._turns = np.empty(0, dtype=np.int64)

    def sample_at(self, position: int, attempt: int) -> int:
        """Return the sample; every further ``attempt`` is another of the same set, as its own order has it."""
        number, place = self.place_at(position)
        return self._firsts[number] + self._orders[number].sample_at(place, attempt)

    def wanted(self, position: int, attempt: int) -> int | None:
        number, place = self.place_at(position)
        return self._orders[number].wanted(place, attempt)

    def place_at(self, position: int) -> tuple[int, int]:
        """Return which set stands at a position, and how many of its samples stand before."""
        cycle, place = divmod(position, sum(self.per_cycle))
        if cycle != self._cycle:
            sets = np.repeat(np.arange(len(self.per_cycle)), self.per_cycle)
            self._sets = keyed_generator(self.seed, Stream.SET_DRAW, cycle, self.stream).permutation(sets)
            self._turns = np.empty_like(self._sets)
            for number, turns in enumerate(self.per_cycle):
                self._turns[self._sets == number] = np.arange(turns)
            self._cycle = cycle
        number = int(self._sets[place])
        return number, cycle * self.per_cycle[number] + int(self._turns[place])


def class_probabilities(pixels: np.ndarray, temperature: float) -> np.ndarray:
    """Compute the chance of each class: the softmax of (1 - frequency) / temperature over the classes that occur.

    Args:
        pixels: [classes], pixels of each class in the whole data set.
        temperature: T of the paper; infinite makes all classes equally likely.

    Returns:
        float64 [classes]; 0 for a class that does not occur.
    """
    frequency = pixels / pixels.sum()
    exponent = np.where(pixels > 0, (1.0 - frequency) / temperature, -np.inf)
    weights = np.exp(exponent - exponent.max())
    return weights / weights.sum()


class RareClassOrder(Order):
    """An endless stream of draws with replacement: a class, then one of the samples that hold enough of it.

    Rare class sampling (DAFormer): rare classes come up more often. Every position draws by itself, keyed by (seed,
    position), so there is nothing to remember from draw to draw. What is held is a bit for each sample and class.
    """

    def __init__(
        self,
        statistics: Iterable[np.ndarray],
        *,
        class_names: tuple[str, ...],
        temperature: float,
        min_pixels: int,
        seed: int,
    ) -> None:
        """
        Args:
            statistics: the class statistics, uint32 [samples, classes] each; all in their order are of all samples.
            temperature: as in ``class_probabilities``.
            min_pixels: a sample stands for a class of which it holds more than this many pixels.

        Raises:
            ConfigError: no sample holds that many pixels of a class that occurs.
        """
        self.seed = seed
        totals = np.zeros(len(class_names), dtype=np.int64)
        most = np.zeros(len(class_names), dtype=np.int64)
        self._enough = BitTable(len(class_names))
        for pixels in statistics:
            totals += pixels.sum(axis=0, dtype=np.int64)
            most = np.maximum(most, pixels.max(axis=0, initial=0))
            self._enough.extend(pixels > min_pixels)
        self.count = len(self._enough)
        if missing := [i for i in np.flatnonzero(totals).tolist() if not self._enough.count(i)]:
            found = ", ".join(f"{class_names[i]} ({most[i]})" for i in missing)
            least = min(most[i] for i in missing)
            raise ConfigError(
                f"data.rare_class_sampling.min_pixels={min_pixels}: no sample holds that many pixels of {found}; "
                f"in brackets the most that one holds. Lower it below {least} (the published 3000 are meant for "
                "labels of about 2 million pixels)"
            )
        self.probabilities = class_probabilities(totals, temperature)
        self._cumulated = np.cumsum(self.probabilities)

    def sample_at(self, position: int, attempt: int) -> int:
        """Draw the sample of a position; every further ``attempt``, in place of a damaged sample, is a new draw."""
        train_id, generator = self._draw_class(position, attempt)
        return self._enough.select(train_id, int(generator.integers(self._enough.count(train_id))))

    def wanted(self, position: int, attempt: int) -> int:
        return self._draw_class(position, attempt)[0]

    def _draw_class(self, position: int, attempt: int) -> tuple[int, np.random.Generator]:
        generator = keyed_generator(self.seed, Stream.RARE_CLASS, position, attempt)
        train_id = int(np.searchsorted(self._cumulated, generator.random() * self._cumulated[-1], side="right"))
        return train_id, generator
