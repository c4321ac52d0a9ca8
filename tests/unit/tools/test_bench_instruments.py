"""What the instruments cost: a logged step is told from a plain one; how long either takes is never asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.runs import DEFAULTS, tiny_overrides
from tools.bench_instruments import main


def test_the_line_and_the_record(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*DEFAULTS, "--rounds", "2", "--warmup", "1", "--json", str(tmp_path / "record.json")]
    run = [*tiny_overrides(scenes, tmp_path / "run"), "log.every=50"]
    assert main([*arguments, *run]) == 0
    assert "at log.every=50" in capsys.readouterr().out
    found = json.loads((tmp_path / "record.json").read_text())
    assert [set(one) for one in found["rounds"]] == [{"plain", "logged"}] * 2
    assert found["share_of_all_steps"] == pytest.approx((found["logged_over_plain"] - 1) / 50)
    assert not (tmp_path / "run").exists()
    assert main([*arguments, *run, "mfm.enabled=false"]) == 2
    assert "mfm.enabled=true" in capsys.readouterr().err
