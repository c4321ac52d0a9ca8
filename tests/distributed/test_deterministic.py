"""Bit for bit on a GPU with ``train.deterministic``: from run to run, and across a stop."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import assert_equal_bits, metrics_of, run_train, tiny_overrides

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
MIT = ["model.backbone=mit_b0", "model.backbone_options={drop_path_rate: 0.1}"]


@pytest.mark.parametrize("network", [[], MIT], ids=["resnet", "mit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_have_the_same_bits_and_so_has_one_that_goes_on(
    network: list[str], precision: str, scenes: Path, tmp_path: Path
) -> None:
    def train(name: str, steps: int) -> Path:
        run = tmp_path / name
        asked = ["train.deterministic=true", f"train.precision={precision}", f"train.steps={steps}"]
        visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
        completed = run_train([*tiny_overrides(scenes, run), *network, *asked], environment=visible)
        assert completed.returncode == 0, completed.stderr[-3000:]
        assert torch.cuda.get_device_name(0) in completed.stdout
        return run

    first, second = train("first", 4), train("second", 4)
    assert_equal_bits(first, second)
    assert metrics_of(first) == metrics_of(second)
    train("stopped", 2)
    assert_equal_bits(train("stopped", 4), first)
