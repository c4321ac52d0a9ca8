"""Blocks are what their definition says, for any world size, workers and start; workers end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import threading
import time
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from mfm_dist.batch import UDABatch
from mfm_dist.config.schema import DataSection
from mfm_dist.data.blocks import REPLACEMENT_TRIES
from mfm_dist.data.order import SampleOrder
from mfm_dist.data.pipeline import EvaluationSet, TrainPipeline
from mfm_dist.data.reader import Sample, ShardReader
from mfm_dist.data.transforms import source_crop, target_crop
from mfm_dist.errors import BadSample, DataError
from mfm_dist.rng import Stream, keyed_generator
from tests.helpers.processes import is_running, wait_until
from tests.helpers.shards import ShardFolder, assert_equal, damage, raw_sample, write_set

CROP = (16, 24)
BLOCKS_PER_STEP = 4


@pytest.fixture
def folders(shard_folder: ShardFolder) -> tuple[Path, Path]:
    """A labelled source of 7 samples and an unlabelled target of 5."""
    return shard_folder("source", count=7, shard_size=3), shard_folder("target", count=5, shard_size=2, labelled=False)


def pipeline(
    folders: tuple[Path, Path],
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    first_block: int = 0,
    seed: int = 3,
) -> TrainPipeline:
    return TrainPipeline(
        source=ShardReader(folders[0]),
        target=ShardReader(folders[1]),
        seed=seed,
        data=DataSection(crop=CROP, workers=workers),
        micro_batch=2,
        rank=rank,
        world_size=world_size,
        blocks_per_step=BLOCKS_PER_STEP,
        first_block=first_block,
    )


def blocks_of(folders: tuple[Path, Path], *, steps: int, world_size: int = 1, **keywords: int) -> list[UDABatch]:
    """The blocks of some steps, put together from all ranks and sorted."""
    each = steps * BLOCKS_PER_STEP // world_size
    found = [
        block
        for rank in range(world_size)
        for block in islice(pipeline(folders, rank=rank, world_size=world_size, **keywords), each)
    ]
    return sorted(found, key=lambda block: block.block)


def test_a_block_is_what_its_definition_says(folders: tuple[Path, Path]) -> None:
    """Against the plain definition: order, read, crop, one sample after the other."""
    source, target = (ShardReader(folder) for folder in folders)
    source_order = SampleOrder(count=7, seed=3, stream=Stream.SOURCE_ORDER)
    target_order = SampleOrder(count=5, seed=3, stream=Stream.TARGET_ORDER)
    for number, block in enumerate(islice(pipeline(folders), 9)):
        assert block.block == number
        assert block.source_image.shape == block.target_image.shape == (2, 3, *CROP)
        for place, position in enumerate(range(2 * number, 2 * number + 2)):
            sample = source.read(source_order[position])
            assert sample.label is not None
            crop = source_crop(sample.image, sample.label, CROP, keyed_generator(3, Stream.SOURCE_CROP, position))
            assert torch.equal(block.source_image[place], crop[0])
            assert torch.equal(block.source_label[place], crop[1])
            image = target.read(target_order[position], with_label=False).image
            expected = target_crop(image, CROP, keyed_generator(3, Stream.TARGET_CROP, position))
            assert torch.equal(block.target_image[place], expected[0])
            assert torch.equal(block.target_valid[place], expected[1])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_blocks_are_equal_for_any_world_size_and_workers(
    folders: tuple[Path, Path], world_size: int, workers: int
) -> None:
    damage(folders[0], 2)
    damage(folders[1], 0)
    expected = blocks_of(folders, steps=3)
    found = blocks_of(folders, steps=3, world_size=world_size, workers=workers)
    assert any(block.bad_samples for block in expected)
    assert_equal(found, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_the_middle_is_the_tail_of_a_whole_run(folders: tuple[Path, Path], workers: int) -> None:
    expected = blocks_of(folders, steps=5)[3 * BLOCKS_PER_STEP :]
    assert_equal(blocks_of(folders, steps=2, world_size=2, workers=workers, first_block=12), expected)


def test_another_seed_gives_other_blocks(folders: tuple[Path, Path]) -> None:
    one, other = (blocks_of(folders, steps=1, seed=seed) for seed in (3, 4))
    assert not all(torch.equal(a.source_image, b.source_image) for a, b in zip(one, other, strict=True))


def test_a_far_start_takes_no_walk(folders: tuple[Path, Path]) -> None:
    far = 10**12
    assert next(iter(pipeline(folders, first_block=far))).block == far


def test_torch_s_global_generator_is_left_alone(folders: tuple[Path, Path]) -> None:
    before = torch.get_rng_state()
    blocks_of(folders, steps=1)
    blocks_of(folders, steps=1, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_whole_pipeline_can_go_to_a_spawned_process(folders: tuple[Path, Path]) -> None:
    blocks = pipeline(folders)._blocks
    copy = pickle.loads(pickle.dumps(blocks))
    assert torch.equal(copy[5].pixels, blocks[5].pixels)


def test_a_bad_sample_is_replaced_by_the_next_of_its_epoch_and_named(folders: tuple[Path, Path]) -> None:
    order = SampleOrder(count=7, seed=3, stream=Stream.SOURCE_ORDER)
    whole = blocks_of(folders, steps=4)
    damage(folders[0], order[4])
    patched = blocks_of(folders, steps=4)
    bad = {sample for block in patched for sample in block.bad_samples}
    (named,) = bad
    assert named.key == f"sample_{order[4]:04d}"
    assert named.number == order[4]
    assert named.shard == str(folders[0] / f"{order[4] // 3:06d}.tar")
    assert "wrong CRC-32" in named.reason
    for before, after in zip(whole, patched, strict=True):
        positions = range(2 * after.block, 2 * after.block + 2)
        hit = [order[position] == order[4] for position in positions]
        assert len(after.bad_samples) == sum(hit)
        for place, (position, replaced) in enumerate(zip(positions, hit, strict=True)):
            if not replaced:
                assert torch.equal(after.source_image[place], before.source_image[place])
                continue
            sample = ShardReader(folders[0]).read(order.sample_at(position, 1))
            assert sample.label is not None
            crop, _ = source_crop(sample.image, sample.label, CROP, keyed_generator(3, Stream.SOURCE_CROP, position))
            assert torch.equal(after.source_image[place], crop)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples_ends_with_their_names(shard_folder: ShardFolder, workers: int) -> None:
    source = shard_folder("source", count=10)
    target = shard_folder("target", count=3)
    damage(source, *range(10))
    with pytest.raises(DataError) as caught:
        next(iter(pipeline((source, target), workers=workers)))
    message = str(caught.value)
    assert message.startswith(f"{REPLACEMENT_TRIES} samples in a row cannot be used")
    assert message.count("wrong CRC-32") == REPLACEMENT_TRIES
    assert "Traceback" not in message


def test_workers_outlive_signals_meant_for_their_parent(folders: tuple[Path, Path]) -> None:
    blocks = iter(pipeline(folders, workers=2))
    list(islice(blocks, 2))  # one of each worker, so that both have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for name in ("INT", "TERM", "USR1", "USR2", "HUP"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert [block.block for block in islice(blocks, 30)] == list(range(2, 32))
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()  # from the parent
        worker.join(5)
        assert worker.exitcode == 0
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(islice(blocks, 100))


def _start_workers_and_end(folders: tuple[Path, Path], report: Connection, signal_number: int) -> None:
    """The life of a parent: it leaves with its iterator alive, or is killed."""
    blocks = iter(pipeline(folders, workers=2))
    next(blocks)
    report.send([child.pid for child in multiprocessing.active_children()])
    if signal_number:
        os.kill(os.getpid(), signal_number)


@pytest.mark.parametrize("signal_number", [0, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(
    folders: tuple[Path, Path], signal_number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    parent = context.Process(target=_start_workers_and_end, args=(folders, sender, signal_number))
    parent.start()
    pids = receiver.recv()
    parent.join(10)
    assert parent.exitcode == -signal_number
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_running, pids)), seconds=5, what="the workers end")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_evaluation_covers_every_sample_once_with_as_many_turns_on_each_rank(
    tmp_path: Path, world_size: int, count: int
) -> None:
    reader = ShardReader(write_set(tmp_path / "val", count=count, shard_size=3))
    sets = [EvaluationSet(reader, rank=rank, world_size=world_size, workers=count % 3) for rank in range(world_size)]
    ranks = [list(items) for items in sets]
    assert len({len(items) for items in ranks}) == 1
    assert len(ranks[0]) == len(EvaluationSet(reader, rank=0, world_size=world_size))
    real = [item for items in ranks for item in items if item.found is not None]
    assert sorted(item.number for item in real) == list(range(count))
    for item in real:
        assert isinstance(item.found, Sample)
        assert item.found.key == raw_sample(item.number).key


def test_evaluation_excludes_a_bad_sample_and_names_it(shard_folder: ShardFolder) -> None:
    folder = shard_folder("val", count=5)
    damage(folder, 2)
    for workers in (0, 2):
        items = list(EvaluationSet(ShardReader(folder), rank=0, world_size=2, workers=workers))
        assert [item.number for item in items] == [0, 2, 4]
        assert [isinstance(item.found, Sample) for item in items] == [True, False, True]
        assert isinstance(items[1].found, BadSample)
        assert items[1].found.key == "sample_0002"


def test_an_evaluation_that_is_broken_off_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = threading.active_count()
    reader = ShardReader(write_set(tmp_path / "val", count=7, shard_size=3))
    items = iter(EvaluationSet(reader, rank=0, world_size=1, workers=2))
    assert next(items).number == 0
    assert threading.active_count() == before + 2
    items.close()  # type: ignore[attr-defined]  it is a generator
    assert threading.active_count() == before


def test_workers_end_when_the_iterator_is_dropped(folders: tuple[Path, Path]) -> None:
    before = set(multiprocessing.active_children())
    blocks = iter(pipeline(folders, workers=2))
    next(blocks)
    del blocks
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
