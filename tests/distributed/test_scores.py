"""A score does not change by looking at it: started again, on any number of processes, a run keeps what it measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mfm_dist.checkpoint.files import read_checkpoint
from tests.helpers.runs import result_of, run_train, tiny_overrides

LAUNCHES = {1: None, 2: "cpu_ddp"}
"""Launch file by number of processes."""


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Finished runs of two steps, by number of processes."""
    folder = tmp_path_factory.mktemp("trained")
    for processes, launch in LAUNCHES.items():
        run = folder / str(processes) / "run"
        completed = run_train([*tiny_overrides(scenes, run), "train.steps=2"], launch=launch)
        assert completed.returncode == 0, completed.stderr
    return {processes: folder / str(processes) / "run" for processes in LAUNCHES}


def files(run: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file, but for the one that a start is to write."""
    found = (path for path in run.rglob("*") if path.is_file() and path.name != "outcome.json")
    return {str(path.relative_to(run)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def miou(run: Path, step: int) -> float:
    scores: dict[str, float] = json.loads((run / "eval" / f"step_{step:08d}.json").read_text())
    return scores["miou"]


def test_the_ranks_statistics_differ(trained: dict[int, Path]) -> None:
    """Without that, nothing below could fail."""
    checkpoint = read_checkpoint(trained[2] / "checkpoints" / "step_00000002")
    mean, own = checkpoint.tensors("student"), [checkpoint.buffers(rank) for rank in range(2)]
    name = next(key for key in mean if key.endswith("running_mean"))
    assert torch.equal(mean[name], (own[0][name] + own[1][name]) / 2)
    assert not torch.equal(mean[name], own[0][name])


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (2, 2)])
def test_a_finished_run_started_again_writes_its_outcome_alone(
    trained: dict[int, Path], scenes: Path, tmp_path: Path, before: int, now: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[before], run)
    shutil.rmtree(run / "heartbeats", ignore_errors=True)
    (run / "outcome.json").write_text('{"code": 0, "reason": "done", "step": 2, "job": "1"}')
    untouched = files(run)
    arguments = [*tiny_overrides(scenes, run), "train.steps=2"]
    completed = run_train(arguments, launch=LAUNCHES[now], environment={"SLURM_JOB_ID": "7"})
    assert completed.returncode == 0, completed.stderr
    last, best = round(miou(run, 2), 4), round(max(miou(run, 0), miou(run, 2)), 4)
    found = result_of(completed.stdout)
    assert (found["run"], found["step"], found["miou"], found["best_miou"]) == (str(run), 2, last, best)
    assert files(run) == untouched
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome == {"code": 0, "reason": "done", "step": 2, "job": "7"}


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_a_run_that_shrinks_or_grows_is_scored_as_before(
    trained: dict[int, Path], scenes: Path, tmp_path: Path, before: int, now: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[before], run)
    measured = miou(run, 2)
    (run / "eval" / "step_00000002.json").unlink()  # as after a kill between a checkpoint and its evaluation
    completed = run_train([*tiny_overrides(scenes, run), "eval.every=2"], launch=LAUNCHES[now])
    assert completed.returncode == 0, completed.stderr
    assert f"written by {before} processes, read by {now}" in completed.stdout
    assert miou(run, 2) == measured
    assert result_of(completed.stdout)["step"] == 4


def test_a_finished_run_of_another_configuration_is_refused(
    trained: dict[int, Path], scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    completed = run_train([*tiny_overrides(scenes, run), "train.steps=2", "seed=5"])
    assert completed.returncode == 2
    assert "seed=5" in completed.stderr
