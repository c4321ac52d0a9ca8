"""Several seeds on one node, as slurm/pack.sh starts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mfm_dist.cluster.pack import gpus_here, main
from mfm_dist.report.seeds import read_scores
from tests.helpers.runs import REPOSITORY, tiny_overrides


def test_each_seed_trains_in_its_own_folder_and_none_twice(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(REPOSITORY)
    run = tmp_path / "sweep"
    settings = ["tests/defaults.yaml", *tiny_overrides(scenes, tmp_path), "train.steps=1", "eval.overlays=0"]
    command = ["--seeds", "0", "3", "--", str(run), *settings]
    assert main(command) == 0
    scores, unfinished = read_scores(run)
    assert (sorted(scores), unfinished) == ([0, 3], [])
    config = (run / "seed_3" / "config.yaml").read_text()
    assert "seed: 3\n" in config
    before = (run / "seed_0" / "metrics.jsonl").read_text()
    assert main(["--seeds", "0", "--", str(run), *settings, "train.stepz=1"]) == 2, "a mistake is no success"
    assert "train.steps" in (run / "seed_0" / "train.log").read_text()
    assert (run / "seed_0" / "metrics.jsonl").read_text() == before
    assert json.loads((run / "seed_0" / "outcome.json").read_text())["code"] == 0


def test_gpus_are_those_that_the_job_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert gpus_here() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus_here() == []
