"""One step function, several ways to run it: one process, DDP, ZeRO. Same samples, same losses, same weights.

SGD and not AdamW, and movements far above rounding: with AdamW at small rates such a test could not fail.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from tests.conftest import run_train, tiny_overrides

# A random teacher is sure of nothing: above a threshold of 0 the MFM term, and the Rebuilder's gradient, would be 0.
SGD = ["optim.name=sgd", "optim.lr=0.05", "optim.decoder_lr_factor=1", "optim.rebuilder_lr=0.5", "train.clip_norm=1.0",
       "self_training.pseudo_threshold=0"]  # fmt: skip
LARGER = [*SGD, "train.global_batch=8"]
"""Four micro-batches a step, so that gradients add up within a process too."""


State = dict[str, dict[str, torch.Tensor]]
"""Tensors by name of student, teacher and Rebuilder."""


def trained(scenes: Path, folder: Path, *overrides: str, launch: str | None) -> dict[str, Any]:
    """Train four steps; the last checkpoint's tensors and the metrics."""
    completed = run_train([*tiny_overrides(scenes, folder), *overrides], launch=launch)
    assert completed.returncode == 0, completed.stderr[-4000:]
    checkpoint = folder / "checkpoints" / "step_00000004"
    state = {name: load_file(checkpoint / f"{name}.safetensors") for name in ("student", "teacher", "rebuilder")}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"state": state, "metrics": metrics, "checkpoint": checkpoint}


@pytest.fixture(scope="module")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(scenes, tmp_path_factory.mktemp("alone"), *SGD, "train.steps=4", launch=None)


def assert_same_training(run: dict[str, Any], reference: dict[str, Any], initial: State) -> None:
    """Student, teacher and Rebuilder each within 1e-4 of its largest movement, which is at least 1e-3."""
    for part, tensors in reference["state"].items():
        parameters = [name for name in tensors if "running_" not in name and "num_batches" not in name]
        movement = max(float((tensors[n] - initial[part][n]).abs().max()) for n in parameters)
        assert movement > 1e-3, part
        difference = max(float((tensors[n] - run["state"][part][n]).abs().max()) for n in parameters)
        assert difference <= 1e-4 * movement, f"{part}: {difference} against a movement of {movement}"
    for ours, theirs in zip(run["metrics"], reference["metrics"], strict=True):
        for key in ("loss/total", "loss/source", "loss/mixed", "loss/mfm", "grad_norm/total"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


@pytest.fixture(scope="module")
def initial(scenes: Path) -> State:
    module = build_train_module(load_config(None, tiny_overrides(scenes, Path("unused"))))
    assert module.teacher is not None
    assert module.rebuilder is not None
    parts = {"student": module.student, "teacher": module.teacher.segmentor, "rebuilder": module.rebuilder}
    return {name: part.state_dict() for name, part in parts.items()}


@pytest.mark.parametrize("launch", ["cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_two_processes_train_as_one(
    launch: str, scenes: Path, tmp_path: Path, alone: dict[str, Any], initial: State
) -> None:
    run = trained(scenes, tmp_path, *SGD, launch=launch)
    assert_same_training(run, alone, initial)


@pytest.fixture(scope="module")
def larger_alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(scenes, tmp_path_factory.mktemp("larger"), *LARGER, launch=None)


@pytest.mark.parametrize("launch", ["cpu_ddp", "cpu_zero2"])
def test_gradients_add_up_over_the_micro_batches_of_a_step(
    launch: str, scenes: Path, tmp_path: Path, larger_alone: dict[str, Any], initial: State
) -> None:
    """Four micro-batches a step: all in one process, or two in each of two."""
    assert_same_training(trained(scenes, tmp_path, *LARGER, launch=launch), larger_alone, initial)


@pytest.mark.parametrize(
    ("launch", "overrides"),
    [
        ("cpu_ddp", ["memory.lean=true"]),
        ("cpu_zero2", ["memory.lean=true"]),
        ("cpu_zero3", ["memory.lean=true", "memory.checkpoint_backbone=true"]),
    ],
)
def test_less_memory_trains_the_same(
    launch: str, overrides: list[str], scenes: Path, tmp_path: Path, larger_alone: dict[str, Any], initial: State
) -> None:
    """Six backwards a step in each process, most of which leave the Rebuilder out."""
    assert_same_training(trained(scenes, tmp_path, *LARGER, *overrides, launch=launch), larger_alone, initial)


def test_another_sample_is_noticed(scenes: Path, tmp_path: Path, alone: dict[str, Any], initial: State) -> None:
    """The comparison above fails for a run on other data, so it can fail."""
    other = trained(scenes, tmp_path, *SGD, "seed=1", launch=None)
    with pytest.raises(AssertionError):
        assert_same_training(other, alone, initial)


@pytest.fixture(scope="module")
def half(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under ZeRO-2 that lost its last checkpoint, so that step 2 is the newest."""
    folder = tmp_path_factory.mktemp("half") / "run"
    trained(scenes, folder, *SGD, launch="cpu_zero2")
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    return folder


@pytest.mark.parametrize("launch", [None, "cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_a_zero2_run_resumes_at_any_world_size_and_stage(
    launch: str | None,
    half: Path,
    scenes: Path,
    tmp_path: Path,
    alone: dict[str, Any],
    initial: State,
) -> None:
    """Checkpoints hold whole tensors by name, momentum included: nothing depends on who wrote them."""
    shutil.copytree(half, tmp_path / "run")
    assert_same_training(trained(scenes, tmp_path / "run", *SGD, launch=launch), alone, initial)
