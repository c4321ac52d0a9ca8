"""The teacher is an exact average of the exact weights, also where student and teacher compute in bf16."""

from __future__ import annotations

import json

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
    completed = run_module("tests.distributed.train_a_teacher", [f"train.precision={precision}"], launch=launch)
    assert completed.returncode == 0, completed.stderr[-3000:]
    (line,) = [line for line in completed.stdout.splitlines() if line.startswith("ERRORS ")]
    errors = json.loads(line.removeprefix("ERRORS "))
    assert errors["bf16"] > 0.5, "then this measures nothing"
    assert errors["teacher"] < 1e-3
