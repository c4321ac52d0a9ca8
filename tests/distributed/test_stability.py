"""Losses and gradients that must not reach the weights: all ranks skip the same steps, and go back together."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import assert_equal_bits, checkpoint_tensors, run_train, tiny_overrides

CAMPAIGN = pytest.mark.campaign
PLANTED = "tests.distributed.train_with_bad_gradients"
LENGTH = ["train.steps=12", "checkpoint.every=2", "checkpoint.keep=10", "debug.audit_every=1", "eval.every=100"]
"""A step is two micro-batches: with two processes, the odd ones are on rank 1."""


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events(run) if event["event"] == kind]


def disturbed(
    run: Path, scenes: Path, blocks: str, kind: str, *overrides: str, launch: str | None, **environment: str
) -> Any:
    arguments = [*tiny_overrides(scenes, run), *LENGTH, *overrides]
    planted = {"BAD_BLOCKS": blocks, "BAD_KIND": kind, **environment}
    return run_train(arguments, launch=launch, module=PLANTED, environment=planted)


def test_out_of_memory_on_one_rank_is_told_once_and_ends_all(scenes: Path, tmp_path: Path) -> None:
    """Block 5 is rank 1's of the third step; rank 0 waits for it in an exchange, and its watchdog ends it."""
    run = tmp_path / "run"
    completed = disturbed(run, scenes, "5", "memory", "watchdog.seconds=20", launch="cpu_ddp")
    told = "rank 1 in 'micro-batch' of step 2 ran out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert completed.stderr.count(told) == 1
    assert "memory.lean=true" in completed.stderr
    ended = re.findall(r"exitcode *: (-?\d+)", completed.stderr)  # torchrun's, of each rank that it did not kill
    assert ended, completed.stderr[-3000:]
    assert set(ended) == {"6"}
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["code"], outcome["step"]) == (6, 2)
    assert outcome["reason"].startswith(told)
    assert [event["step"] for event in of_kind(run, "out_of_memory")] == [2]
    snapshot = json.loads((run / "out_of_memory" / "rank_00001.json").read_text())
    assert snapshot["error"].endswith("See documentation")
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000002"
    assert completed.stderr.count("Traceback (most recent call last)") == 1, "accelerate launch's own, of no rank"


@pytest.mark.parametrize(
    ("launch", "kind", "overrides"),
    [
        ("cpu_ddp", "loss", []),
        pytest.param("cpu_zero2", "gradient", ["memory.offload_optimizer=true"], marks=CAMPAIGN),
        ("cpu_zero3", "gradient", []),
        pytest.param("cpu_zero0", "gradient", [], marks=CAMPAIGN),
        pytest.param("cpu_zero1", "loss", [], marks=CAMPAIGN),
        pytest.param("cpu_zero2", "gradient", ["train.precision=bf16"], marks=CAMPAIGN),
        pytest.param("cpu_zero2", "gradient", ["train.precision=bf16_weights"], marks=CAMPAIGN),
        pytest.param("cpu_zero3", "gradient", ["train.precision=bf16_weights"], marks=CAMPAIGN),
        pytest.param("cpu_zero3", "gradient", ["memory.lean=true"], marks=CAMPAIGN),
    ],
)
def test_all_ranks_skip_and_go_back_together(
    launch: str, kind: str, overrides: list[str], scenes: Path, tmp_path: Path
) -> None:
    """One bad step on rank 1 (block 3 is of step 1), then five in a row (blocks 11 to 19, steps 5 to 9)."""
    run = tmp_path / "run"
    completed = disturbed(run, scenes, "3,11,13,15,17,19", kind, *overrides, launch=launch)
    assert completed.returncode == 0, completed.stderr[-3000:]
    skipped = of_kind(run, "skipped_step")
    assert [event["step"] for event in skipped] == [2, 6, 7, 8, 9, 10]
    reason = "loss not finite on rank 1" if kind == "loss" else "gradient of encoder, decoder, rebuilder not finite"
    assert all(event["reason"].startswith(reason) for event in skipped)
    (back,) = of_kind(run, "rollback")
    assert (back["step"], back["to_step"]) == (10, 4), "the last checkpoint from before the trouble"
    state = json.loads((run / "checkpoints" / "step_00000012" / "state.json").read_text())["progress"]
    # Steps 0 to 9, then 4 to 11 with data that nobody has seen yet.
    assert state["block"] == 2 * (10 + 8)
    assert state["applied"] == 3 + 8
    assert all(bool(t.isfinite().all()) for t in checkpoint_tensors(run / "checkpoints" / "step_00000012").values())
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13)), "what was given up is forgotten"


