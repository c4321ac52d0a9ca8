"""Means over seeds and differences paired by seed, of folders as a sweep leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mfm_dist.report.paired import paired_difference
from mfm_dist.report.seeds import main


def finished(run: Path, miou: float) -> None:
    (run / "eval").mkdir(parents=True)
    (run / "outcome.json").write_text(json.dumps({"code": 0, "reason": "done", "step": 4}))
    (run / "eval" / "step_00000002.json").write_text(json.dumps({"miou": 99.0}))
    (run / "eval" / "step_00000004.json").write_text(json.dumps({"miou": miou}))


def test_sweeps_are_compared_over_the_seeds_that_both_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (without, with_mfm) in enumerate([(20.0, 21.0), (22.0, 22.5), (24.0, 26.0)]):
        finished(tmp_path / "dacs" / f"seed_{seed}", without)
        finished(tmp_path / "mfm" / f"seed_{seed}", with_mfm)
    finished(tmp_path / "dacs" / "seed_7", 10.0)
    (tmp_path / "mfm" / "seed_7").mkdir()
    assert main([str(tmp_path / "dacs"), str(tmp_path / "mfm")]) == 0
    said = capsys.readouterr().out
    found = paired_difference([1.0, 0.5, 2.0])
    assert f"| +1.17 ± {found.half_width:.2f}, 3 seeds | {found.p:.3f} |" in said
    assert f"not finished, left out: {tmp_path / 'mfm' / 'seed_7'}" in said
    assert "7: 10.00 |" in said


def test_a_folder_without_seeds_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "has no run of a seed" in capsys.readouterr().err
