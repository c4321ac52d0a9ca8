"""Three sources in given shares, two targets, and a few labelled target images: trained, resumed, refused, reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mfm_dist import train
from mfm_dist.report.__main__ import main as report
from tests.helpers.runs import DEFAULTS, metrics_of, run_train, tiny_overrides

MIXED = [
    "data.source={game_train: 2, game_val: 1, camera_val: 1}",
    "data.target=[camera_train, camera_val]",
    "data.target_labelled=camera_train",
    "train.steps=20",
    "checkpoint.every=10",
    "eval.every=20",
]


@pytest.fixture(scope="module")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps at once, in one process."""
    folder = tmp_path_factory.mktemp("several") / "whole"
    completed = run_train([*tiny_overrides(scenes, folder), *MIXED])
    assert completed.returncode == 0, completed.stderr
    shares = "data.source: game_train 50.0 % (12), game_val 25.0 % (5), camera_val 25.0 % (5)"
    assert shares in completed.stdout
    return folder


def test_two_processes_that_resume_in_the_middle_see_the_same(scenes: Path, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step_00000020")
    (run / "eval/step_00000020.json").unlink()
    completed = run_train([*tiny_overrides(scenes, run), *MIXED], launch="cpu_zero2")
    assert completed.returncode == 0, completed.stderr
    assert "resuming" in completed.stdout
    ours, expected = metrics_of(run), metrics_of(whole)
    assert [line["step"] for line in ours] == list(range(1, 21))
    for name in ("loss/source", "loss/mixed", "loss/target_labelled"):
        values = [line[name] for line in expected]
        assert [line[name] for line in ours] == pytest.approx(values, rel=1e-3)
        assert len(set(values)) == 20


def test_other_shares_are_refused_on_resume(scenes: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*DEFAULTS, *tiny_overrides(scenes, whole), *MIXED, "train.steps=24"]
    assert train.main([*words, "data.source.game_train=3"]) == 2
    assert "the labelled shards are not those that" in capsys.readouterr().err


def test_the_page_names_the_sets(whole: Path) -> None:
    assert report([str(whole), "--images", "1"]) == 0
    page = (whole / "report.html").read_text()
    assert "game_train (50 %) + game_val (25 %) + camera_val (25 %) to camera_train + camera_val" in page
