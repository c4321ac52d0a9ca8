"""The teacher is an exact average of the exact weights, also where student and teacher compute in bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import run_module

CAMPAIGN = pytest.mark.campaign


@pytest.mark.parametrize(
    ("launch", "precision"),
    [
        ("cpu_zero2", "bf16_weights"),
        ("cpu_zero3", "bf16_weights"),
        pytest.param("cpu_ddp", "bf16", marks=CAMPAIGN),
        pytest.param("cpu_zero0", "bf16", marks=CAMPAIGN),
        pytest.param("cpu_zero1", "bf16", marks=CAMPAIGN),
        pytest.param("cpu_zero2", "bf16", marks=CAMPAIGN),
        pytest.param("cpu_zero3", "bf16", marks=CAMPAIGN),
        pytest.param("cpu_zero3", "fp32", marks=CAMPAIGN),
    ],
)
def test_300_steps_of_a_slow_average(launch: str, precision: str) -> None:
    """With a decay of 0.999 an average kept in bf16 hardly moves: it is off by most of the way."""
    errors = errors_of([f"train.precision={precision}", "train.steps=300"], launch=launch)
    assert errors["start"] == 0.0, "the teacher begins as the student was, in fp32, also where both are held in bf16"
    assert errors["bf16"] > 0.5, "then this measures nothing"
    assert errors["teacher"] < 1e-3


def test_a_second_copy_within_a_node_does_not_hold_the_teacher_back(tmp_path: Path) -> None:
    """hpZ, two "nodes" of two ranks: DeepSpeed would go on with the copy of the teacher that it made at first."""
    file = tmp_path / "hpz.json"
    file.write_text('{"zero_optimization": {"stage": 3, "overlap_comm": false, "zero_hpz_partition_size": 2}}')
    said = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    settings = ["train.steps=20", "train.global_batch=4"]
    errors = errors_of(settings, launch="cpu_zero3", processes=4, environment=said)
    assert errors["stale"] > 0.5, "the fault has to be seen where it is"
    assert max(errors[key] for key in ("teacher", "seen", "put_back")) < 1e-3


def errors_of(settings: list[str], *, launch: str, processes: int = 2, **more: Any) -> dict[str, float]:
    """What training the tiny module prints."""
    module = "tests.distributed.train_a_teacher"
    completed = run_module(module, settings, launch=launch, processes=processes, **more)
    assert completed.returncode == 0, completed.stderr[-3000:]
    (line,) = [line for line in completed.stdout.splitlines() if line.startswith("ERRORS ")]
    errors: dict[str, float] = json.loads(line.removeprefix("ERRORS "))
    return errors
