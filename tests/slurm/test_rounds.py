"""How a round of tests/campaign/slurm_rounds.py is judged."""

from __future__ import annotations

from typing import Any

import pytest

from mfm_dist.storage import JsonLines
from tests.campaign.slurm_rounds import INTERVAL, RECORD, WRITING, is_good
from tests.helpers.runs import REPOSITORY

GOOD = {
    "state": "COMPLETED", "problem": None, "identical": True, "on_fewer_nodes": False, "largest_difference": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "lost", "good"),
    [("signal", [0, 1], True), ("signal", [0, 2], False), ("time limit", [2], False), ("requeue", [INTERVAL], False),
     ("rank", [INTERVAL + WRITING], True), ("node", [INTERVAL + WRITING + 1], False), ("scratch", [], True)],
)  # fmt: skip
def test_a_round_may_lose_what_its_kind_may(kind: str, lost: list[int], good: bool) -> None:
    assert is_good({**GOOD, "kind": kind, "lost_steps": lost}) == good


@pytest.mark.parametrize(
    ("change", "good"),
    [({"state": "FAILED"}, False), ({"problem": "not within 600 s"}, False), ({"identical": False}, False),
     ({"identical": False, "on_fewer_nodes": True}, True)],
)  # fmt: skip
def test_a_round_has_to_finish_with_the_right_bits(change: dict[str, Any], good: bool) -> None:
    assert is_good({**GOOD, "kind": "node", "lost_steps": [3], **change}) == good


def test_the_rounds_on_record_are_good_by_this_measure() -> None:
    assert all(line["good"] == is_good(line) for line in JsonLines(REPOSITORY / RECORD))