@pytest.mark.parametrize("launch", [None, "cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_a_step_that_is_not_applied_leaves_no_trace(launch: str | None, scenes: Path, tmp_path: Path) -> None:
    """Block 3, of the last step, is infinite from the first layer on: no weight and no running statistic has moved."""
    run = tmp_path / "run"
    completed = disturbed(run, scenes, "3", "activation", "train.steps=2", "checkpoint.every=1", launch=launch)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert [event["step"] for event in of_kind(run, "skipped_step")] == [2]
    before, after = (checkpoint_tensors(run / "checkpoints" / f"step_0000000{step}") for step in (1, 2))
    assert any(name.endswith("running_var") for name in before)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert [name for name in moved if not name.endswith("num_batches_tracked")] == [], "a count that nothing reads"


def test_a_step_for_which_a_rank_has_no_data_is_none(scenes: Path, tmp_path: Path) -> None:
    """Rank 1 has none from the fourth on, and the third is skipped; the same command goes on as if undisturbed."""
    run, other = tmp_path / "run", tmp_path / "undisturbed"
    for folder, lost in ((run, "6"), (run, "1000"), (other, "1000")):
        again = folder == run and lost == "1000"
        completed = disturbed(folder, scenes, "5", "loss", "train.steps=6", launch="cpu_ddp", NO_DATA_FROM=lost)
        assert (completed.returncode == 0) == (lost != "6"), completed.stderr[-3000:]
        if lost == "6":
            assert "the disk with the shards is gone" in completed.stderr
            outcome = json.loads((run / "outcome.json").read_text())
            assert (outcome["code"], outcome["step"]) == (3, 3), "what a step without data did is not counted"
            assert not (run / "checkpoints" / "step_00000004").exists()
        assert [event["step"] for event in of_kind(folder, "skipped_step")] == ([3, 3] if again else [3])
    assert_equal_bits(run, other, step=6)


def test_going_back_restores_every_bit(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = disturbed(run, scenes, "1000", "loss", "train.steps=4", launch=None)
    assert before.returncode == 0, before.stderr[-3000:]
    shutil.copytree(run / "checkpoints" / "step_00000004", tmp_path / "before" / "step_00000004")
    # Two steps in which the weights move, then five that are not applied.
    after = disturbed(run, scenes, "11,13,15,17,19", "loss", "checkpoint.every=100", launch=None)
    assert after.returncode == 0, after.stderr[-3000:]
    assert [event["to_step"] for event in of_kind(run, "rollback")] == [4]
    saved_again = run / "checkpoints" / "step_00000004"
    assert json.loads((saved_again / "state.json").read_text())["progress"]["block"] == 20
    restored, original = checkpoint_tensors(saved_again), checkpoint_tensors(tmp_path / "before" / "step_00000004")
    assert restored.keys() == original.keys()
    assert all(torch.equal(restored[name], original[name]) for name in original)


def test_a_run_that_does_not_recover_ends_with_a_diagnosis(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    bad = ",".join(map(str, range(8, 100)))
    completed = disturbed(run, scenes, bad, "loss", "recovery.rollback_after=2", launch=None)
    assert completed.returncode == 5, completed.stderr[-3000:]
    assert [event["to_step"] for event in of_kind(run, "rollback")] == [4, 2, 2], "each time further"
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["code"], outcome["step"]) == (5, 4)
    assert "The run went back 3 times, further each time" in outcome["reason"]
    assert "loss not finite on rank 0" in completed.stderr


def test_a_spike_is_skipped(scenes: Path, tmp_path: Path) -> None:
    """Ten times the median of the last three steps; the planted loss is a thousand times what it was."""
    rule = ["recovery.spike_factor=10", "recovery.spike_window=3"]
    run = tmp_path / "run"
    completed = disturbed(run, scenes, "2,11", "spike", *rule, launch=None)
    assert completed.returncode == 0, completed.stderr[-3000:]
    skipped = of_kind(run, "skipped_step")
    assert [event["step"] for event in skipped] == [6], "at block 2 there was too little to compare with"
    assert "recovery.spike_factor times the median" in skipped[0]["reason"]
    state = json.loads((run / "checkpoints" / "step_00000012" / "state.json").read_text())["progress"]
    assert len(state["losses"]) == len(state["grad_norms"]) == 3
