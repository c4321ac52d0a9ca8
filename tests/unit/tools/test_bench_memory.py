"""What tools/bench_memory.py reports; how long anything takes is never asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.modules import SMALL
from tools.bench_memory import SETTINGS, main


def test_lean_and_checkpointing_need_less_each_and_least_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "memory.json"
    small = [*SMALL, "model.backbone=mit_b0", "model.backbone_options={}", "data.crop=128x128"]
    assert main(["--rounds", "1", "--json", str(path), *small]) == 0
    assert "| checkpoint_backbone |" in capsys.readouterr().out
    found = json.loads(path.read_text())["settings"]
    assert set(found) == set(SETTINGS)
    # Beside activations the peak has the gradients, as large as the trainable weights, in every setting.
    peaks = {name: one["peak_mib"] for name, one in found.items()}
    assert peaks["both"] < peaks["lean"] < peaks["plain"]
    assert peaks["both"] < peaks["checkpoint_backbone"] < peaks["plain"]


def test_it_runs_one_process_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([]) == 2
    assert "not with accelerate launch" in capsys.readouterr().err
