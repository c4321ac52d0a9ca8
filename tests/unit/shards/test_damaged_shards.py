"""Everything bad is named, everything else delivered; tests/campaign/damaged_shards.py does 1,000 shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.damaged_shards import KINDS, damaged_shard, faults, outcome, stream_faults, streamed, whole_pixels


@pytest.mark.parametrize("number", range(2 * len(KINDS)))
def test_a_damaged_shard(tmp_path: Path, number: int) -> None:
    kind, damaged = damaged_shard(tmp_path / "shard", number)
    found = outcome(damaged)
    assert faults(damaged, found, whole_pixels()) == [], kind
    assert damaged.bad or damaged.harmless or damaged.nameless


@pytest.mark.parametrize("number", range(2 * len(KINDS)))
def test_a_damaged_shard_as_a_stream(tmp_path: Path, number: int) -> None:
    kind, damaged = damaged_shard(tmp_path / "shard", number)
    assert stream_faults(damaged, streamed(damaged), whole_pixels()) == [], kind
