"""What the tools have in common on their command lines: one run, told by files and overrides."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mfm_dist.config.arguments import add_run_arguments, config_arguments
from tools.seeds import refuse_other_settings, train


def test_files_and_overrides_may_be_mixed_and_files_are_passed_on_in_their_order() -> None:
    parser = argparse.ArgumentParser()
    add_run_arguments(parser, "the quickstart")
    assert "(default: the quickstart)" in parser.format_help()
    given = parser.parse_intermixed_args(["seed=1", "--config", "b.yaml", "train.steps=2", "--config", "a.yaml"])
    assert (given.config, given.overrides) == ([Path("b.yaml"), Path("a.yaml")], ["seed=1", "train.steps=2"])
    assert config_arguments(given.config) == ["--config", "b.yaml", "--config", "a.yaml"]
    assert parser.parse_intermixed_args([]).config is None


def test_a_run_over_seeds_is_told_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    files[0].write_text("train: {steps: 3}\n")
    files[1].write_text("optim: {lr: 0.5}\n")
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=5)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match="exit code 5"):
        train(files, tmp_path / "run", ["seed=1"])
    (command,) = commands
    assert command[1:] == ["-m", "mfm_dist.train", *config_arguments(files), f"run.folder={tmp_path}/run", "seed=1"]
    (tmp_path / "run" / "config.yaml").write_text("train: {steps: 3}\noptim: {lr: 0.5}\nseed: 1\n")
    refuse_other_settings(files, tmp_path / "run", ["seed=1"])
    with pytest.raises(RuntimeError, match=r"optim\.lr: 0\.5 -> 6e-05"):
        refuse_other_settings(files[:1], tmp_path / "run", ["seed=1"])
