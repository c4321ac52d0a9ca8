"""An order for data that are larger than the local disk: every rank reads its own part of each epoch from end to end.

In each epoch the shards are put in a new order, laid end to end and cut into lanes of equal length. Block ``k``
belongs to lane ``k mod lanes``; since it goes to rank ``k mod world_size``, a rank meets the same lanes in a whole
epoch wherever the world size divides their number. Inside a lane samples are shuffled in windows, so a rank reads a
few shards at a time. Which samples a block holds does not depend on the world size, and any position is found at once.
"""

from __future__ import annotations

import numpy as np

from mfm_dist.data.order import FeistelPermutation
from mfm_dist.rng import Stream, keyed_generator


class LaneOrder:
    """An endless, shuffled stream over all samples, as ``SampleOrder`` is, but local in each lane.

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

    def __getitem__(self, position: int) -> int:
        return self.probe(position, 0)

    def probe(self, position: int, attempt: int) -> int:
        """The sample number ``attempt`` places after ``position`` in its lane, wrapping round inside the epoch."""
        block, place = divmod(position, self.micro_batch)
        turn, lane = divmod(block, self.lanes)
        epoch, depth = divmod(turn * self.micro_batch + place, self.length)
        return self._at(epoch, lane, (depth + attempt) % self.length)

    def _at(self, epoch: int, lane: int, depth: int) -> int:
        """The sample at a depth of a lane."""
        number, inside = divmod(depth, self.window)
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
        """The sample at a place of the shards laid end to end."""
        if epoch != self._epoch:
            self._shards = keyed_generator(self.seed, self.stream, epoch).permutation(len(self._starts) - 1)
            self._ends = np.cumsum(np.diff(self._starts)[self._shards])
            self._epoch = epoch
        which = int(np.searchsorted(self._ends, laid, side="right"))
        shard = self._shards[which]
        size = int(self._starts[shard + 1] - self._starts[shard])
        return int(self._starts[shard]) + laid - (int(self._ends[which]) - size)
