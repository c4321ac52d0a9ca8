"""What tools/bench_ranks.py counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mfm_dist.config.loader import load_config
from mfm_dist.distributed.start import BUCKET
from tests.helpers.modules import SMALL
from tools import bench_ranks
from tools.bench_ranks import PROMISE, cases, count_state, table, total_bytes, with_ratios
from tools.live_tensors import GatheredPeak, count_once, tensors_in
from tools.ranks import run_ranks

SMALL_RUN = [*SMALL, "data.crop=64x64", "train.micro_batch=1"]


def test_the_cases() -> None:
    assert cases(["cpu_ddp", "cpu_zero2", "cpu_zero3"], ["fp32", "bf16_weights"], 2) == [
        ("cpu_ddp", "fp32", 2), ("cpu_zero2", "fp32", 2), ("cpu_zero3", "fp32", 2),
        ("cpu_zero2", "bf16_weights", 2), ("cpu_zero3", "bf16_weights", 2),
        ("cpu_zero3", "fp32", 4), ("cpu_zero3", "bf16_weights", 4),
    ]  # fmt: skip
    assert cases(["cpu_ddp"], ["bf16_weights"], 2) == []


def test_the_total_by_mode() -> None:
    numbers = {"trainable": 1000, "teacher": 100}
    assert total_bytes("cpu_ddp", "fp32", **numbers) == 16_400, "parameter, gradient, two moments; teacher"
    assert total_bytes("cpu_zero3", "bf16", **numbers) == 20_400, "and the master"
    assert total_bytes("cpu_zero3", "bf16_weights", **numbers) == 18_600, "parameter and a second teacher of 2 bytes"


def test_a_storage_counts_once_and_under_its_first_role() -> None:
    whole = torch.zeros(10)
    counted: set[int] = set()
    assert count_once([whole[:2], whole[5:], torch.zeros(0), torch.zeros(3, device="meta")], counted) == 40
    assert count_once([whole, torch.zeros(3, dtype=torch.bfloat16)], counted) == 6
    nested = {"a": [whole, {"b": whole}], "c": "no tensor"}
    assert [len(list(tensors_in(nested, depth=depth))) for depth in range(4)] == [0, 0, 1, 2]


def test_the_most_that_was_gathered_is_seen() -> None:
    module = nn.Linear(8, 8, bias=False)
    module.weight.ds_tensor = torch.zeros(32)  # type: ignore[assignment]
    peak = GatheredPeak(module, every=0.0)
    with peak:
        while peak.bytes == 0:
            pass
    assert peak.bytes == 4 * 64


@pytest.fixture
def one_process() -> dict[str, Any]:
    found = count_state(load_config(None, [*SMALL_RUN, "train.global_batch=1"]))
    assert found is not None
    return found


def test_one_process_holds_exactly_the_total(one_process: dict[str, Any]) -> None:
    trainable, teacher = 4 * one_process["trainable"], 4 * one_process["teacher"]
    state = one_process["after backward"]["state"]
    steps = state["optimiser"] - 2 * trainable  # Adam's own count, one number a tensor
    assert 0 < steps < 0.01 * trainable
    assert {**state, "optimiser": state["optimiser"] - steps} == {
        "parameters": trainable, "gradients": trainable, "optimiser": 2 * trainable, "master": 0, "teacher": teacher,
    }  # fmt: skip
    after = one_process["after step"]["state"]
    assert after == {**state, "gradients": 0}
    assert "gathered parameters" not in one_process["after backward"]["buffers"]
    case = with_ratios(("cpu_ddp", "fp32", 1), one_process)
    assert case["of_total"] == pytest.approx(1.0, abs=0.01)
    assert table([case]).splitlines()[-1].startswith("| ddp | 1 | fp32 | ")


def test_zero3_holds_its_share() -> None:
    found = run_ranks(
        Path(bench_ranks.__file__),
        [*SMALL_RUN, "train.precision=fp32", "train.global_batch=2"],
        launch="cpu_zero3",
        processes=2,
    )
    case = with_ratios(("cpu_zero3", "fp32", 2), found)
    assert 1.0 <= case["of_share"] <= PROMISE
    assert found["after backward"]["state"]["gradients"] > 0
    assert found["after backward"]["buffers"]["reduction bucket"] == 4 * BUCKET
    assert 0 < found["gathered_peak_bytes"] <= 4 * (found["trainable"] + found["teacher"])
