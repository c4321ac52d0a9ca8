from __future__ import annotations

import os
import threading
from itertools import islice
from pathlib import Path

import pytest
import torch

from mfm_dist.config.schema import DataSection
from mfm_dist.data import staging as staging_module
from mfm_dist.data.manifest import Manifest
from mfm_dist.data.pipeline import TrainPipeline
from mfm_dist.data.reader import SampleError, ShardReader
from mfm_dist.data.staging import Scratch
from mfm_dist.errors import DataError, StorageError
from tests.unit.data.small_shards import ShardFolder, flip_bit


def copies(scratch: Path) -> list[Path]:
    return sorted(scratch.glob("*.tar"))


def gib(folder: Path, shards: int) -> float:
    """Room for that many shards of a folder, and half a one."""
    return (shards + 0.5) * Manifest.read(folder / "dataset.json").shards[0].bytes / 2**30


def test_staged_samples_are_the_same_and_read_from_the_copy(shard_folder: ShardFolder, tmp_path: Path) -> None:
    folder, scratch, lines = shard_folder(count=10, shard_size=4), Scratch(tmp_path / "scratch"), []
    expected = [ShardReader(folder).read(number).image for number in range(10)]
    scratch.stage(folder, lines.append)
    assert len(copies(scratch.folder)) == 3
    assert [line.split(":")[0] for line in lines] == ["staged source"]
    for number in range(3):
        flip_bit(folder / f"{number:06d}.tar", 700)  # nobody looks there any more
    reader = ShardReader(folder, local_copy=scratch.copy)
    assert all(torch.equal(reader.read(number).image, expected[number]) for number in range(10))
    lines.clear()
    Scratch(tmp_path / "scratch").stage(folder, lines.append)
    assert lines == []  # nothing left to copy


def test_a_long_copy_says_how_far_it_is(
    shard_folder: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "PROGRESS_SECONDS", 0.0)
    lines: list[str] = []
    Scratch(tmp_path / "scratch").stage(shard_folder(), lines.append)
    assert lines[0].startswith("staging source: 0.00 of 0.00 GiB")


def test_the_processes_of_a_node_share_one_copy(
    shard_folder: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shard_folder(count=10, shard_size=4)
    copied: list[Path] = []
    original = Scratch._copy
    monkeypatch.setattr(Scratch, "_copy", lambda self, tar, local: (copied.append(tar), original(self, tar, local)))
    scratches = [Scratch(tmp_path / "scratch") for _ in range(4)]  # each with locks of its own, like processes
    threads = [threading.Thread(target=one.stage, args=(folder, lambda _: None)) for one in scratches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in copied) == ["000000.tar", "000001.tar", "000002.tar"]


def test_what_was_not_used_for_longest_makes_room(shard_folder: ShardFolder, tmp_path: Path) -> None:
    folder = shard_folder(count=20, shard_size=4)
    records = Manifest.read(folder / "dataset.json").shards
    scratch = Scratch(tmp_path / "scratch", limit_gib=gib(folder, 3))
    paths = {}
    for number in (0, 1, 2):
        paths[number] = scratch.copy(folder / records[number].file, records[number])
        os.utime(paths[number], (number, number))
    scratch.copy(folder / records[0].file, records[0])  # used again
    scratch.copy(folder / records[3].file, records[3])
    assert [paths[number].exists() for number in (0, 1, 2)] == [True, False, True]
    with pytest.raises(StorageError, match=r"data\.scratch_gib=.*Raise it, or set data\.lanes"):
        scratch.stage(folder, print)


def test_lanes_copy_when_their_turn_comes_and_survive_the_removal_of_what_they_read(
    shard_folder: ShardFolder, tmp_path: Path
) -> None:
    folder = shard_folder(count=40, shard_size=4)
    data = DataSection(crop=(16, 24), workers=0, lanes=2, lane_window=4)

    def blocks(local_copy: object) -> list[torch.Tensor]:
        reader = ShardReader(folder, local_copy=local_copy)  # type: ignore[arg-type]
        pipeline = TrainPipeline(
            source=reader, target=reader, seed=0, data=data,
            micro_batch=2, rank=0, world_size=1, blocks_per_step=1,
        )  # fmt: skip
        return [block.source_image.clone() for block in islice(pipeline, 40)]

    scratch = Scratch(tmp_path / "scratch", limit_gib=gib(folder, 3))
    staged, direct = blocks(scratch.copy), blocks(None)
    assert all(torch.equal(a, b) for a, b in zip(staged, direct, strict=True))
    assert 0 < len(copies(scratch.folder)) <= 3


def test_nothing_half_gets_a_name_and_a_lying_disk_is_told(
    shard_folder: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scratch = shard_folder(), Scratch(tmp_path / "scratch")
    monkeypatch.setattr(staging_module, "sha256_of", lambda _: "other")
    with pytest.raises(DataError, match="gives back other bytes"):
        scratch.stage(folder, print)
    assert copies(scratch.folder) == []


def test_a_damaged_origin_is_left_to_the_reader(shard_folder: ShardFolder, tmp_path: Path) -> None:
    folder, scratch = shard_folder(count=10, shard_size=4), Scratch(tmp_path / "scratch")
    (folder / "000001.tar").unlink()
    scratch.stage(folder, print)
    assert len(copies(scratch.folder)) == 2
    reader = ShardReader(folder, local_copy=scratch.copy, bad_limit=0.5)
    assert reader.read(3).key == "sample_0003"
    with pytest.raises(SampleError, match=r"000001\.tar, sample 'sample_0005': its image cannot be read"):
        reader.read(5)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"data\.scratch="):
        Scratch(tmp_path / "file" / "scratch")


def test_losses_within_the_limit_are_left_to_the_reader(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=10, shard_size=4)
    os.truncate(folder / "000002.tar", 5000)
    with pytest.raises(DataError, match=r"000002\.tar is truncated"):
        ShardReader(folder)
    with pytest.raises(DataError, match=r"000002\.tar is truncated"):
        ShardReader(folder, bad_limit=0.05)
    assert len(ShardReader(folder, bad_limit=0.2)) == 10
