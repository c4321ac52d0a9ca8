"""What a run says that does not fit; that all ranks end is tested in tests/distributed/test_stability.py."""

from __future__ import annotations

import pytest
import torch

from mfm_dist.config.loader import load_config
from mfm_dist.run.out_of_memory import what_needs_less

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def tips(*overrides: str, device: torch.device = GPU, evaluating: bool = False) -> str:
    config = load_config(None, ["mfm.enabled=true", *overrides])
    return "; ".join(what_needs_less(config, device, evaluating=evaluating))


@pytest.mark.parametrize(
    ("key", "on"),
    [
        ("memory.lean", "true"),
        ("memory.checkpoint_backbone", "true"),
        ("memory.checkpoint_rebuilder", "true"),
        ("memory.offload_optimizer", "true"),
        ("train.precision", "bf16"),
    ],
)
def test_what_is_not_on_is_named_and_nothing_else(key: str, on: str) -> None:
    assert f"{key}={on}" in tips("train.precision=fp32")
    assert key not in tips("train.precision=fp32", f"{key}={on}")


def test_what_does_not_apply_is_not_named() -> None:
    assert "bf16" not in tips("train.precision=fp32", device=CPU)
    assert "checkpoint_rebuilder" not in tips("mfm.enabled=false")
    assert "train.micro_batch=2 or a smaller data.crop" in tips("train.micro_batch=4", "train.global_batch=4")
    assert "micro_batch" not in tips("train.micro_batch=1", "train.global_batch=1")
    assert "memory." not in tips(evaluating=True)
    for evaluating in (True, False):
        assert "cuda_graph" not in tips(evaluating=evaluating)
        assert tips("train.cuda_graph=true", evaluating=evaluating).startswith("train.cuda_graph=false")
    assert "eval.resize" in tips(evaluating=True)
