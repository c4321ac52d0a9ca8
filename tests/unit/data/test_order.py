"""The shuffled order: an exact cover of every epoch, keyed by seed and position, without a list in memory."""

from __future__ import annotations

import numpy as np
import pytest

from mfm_dist.data import order as order_module
from mfm_dist.data.order import FeistelPermutation, SampleOrder
from mfm_dist.rng import Stream, keyed_generator


def make(count: int, seed: int = 0, stream: Stream = Stream.SOURCE_ORDER) -> SampleOrder:
    return SampleOrder(count=count, seed=seed, stream=stream)


@pytest.fixture(params=["stored", "computed"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "computed":
        monkeypatch.setattr(order_module, "PERMUTE_UP_TO", 0)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 257])
def test_every_epoch_is_an_exact_cover(count: int) -> None:
    order = make(count)
    for epoch in range(3):
        assert sorted(order[epoch * count + i] for i in range(count)) == list(range(count))


@pytest.mark.usefixtures("_both_ways")
def test_the_order_depends_on_epoch_seed_and_stream() -> None:
    def first_epoch(order: SampleOrder, epoch: int = 0) -> list[int]:
        return [order[epoch * 100 + i] for i in range(100)]

    orders = [
        first_epoch(make(100)),
        first_epoch(make(100), epoch=1),
        first_epoch(make(100, seed=1)),
        first_epoch(make(100, stream=Stream.TARGET_ORDER)),
        list(range(100)),
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.usefixtures("_both_ways")
def test_a_position_does_not_depend_on_what_was_asked_before() -> None:
    walked, jumped = make(31), make(31)
    sequence = [walked[position] for position in range(31 * 4)]
    shuffled = np.random.default_rng(0).permutation(len(sequence)).tolist()
    assert all(jumped[position] == sequence[position] for position in shuffled)


def test_an_order_that_is_held_is_numpys_permutation() -> None:
    """It is held in half the bytes, which must not change a run that goes on."""
    order = make(10_007, seed=3)
    expected = keyed_generator(3, Stream.SOURCE_ORDER, 1).permutation(10_007).tolist()
    assert [order[10_007 + place] for place in range(10_007)] == expected


def test_a_far_position_needs_no_walk() -> None:
    position = 10**12
    order = make(1009)
    start = position - position % 1009
    assert sorted(order[start + i] for i in range(1009)) == list(range(1009))
    assert order[position] == make(1009)[position]


@pytest.mark.usefixtures("_both_ways")
def test_probing_stays_in_the_epoch_and_meets_every_sample() -> None:
    order = make(10)
    position = 10 * 3 + 9  # the last place of an epoch: probing wraps to its first
    assert order.sample_at(position, 0) == order[position]
    assert order.sample_at(position, 1) == order[10 * 3]
    assert sorted(order.sample_at(position, attempt) for attempt in range(10)) == list(range(10))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 2975, 24_966])
def test_feistel_is_a_bijection(count: int) -> None:
    permutation = FeistelPermutation(count, np.random.default_rng(count))
    assert len({permutation[i] for i in range(count)}) == count


def test_feistel_scatters_neighbours() -> None:
    count = 10_000
    permutation = FeistelPermutation(count, np.random.default_rng(0))
    values = np.array([permutation[i] for i in range(count)])
    assert abs(np.corrcoef(np.arange(count), values)[0, 1]) < 0.05
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
    moved = np.abs(np.diff(values))
    assert 0.3 * count < moved.mean() < 0.37 * count  # a random permutation gives a third


def test_more_than_ten_million_samples_are_not_held_in_memory() -> None:
    order = make(50_000_001)
    seen = {order[position] for position in range(7 * 50_000_001, 7 * 50_000_001 + 1000)}
    assert len(seen) == 1000
    assert all(0 <= number < 50_000_001 for number in seen)
