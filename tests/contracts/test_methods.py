"""Every file of mfm_dist/methods that is a method trains, with and without MFM. A new file is tested by being there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.data.pipeline import TrainPipeline
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import ConfigError
from mfm_dist.methods import build_method, method_names
from mfm_dist.optim import build_optimizer
from tests.conftest import tiny_overrides


@pytest.mark.parametrize("mfm", ["true", "false"])
@pytest.mark.parametrize("name", method_names())
def test_method_trains_three_steps(name: str, mfm: str, scenes: Path, tmp_path: Path) -> None:
    config = load_config(None, [*tiny_overrides(scenes, tmp_path), f"method.name={name}", f"mfm.enabled={mfm}"])
    module = build_train_module(config)
    labelled = "game_train" if module.method.supervised_on == "source" else "camera_train"
    pipeline = TrainPipeline(
        source=ShardReader(scenes / labelled), target=ShardReader(scenes / "camera_train"), seed=0, crop=(64, 64),
        micro_batch=2, rank=0, world_size=1, blocks_per_step=1, workers=0,
    )  # fmt: skip
    optimizer = build_optimizer(module, config.optim)
    before = [p.detach().clone() for p in module.student.parameters()]
    for _, batch in zip(range(3), pipeline, strict=False):
        output = module(batch, 1.0)
        assert torch.isfinite(output.total)
        assert set(module.method.terms()) <= set(output.losses)
        assert ("mfm" in output.losses) == (mfm == "true")
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, module.student.parameters(), strict=True)]
    assert all(moved)


def test_an_unknown_method_is_told_with_what_exists() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'dacs'\? There are: dacs, oracle, source_only"):
        build_method(load_config(None, ["method.name=dac"]))
