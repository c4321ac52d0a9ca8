"""A bit that turns over on one rank is found before anything is saved, under replication and under sharding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.runs import run_train, tiny_overrides


@pytest.mark.parametrize(
    ("launch", "finding"),
    [
        ("cpu_ddp", "student.backbone.net.conv1.0.weight differs: rank 0 against rank 1"),
        ("cpu_zero0", "exp_avg of student.backbone.net.conv1.0.weight differs: rank 0 against rank 1"),
        ("cpu_zero3", "student.backbone.net.conv1.0.weight differs from its fp32 master on rank 1"),
    ],
)
def test_a_flipped_bit_is_found_and_not_saved(launch: str, finding: str, scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*tiny_overrides(scenes, folder), "debug.audit_every=100"]
    where = {"FLIPPED": "exp_avg" if finding.startswith("exp_avg") else "weight"}
    module = "tests.distributed.train_with_a_flipped_bit"
    completed = run_train(arguments, launch=launch, module=module, environment=where)
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["code"] == 77, completed.stderr[-3000:]
    assert finding in outcome["reason"]
    assert list((folder / "checkpoints").glob("step_*")) == []
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["reason"] for event in events if event["event"] == "audit"] == [finding]
