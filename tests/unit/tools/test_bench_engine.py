"""What tools/bench_engine.py compares; how long anything takes is never asserted."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_dist.batch import UDABatch
from mfm_dist.classes import ClassSet
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.start import start_engine
from mfm_dist.profiling.step import random_batch
from mfm_dist.train_module import TrainModule
from tests.helpers.modules import SMALL, config_with
from tools import bench_engine, raw_loops
from tools.bench_engine import engine_loop, main, summary, table
from tools.raw_loops import bare_loop

SMALL_RUN = ["--config", "tests/defaults.yaml", *SMALL, "data.crop=64x64", "train.global_batch=4"]


def weights(module: TrainModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_engine_and_bare_loop_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(
        "data.crop=64x64", "train.global_batch=4", "train.clip_norm=0.5", "optim.lr=1e-2", "optim.eps=1e-4"
    )
    built: list[TrainModule] = []

    def build(config: RunConfig, classes: ClassSet) -> TrainModule:
        built.append(honest_build(config, classes))
        return built[-1]

    honest_build: Any = raw_loops.build_train_module
    for place in (raw_loops, bench_engine):
        monkeypatch.setattr(place, "build_train_module", build)
    engine = start_engine(config)
    ways = [engine_loop(config, engine), bare_loop(config, engine.device, 1)]
    batches: list[UDABatch] = [random_batch(config, number) for number in range(2)]
    before = weights(built[0])
    for _ in range(2):
        for way in ways:
            way.step(deepcopy(batches))
    ours, bare = (weights(module) for module in built)
    assert (ours - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, bare, rtol=0, atol=1e-6)


def test_medians_are_of_ratios_within_a_round() -> None:
    rounds = [{"engine": 2.0, "bare": 1.0}, {"engine": 3.0, "bare": 4.0}, {"engine": 9.0, "bare": 6.0}]
    found = summary(rounds, [{"engine": 0.1, "bare": 0.2}])
    assert found["save_seconds"] == {"engine": 0.1, "bare": 0.2}
    assert found["seconds"] == {"engine": 3.0, "bare": 4.0}
    assert found["ratios"] == {"engine / bare": {"median": 1.5, "quartile_low": 1.125, "quartile_high": 1.75}}
    assert table({"ddp": found}).splitlines()[-1] == (
        "| ddp | 3000.0 |  | 4000.0 | 1.500 (1.125 to 1.750) |  |  | 100.0 |  | 200.0 |"
    )


@pytest.mark.campaign
def test_two_deepspeed_engines_and_ddp_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "engine.json"
    assert main(["--starts", "zero3", "--steps", "2", "--warmup", "1", "--json", str(path), *SMALL_RUN]) == 0
    assert "| zero3 |" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert set(found["starts"]["zero3"]["ratios"]) == {
        "engine / bare",
        "engine / raw DeepSpeed",
        "raw DeepSpeed / bare",
    }
    rounds = found["rounds"]["zero3"]
    assert [set(one) for one in rounds["steps"]] == [{"engine", "raw DeepSpeed", "bare"}] * 2
    assert [set(one) for one in rounds["saves"]] == [{"engine", "raw DeepSpeed", "bare"}] * bench_engine.SAVES


def test_what_has_no_twin_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL_RUN, "train.precision=bf16_weights"]) == 2
    assert "has no twin" in capsys.readouterr().err
