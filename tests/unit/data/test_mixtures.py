"""Several shard sets: as one large set, or in given shares, each in an exact order of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mfm_dist.config.schema import DataSection, RareClassSection
from mfm_dist.data.blocks import IndexedSamples
from mfm_dist.data.concatenated import ConcatenatedReader
from mfm_dist.data.order import MixedOrder, Order, RareClassOrder, SampleOrder
from mfm_dist.data.pipeline import TrainPipeline
from mfm_dist.data.reader import Sample, ShardReader
from mfm_dist.errors import BadSample, ConfigError
from mfm_dist.rng import Stream, keyed_generator, keyed_seed
from tests.helpers.shards import damage, write_set

COUNTS = (23, 9, 5)
SHARES = (0.5, 0.3, 0.2)
LENGTH = 1000


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[ShardReader]:
    root = tmp_path_factory.mktemp("sets")
    sizes = ((23, 32), (9, 40), (5, 24))
    return [ShardReader(write_set(root / f"{n}", count=n, shard_size=4, height=height)) for n, height in sizes]


def order_of(source: ShardReader | ConcatenatedReader, *, seed: int = 3, **data: object) -> Order:
    """The order in which the pipeline of a run reads this source."""
    pipeline = TrainPipeline(
        source=source, target=source, seed=seed, data=DataSection(workers=0, **data), micro_batch=2,  # type: ignore[arg-type]
        rank=0, world_size=1, blocks_per_step=1,
    )  # fmt: skip
    samples = pipeline._blocks.source
    assert isinstance(samples, IndexedSamples)
    return samples.order


def mixed(shares: tuple[float, ...] = SHARES, *, seed: int = 3, stream: Stream = Stream.SOURCE_ORDER) -> MixedOrder:
    orders = [SampleOrder(count=n, seed=10 + n, stream=stream) for n in COUNTS]
    return MixedOrder(orders, shares, seed=seed, stream=stream)


def set_of(number: int) -> int:
    """Which set a sample is of."""
    return int(np.searchsorted(np.cumsum(COUNTS), number, side="right"))


def slow_sequence(length: int, shares: tuple[float, ...] = SHARES) -> list[tuple[int, int]]:
    """By position: the set, and how many of its samples came before. A walk from the start, which keeps counts."""
    per_cycle = [round(1000 * share) for share in shares]
    seen, found = Counter[int](), []
    for cycle in range(-(-length // sum(per_cycle))):
        sets = [number for number, count in enumerate(per_cycle) for _ in range(count)]
        for number in keyed_generator(3, Stream.SET_DRAW, cycle, Stream.SOURCE_ORDER).permutation(sets).tolist():
            found.append((number, seen[number]))
            seen[number] += 1
    return found[:length]


def test_a_position_has_the_set_and_the_place_that_a_walk_finds() -> None:
    order, expected = mixed(), slow_sequence(2500)
    positions = np.random.default_rng(0).permutation(2500).tolist()  # as a run asks that resumes anywhere
    assert [order.place_at(position) for position in positions] == [expected[position] for position in positions]


def test_shares_are_exact_in_every_cycle_and_each_set_keeps_its_own_exact_epochs() -> None:
    order = mixed()
    drawn = [order[position] for position in range(3 * LENGTH)]
    for cycle in range(3):
        found = Counter(set_of(number) for number in drawn[cycle * LENGTH : (cycle + 1) * LENGTH])
        assert [found[number] for number in range(3)] == [500, 300, 200]
    for number, count in enumerate(COUNTS):
        own = [one for one in drawn if set_of(one) == number]
        first = sum(COUNTS[:number])
        assert [one - first for one in own] == [
            SampleOrder(count=count, seed=10 + count, stream=Stream.SOURCE_ORDER)[place] for place in range(len(own))
        ]
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count]) == list(range(first, first + count))


def test_neither_the_sets_nor_their_pairs_with_the_other_stream_repeat() -> None:
    """Source and target of a place are mixed with one another: each source has to meet each target."""
    source, target = mixed(), mixed(stream=Stream.TARGET_ORDER)
    pairs = Counter((source.place_at(p)[0], target.place_at(p)[0]) for p in range(5 * LENGTH))
    for (one, other), count in pairs.items():
        assert count / (5 * LENGTH) == pytest.approx(SHARES[one] * SHARES[other], abs=0.03)
    assert len(pairs) == 9
    assert [source.place_at(p)[0] for p in range(LENGTH)] != [source.place_at(p)[0] for p in range(LENGTH, 2 * LENGTH)]
    assert [source.place_at(p)[0] for p in range(99)] != [mixed(seed=4).place_at(p)[0] for p in range(99)]


@pytest.mark.parametrize(
    ("shares", "per_cycle"),
    [((2, 1, 1), [500, 250, 250]), ((1, 1, 1), [333, 333, 333]), ((1e-9, 1, 1), [1, 500, 500])],
)
def test_shares_are_relative_and_rounded_to_a_thousandth(shares: tuple[float, ...], per_cycle: list[int]) -> None:
    assert mixed(shares).per_cycle == per_cycle


def test_a_bad_sample_is_replaced_by_one_of_its_own_set() -> None:
    order = mixed()
    for position in range(200):
        number, place = order.place_at(position)
        tried = {order.sample_at(position, attempt) for attempt in range(COUNTS[number])}
        assert {set_of(one) for one in tried} == {number}
        assert len(tried) == COUNTS[number], "and after as many attempts all of them were tried"
        assert order.sample_at(position, 0) == sum(COUNTS[:number]) + order._orders[number][place]


def test_a_list_is_one_large_set(sets: list[ShardReader]) -> None:
    joined = ConcatenatedReader(sets)
    order = order_of(joined)
    expected = SampleOrder(count=37, seed=3, stream=Stream.SOURCE_ORDER)
    assert [order[p] for p in range(100)] == [expected[p] for p in range(100)]
    every = [reader.read(number) for reader in sets for number in range(len(reader))]
    for number, one in enumerate(every):
        found = joined.read(number)
        assert isinstance(one, Sample)
        assert isinstance(found, Sample)
        assert (found.key, found.image.shape) == (one.key, one.image.shape)
    assert joined.starts.tolist() == [0, 4, 8, 12, 16, 20, 23, 27, 31, 32, 36, 37]


def test_rare_classes_are_drawn_in_each_set_by_its_own_frequencies_or_over_a_list(sets: list[ShardReader]) -> None:
    """With shares the set is drawn first, by its share, then a class of that set, then an image of it with enough."""
    rare = RareClassSection(enabled=True, temperature=0.2, min_pixels=50)
    order = order_of(ConcatenatedReader(sets, SHARES), rare_class_sampling=rare)
    pixels = [np.concatenate(list(reader.class_statistics())) for reader in sets]
    places = slow_sequence(400)
    for position, (number, place) in enumerate(places):
        frequency = pixels[number].sum(axis=0) / pixels[number].sum()
        chances = np.where(frequency > 0, np.exp((1 - frequency) / 0.2), 0)
        generator = keyed_generator(keyed_seed(3, Stream.SET_SEED, number), Stream.RARE_CLASS, place)
        train_id = int(np.searchsorted(np.cumsum(chances / chances.sum()), generator.random(), side="right"))
        images = np.flatnonzero(pixels[number][:, train_id] > 50)
        image = int(images[generator.integers(len(images))])
        assert (order.wanted(position, 0), order[position]) == (train_id, sum(COUNTS[:number]) + image)

    whole = order_of(ConcatenatedReader(sets), rare_class_sampling=rare)
    assert isinstance(whole, RareClassOrder)
    names = sets[0].classes.names if sets[0].classes else ()
    expected = RareClassOrder(pixels, class_names=names, temperature=0.2, min_pixels=50, seed=3)
    assert [whole[p] for p in range(99)] == [expected[p] for p in range(99)]


def test_a_set_without_an_image_of_a_class_is_named(sets: list[ShardReader]) -> None:
    rare = RareClassSection(enabled=True, min_pixels=100_000)
    with pytest.raises(ConfigError, match=f"{sets[0].index.folder}: data.rare_class_sampling.min_pixels=100000"):
        order_of(ConcatenatedReader(sets, SHARES), rare_class_sampling=rare)


def test_a_fingerprint_follows_sets_their_order_and_shares(sets: list[ShardReader]) -> None:
    def prints(*choice: int, shares: tuple[float, ...] | None = None) -> str:
        return ConcatenatedReader([sets[number] for number in choice], shares).fingerprint

    assert prints(0, 1, shares=(1, 3)) == prints(0, 1, shares=(0.25, 0.75))
    different = [prints(0, 1), prints(1, 0), prints(0, 2), prints(0, 1, shares=(1, 3)), prints(0, 1, shares=(3, 1))]
    assert len({*different, sets[0].fingerprint}) == 6


def test_a_bad_sample_is_named_by_the_number_in_its_own_set(tmp_path: Path) -> None:
    folders = [write_set(tmp_path / name, count=3, shard_size=2) for name in ("one", "two")]
    damage(folders[1], 1)
    found = ConcatenatedReader([ShardReader(folder) for folder in folders]).read(4)
    assert isinstance(found, BadSample)
    assert (found.shard, found.number) == (str(folders[1] / "000000.tar"), 1)
