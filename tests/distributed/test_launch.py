"""Launches that are refused, each with the reason; and bf16 under the real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mfm_dist.distributed.launch import Launch, launch_problems
from tests.conftest import run_train, tiny_overrides

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def test_a_plain_start_has_no_problem() -> None:
    assert launch_problems({}) == []
    assert launch_problems({**DEEPSPEED, "ACCELERATE_MIXED_PRECISION": "no"}) == []
    assert Launch.from_environment({**DEEPSPEED, "WORLD_SIZE": "4", "RANK": "3"}) == Launch(4, 3, 2)
    assert Launch.from_environment({}) == Launch(1, 0, None)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train.precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.global_batch"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "train.clip_norm"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "zero_stage"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0", "use DDP"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0", "which memory.lean needs"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
    ],
)
def test_what_a_launch_file_must_not_say(variable: str, value: str, told: str) -> None:
    (problem,) = launch_problems({**DEEPSPEED, variable: value})
    assert told in problem


def test_a_global_batch_that_does_not_fit_is_refused(scenes: Path, tmp_path: Path) -> None:
    completed = run_train([*tiny_overrides(scenes, tmp_path / "run"), "train.global_batch=6"], launch="cpu_ddp")
    assert completed.returncode == 1
    assert "which 2 processes cannot share evenly: use 1, 3 processes" in completed.stderr


@pytest.mark.parametrize("launch", [None, "cpu_zero2"])
def test_bf16_trains_on_fp32_weights(launch: str | None, scenes: Path, tmp_path: Path) -> None:
    completed = run_train([*tiny_overrides(scenes, tmp_path / "run"), "train.precision=bf16"], launch=launch)
    assert completed.returncode == 0, completed.stderr[-3000:]
    student = load_file(tmp_path / "run" / "checkpoints" / "step_00000004" / "student.safetensors")
    assert {t.dtype for t in student.values() if t.is_floating_point()} == {torch.float32}
    losses = [json.loads(line)["loss/total"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < loss < 20 for loss in losses)
