"""What a thousand ranks hold and visit, simulated small; ``tests/campaign/scale.py`` is the same at full size."""

from __future__ import annotations

import numpy as np
import pytest

from mfm_dist.data import index
from mfm_dist.data.index import DatasetIndex, IndexRows
from mfm_dist.data.manifest import index_path
from mfm_dist.data.order import FeistelPermutation
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import BadSample
from mfm_dist.rng import Stream, keyed_generator
from tests.campaign.scale import broken, permuted, simulate
from tests.helpers.shards import ShardFolder, flip_bit


def test_a_small_world_is_covered_exactly_and_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfm_dist.data.order.PERMUTE_UP_TO", 1000)  # so that the order is computed
    monkeypatch.setattr("tests.campaign.scale.COMPARED", 2000)
    found = simulate(ranks=64, samples=100_001, shards=500, rare=5000)
    assert broken({**found, "samples": 100_000}) == []


def test_the_twin_is_not_blind() -> None:
    """Another key, or one round less, and it differs."""
    permutation = FeistelPermutation(1000, keyed_generator(0, Stream.SOURCE_ORDER, 0))
    places = np.arange(1000)
    exact = [permutation[place] for place in range(1000)]
    assert permuted(permutation, places).tolist() == exact
    permutation._keys[0] ^= 1
    assert permuted(permutation, places).tolist() != exact


def test_indexes_are_held_within_bounds_and_read_again(
    shard_folder: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shard_folder(count=10, shard_size=4)
    whole = DatasetIndex.open(folder)
    copies = [whole.rows[shard].copy() for shard in range(len(whole.rows))]
    assert len(copies) > 1
    monkeypatch.setattr(index, "HELD_BYTES", 1)
    rows = IndexRows(folder, whole.manifest.shards)
    for _ in range(2):
        for shard, expected in enumerate(copies):
            assert (rows[shard] == expected).all()
            assert list(rows._held) == [shard]


def test_of_very_many_shards_a_damaged_index_costs_its_own_samples(
    shard_folder: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "CHECKED_AT_OPEN", 0)
    folder = shard_folder(count=10, shard_size=4)
    flip_bit(index_path(folder / "000000.tar"), 200)
    reader = ShardReader(folder)
    bad = reader.read(0)
    assert isinstance(bad, BadSample)
    assert "wrong SHA-256" in bad.reason
    assert not isinstance(reader.read(len(reader) - 1), BadSample)
