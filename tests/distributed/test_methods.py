"""Every method, with and without MFM, and every ablation of MFM, under ZeRO-3: it trains, and goes on from a
checkpoint with the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.methods import ABLATIONS, EXTRA, METHODS
from tests.helpers.runs import assert_equal_bits, metrics_of, run_train, tiny_overrides


@pytest.mark.campaign
@pytest.mark.parametrize("mfm", [True, False], ids=["mfm", "plain"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_goes_on_under_zero3(name: str, mfm: bool, scenes: Path, tmp_path: Path) -> None:
    goes_on([*METHODS[name], f"mfm.enabled={mfm}"], scenes, tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("overrides", ABLATIONS, ids=lambda o: o[0])
@pytest.mark.parametrize("name", ["dacs", "hrda"])
def test_an_ablation_goes_on_under_zero3(name: str, overrides: list[str], scenes: Path, tmp_path: Path) -> None:
    goes_on([f"method.name={name}", "mfm.enabled=true", *overrides], scenes, tmp_path)


def goes_on(overrides: list[str], scenes: Path, tmp_path: Path) -> None:
    """Train, forget the last checkpoint of a copy, train that again."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def train(run: Path) -> str:
        settings = [*tiny_overrides(scenes, run), *EXTRA, *overrides]
        completed = run_train(settings, launch="cpu_zero3", timeout=600)
        assert completed.returncode == 0, completed.stderr[-4000:]
        return completed.stdout

    train(whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000004")
    assert f"resuming {resumed / 'checkpoints' / 'step_00000002'}" in train(resumed)
    assert_equal_bits(whole, resumed)
    assert metrics_of(whole) == metrics_of(resumed)
