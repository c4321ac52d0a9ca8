"""Bit for bit on a GPU with ``train.deterministic``: from run to run, across a stop, and where a graph is replayed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import assert_equal_bits, metrics_of, run_train, tiny_overrides

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
MIT = ["model.backbone=mit_b0", "model.backbone_options={drop_path_rate: 0.1}"]


HRDA = ["method.name=hrda", "hrda.attention_options={width: 8}", "mfm.view=fused"]


def trained(scenes: Path, run: Path, steps: int, *settings: str) -> Path:
    # Sure of all pseudo-labels: with random weights all losses on targets would be 0, and their gradients no test.
    asked = ["train.deterministic=true", "self_training.pseudo_threshold=0", f"train.steps={steps}", *settings]
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    completed = run_train([*tiny_overrides(scenes, run), *asked], environment=visible)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert torch.cuda.get_device_name(0) in completed.stdout
    return run


@pytest.mark.parametrize("network", [[], MIT], ids=["resnet", "mit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_have_the_same_bits_and_so_has_one_that_goes_on(
    network: list[str], precision: str, scenes: Path, tmp_path: Path
) -> None:
    def train(name: str, steps: int) -> Path:
        return trained(scenes, tmp_path / name, steps, *network, f"train.precision={precision}")

    first, second = train("first", 4), train("second", 4)
    assert_equal_bits(first, second)
    assert metrics_of(first) == metrics_of(second)
    train("stopped", 2)
    assert_equal_bits(train("stopped", 4), first)


@pytest.mark.parametrize("network", [[], MIT, HRDA], ids=["resnet", "mit", "hrda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_replayed_by_cuda_graphs_leave_the_same_bits(
    network: list[str], precision: str, scenes: Path, tmp_path: Path
) -> None:
    """Two a step, all of one kind but for their layout: most are replayed, also after the stop, and every loss is."""
    settings = [*network, f"train.precision={precision}", "debug.check_gradients=false", "self_training.jitter_prob=1"]
    plain = trained(scenes, tmp_path / "plain", 8, *settings)
    replayed = trained(scenes, tmp_path / "replayed", 8, *settings, "train.cuda_graph=true")
    assert_equal_bits(replayed, plain)
    assert metrics_of(replayed) == metrics_of(plain)
    trained(scenes, tmp_path / "stopped", 4, *settings, "train.cuda_graph=true")
    stopped = trained(scenes, tmp_path / "stopped", 8, *settings, "train.cuda_graph=true")
    assert_equal_bits(stopped, plain)
