"""The same samples and crops for any world size and workers, across a resume that changes both, with every sampling."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from mfm_dist.batch import UDABatch
from mfm_dist.config.schema import DataSection, RareClassSection, Sets
from mfm_dist.data.concatenated import ConcatenatedReader
from mfm_dist.data.pipeline import TrainPipeline
from mfm_dist.data.reader import ShardReader
from tests.helpers.shards import assert_equal, damage, write_set

BLOCKS_PER_STEP = 8
PLAIN = DataSection(crop=(16, 24), workers=0)
SETTINGS = {
    "plain": PLAIN,
    "rare classes": replace(PLAIN, rare_class_sampling=RareClassSection(enabled=True, temperature=0.1, min_pixels=100)),
    "lanes": replace(PLAIN, lanes=8, lane_window=3),
    "lanes over a list": replace(PLAIN, lanes=8, lane_window=3, source=("source", "target_labelled")),
    "shares": replace(PLAIN, source={"source": 0.7, "target_labelled": 0.3}, target={"source": 1, "target": 2}),
    "rare classes by shares": replace(
        PLAIN,
        source={"source": 0.5, "target_labelled": 0.5},
        rare_class_sampling=RareClassSection(enabled=True, temperature=0.1, min_pixels=50),
    ),
    "few labelled": replace(PLAIN, target_labelled="target_labelled"),
    "resized": replace(PLAIN, source_resize=(28, 40), scale_range=(0.7, 1.5), target_margins=(2, 3, 4, 5)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elastic")
    source = write_set(root / "source", count=23, shard_size=5)
    target = write_set(root / "target", count=11, shard_size=4, labelled=False)
    few = write_set(root / "target_labelled", count=6, shard_size=4)
    damage(source, 3, 11)
    damage(target, 7)
    damage(few, 2)
    return root


def blocks(folders: Path, data: DataSection, *, steps: range, world_size: int, workers: int = 0) -> list[UDABatch]:
    """The blocks of some steps, of all ranks, by their number."""

    def reader(name: str, sets: Sets) -> ShardReader | ConcatenatedReader:
        if isinstance(sets, str):  # the default
            return ShardReader(folders / name)
        shares = list(sets.values()) if isinstance(sets, dict) else None
        return ConcatenatedReader([ShardReader(folders / name) for name in sets], shares)

    found = []
    for rank in range(world_size):
        pipeline = TrainPipeline(
            source=reader("source", data.source),
            target=reader("target", data.target),
            target_labelled=ShardReader(folders / data.target_labelled) if data.target_labelled else None,
            seed=5,
            data=replace(data, workers=workers),
            micro_batch=2,
            rank=rank,
            world_size=world_size,
            blocks_per_step=BLOCKS_PER_STEP,
            first_block=steps.start * BLOCKS_PER_STEP,
        )
        found += islice(pipeline, len(steps) * BLOCKS_PER_STEP // world_size)
    return sorted(found, key=lambda block: block.block)


WORLD_SIZES = [(1, 8), (2, 4), (4, 1), (8, 2)]
WORKERS = [(0, 3), (1, 0), (3, 1)]
"""Before and after a resume."""
CASES = [(name, sizes, workers) for name in ("plain", "lanes") for sizes in WORLD_SIZES for workers in WORKERS]
CASES += [(name, (4, 2), (1, 3)) for name in SETTINGS]


@pytest.mark.parametrize(("name", "world_sizes", "workers"), CASES)
def test_blocks_are_equal_for_every_world_size_and_workers_and_a_resume_that_changes_both(
    folders: Path, name: str, world_sizes: tuple[int, int], workers: tuple[int, int]
) -> None:
    data = SETTINGS[name]
    expected = blocks(folders, data, steps=range(4), world_size=1)
    assert any(block.bad_samples for block in expected)
    assert len({tuple(block.source_label.flatten().tolist()) for block in expected}) == len(expected)
    found = blocks(folders, data, steps=range(2), world_size=world_sizes[0], workers=workers[0])
    found += blocks(folders, data, steps=range(2, 4), world_size=world_sizes[1], workers=workers[1])
    assert_equal(found, expected)


FEW = [(shards, world_size, 0) for shards in (1, 3, 7) for world_size in (1, 2, 4)]


@pytest.mark.parametrize(("shards", "world_size", "workers"), [*FEW, (1, 1, 2), (1, 4, 2), (3, 2, 2), (7, 4, 3)])
def test_few_or_unequal_shards_are_covered_without_a_hang(
    tmp_path: Path, shards: int, world_size: int, workers: int
) -> None:
    folder = write_set(tmp_path / "few", count=4 * shards, shard_size=4, height=16, width=16)
    data = DataSection(crop=(16, 16), workers=workers)
    found = []
    for rank in range(world_size):
        pipeline = TrainPipeline(
            source=ShardReader(folder), target=ShardReader(folder), seed=0, data=data,
            micro_batch=1, rank=rank, world_size=world_size, blocks_per_step=4,
        )  # fmt: skip
        found += islice(pipeline, 4 * shards // world_size)
    labels = {ShardReader(folder).read(n).label.numpy().tobytes() for n in range(4 * shards)}  # type: ignore[union-attr]
    flipped = {ShardReader(folder).read(n).label.flip(-1).numpy().tobytes() for n in range(4 * shards)}  # type: ignore[union-attr]
    seen = [block.source_label.numpy().tobytes() for block in found]
    assert len(seen) == len(set(seen)) == 4 * shards
    assert set(seen) <= labels | flipped
