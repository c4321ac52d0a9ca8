"""The order in lanes: every sample in its epoch, few shards read at a time, any position found at once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mfm_dist.data.order import LaneOrder
from mfm_dist.rng import Stream

STARTS = np.array([0, 7, 8, 20, 31, 31 + 50, 100])


def order(lanes: int = 4, window: int = 5, micro_batch: int = 2, seed: int = 0) -> LaneOrder:
    return LaneOrder(STARTS, lanes=lanes, window=window, micro_batch=micro_batch, seed=seed, stream=Stream.SOURCE_ORDER)


def samples_of_lane(lanes: LaneOrder, lane: int, count: int) -> list[int]:
    """The first samples of a lane, by the definition: block k belongs to lane k mod lanes."""
    size = lanes.micro_batch
    blocks = range(lane, lane + lanes.lanes * -(-count // size), lanes.lanes)
    return [lanes[block * size + place] for block in blocks for place in range(size)][:count]


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("lanes", [1, 3, 4, 8])
def test_an_epoch_covers_every_sample_with_few_repeats(lanes: int, micro_batch: int) -> None:
    tested = order(lanes=lanes, micro_batch=micro_batch)
    seen = Counter(n for lane in range(lanes) for n in samples_of_lane(tested, lane, tested.length))
    assert set(seen) == set(range(100))
    assert sum(seen.values()) - 100 <= lanes - 1


def test_a_lane_reads_few_shards_at_a_time_and_each_epoch_another_order() -> None:
    tested = order(lanes=4, window=5)
    shards = [int(np.searchsorted(STARTS, n, side="right")) for n in samples_of_lane(tested, 1, tested.length)]
    for first in range(0, len(shards), 5):
        assert len(set(shards[first : first + 5])) <= 3
    two = samples_of_lane(tested, 1, 2 * tested.length)
    assert sorted(two[: tested.length]) != sorted(two[tested.length :])
    assert samples_of_lane(order(seed=1), 0, 20) != samples_of_lane(order(), 0, 20)


def test_windows_are_shuffled() -> None:
    tested = order(lanes=1, window=50)
    first = samples_of_lane(tested, 0, 50)
    assert sorted(first) != first


def test_a_far_position_is_found_at_once_and_alike() -> None:
    far = 10**12 + 3
    assert order()[far] == order()[far]
    assert len({order().sample_at(far, attempt) for attempt in range(8)}) == 8


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_meets_its_own_lanes_alone(world_size: int) -> None:
    tested = order(lanes=4, micro_batch=2)
    for rank in range(world_size):
        blocks = range(rank, 400, world_size)
        assert {block % 4 for block in blocks} == set(range(rank, 4, world_size))
    # and so a quarter of an epoch holds a quarter of the places
    alone = {tested[block * 2 + place] for block in range(3, 4 * 12, 4) for place in range(2)}
    assert len(alone) <= tested.length
