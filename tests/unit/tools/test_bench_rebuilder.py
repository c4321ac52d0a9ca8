"""The Rebuilder's memory by variant: the command runs, and hiding more costs the stable one less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench_rebuilder import main


def test_the_table_and_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--grids", "16", "--depths", "6", "--ratios", "0.25", "0.75", "--width", "64"]
    assert main([*sizes, "--json", str(tmp_path / "record.json")]) == 0
    assert "| 16 x 16 | 6 | 0.75 |" in capsys.readouterr().out
    few, many = json.loads((tmp_path / "record.json").read_text())["peak_mib"]
    assert few["paper"] == pytest.approx(many["paper"], rel=0.02)
    assert many["stable"] < 0.96 * few["stable"]
