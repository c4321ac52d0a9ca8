"""Bad samples are named once a run and counted over all its starts, against a limit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mfm_dist.errors import BadSample, DataError
from mfm_dist.run.bad_samples import BadSamples
from mfm_dist.run.folder import RunFolder

FIRST, SECOND = (BadSample(shard="a.tar", key=key, number=3, reason="its image differs") for key in ("one", "two"))


def one_start(folder: Path, limit: float = 0.02) -> BadSamples:
    """As a start of a run of 100 samples makes it."""
    engine: Any = SimpleNamespace(is_main=True, gather_objects=lambda value: [value])
    return BadSamples(total=100, limit=limit, engine=engine, run=RunFolder(folder, writes=True), say=print)


def named(folder: Path) -> list[str]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event["key"] or event["reason"] for event in events if event["event"] == "bad_sample"]


def test_a_sample_is_named_and_counted_once_in_all_starts_of_a_run(tmp_path: Path) -> None:
    for _ in range(3):
        start = one_start(tmp_path)
        start.record([FIRST], step=1)
        start.record([FIRST._replace(reason="its image cannot be read"), SECOND], step=2)
        assert not start.has_unseen([SECOND, FIRST])
    assert named(tmp_path) == ["one", "two"]
    assert len(start.known) == 2


def test_what_is_lost_without_a_name_is_told_apart_by_the_reason(tmp_path: Path) -> None:
    lost = [BadSample(shard="s3://a.tar", key="", number=-1, reason=reason) for reason in ("cut", "damaged header")]
    for _ in range(2):
        one_start(tmp_path).record(lost, step=1)
    assert named(tmp_path) == ["cut", "damaged header"]


def test_samples_of_earlier_starts_count_towards_the_limit(tmp_path: Path) -> None:
    one_start(tmp_path, limit=0.01).record([FIRST], step=1)
    with pytest.raises(DataError, match=r"(?s)2 of 100 samples are bad.*'one'.*'two'"):
        one_start(tmp_path, limit=0.01).record([SECOND], step=2)


def test_a_run_that_was_stopped_for_them_goes_on_once_they_are_mended(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        one_start(tmp_path, limit=0.0).record([FIRST], step=1)
    mended = one_start(tmp_path, limit=0.0)
    mended.record([], step=1)  # as after every evaluation
    assert mended.has_unseen([FIRST])
