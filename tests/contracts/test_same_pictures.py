"""On the shipped quickstart configuration, every world size and worker count sees the same pictures, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.data.pipeline import TrainPipeline
from mfm_dist.data.reader import ShardReader
from mfm_dist.methods.dacs import mix_draws, mixed_batch, with_mixed_image
from mfm_dist.methods.mfm import keyed_masks
from mfm_dist.methods.self_training import PseudoTarget
from mfm_dist.models.preprocessing import normalise
from mfm_dist.shards.scene_shards import write_scenes
from tests.helpers.modules import inputs_with
from tests.helpers.runs import REPOSITORY

STEPS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("scenes")
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", [f"data.root={root}"])
    write_scenes(root, train=9, val=1, size=config.scenes.size, seed=0, workers=1, report=lambda _: None)
    return config


def pictures(config: RunConfig, world_size: int, workers: int) -> dict[int, list[Tensor]]:
    """By block: all that is drawn for it, up to what goes into the network."""
    seen = {}
    for rank in range(world_size):
        pipeline = TrainPipeline(
            source=ShardReader(config.data.root / config.data.source),
            target=ShardReader(config.data.root / config.data.target),
            seed=config.seed,
            data=replace(config.data, workers=workers),
            micro_batch=config.train.micro_batch,
            rank=rank,
            world_size=world_size,
            blocks_per_step=config.blocks_per_step,
        )
        for _, batch in zip(range(STEPS * config.blocks_per_step // world_size), pipeline, strict=False):
            label, valid = batch.source_label.long().flip(0), batch.target_valid
            inputs = inputs_with(
                source_image=normalise(batch.source_image),
                source_label=batch.source_label,
                target_image=normalise(batch.target_image),
                pseudo=PseudoTarget(label, valid.float(), valid.float(), valid),
                seed=config.seed,
                block=batch.block,
                positions=batch.positions,
            )
            inputs = replace(inputs, draws=mix_draws(inputs, config.self_training))
            mixed = mixed_batch(with_mixed_image(inputs, config.self_training))
            masks = keyed_masks(inputs, config.rebuilder.grid, config.mfm)
            seen[batch.block] = [batch.source_image, batch.source_label, batch.target_image, *mixed, masks]
    return seen


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)])
def test_pictures_mixing_and_masks_are_equal(config: RunConfig, world_size: int, workers: int) -> None:
    alone, shared = pictures(config, 1, 0), pictures(config, world_size, workers)
    assert sorted(alone) == sorted(shared) == list(range(STEPS * config.blocks_per_step))
    for block, tensors in alone.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, shared[block], strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])
