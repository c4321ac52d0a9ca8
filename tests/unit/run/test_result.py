"""What a run says last: the score of its last step, and beside it the best of all evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mfm_dist.run.folder import RunFolder
from tests.helpers.runs import result_of


def test_the_result_has_the_last_and_the_best_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "run", writes=True)
    run.create()
    (run.path / "eval").mkdir()
    for step, miou in [(0, 4.0), (10, 41.123456), (20, 41.123456), (30, 40.0), (40, None)]:
        run.evaluation(step).write_text(json.dumps({"step": step, "miou": miou}))
    run.evaluation(50).write_text('{"step": 50, "mi')  # half written by who else knows what
    run.end(0, "done", 30, miou=40.0)
    expected = {"run": str(run.path), "step": 30, "miou": 40.0, "best_miou": 41.1235, "best_step": 10}
    assert result_of(capsys.readouterr().out) == expected


def test_without_scores_there_is_no_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "run", writes=True)
    run.create()
    run.end(0, "done", 30)
    found = result_of(capsys.readouterr().out)
    assert [found[name] for name in ("miou", "best_miou", "best_step")] == [None, None, None]
