"""Copies of shards on a node's own disk: shared, bounded, never half, and no reason to lose a sample."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from mfm_dist.config.schema import DataSection
from mfm_dist.data import staging as staging_module
from mfm_dist.data.manifest import Manifest, ShardRecord
from mfm_dist.data.pipeline import TrainPipeline
from mfm_dist.data.reader import ShardReader, open_tar
from mfm_dist.data.staging import Scratch
from mfm_dist.errors import DataError, StorageError
from tests.helpers.shards import ShardFolder, flip_bit


def copies(scratch: Path) -> list[Path]:
    return sorted(scratch.glob("*.tar"))


def gib(folder: Path, shards: int) -> float:
    """Room for that many shards of a folder, and half a one."""
    return (shards + 0.5) * Manifest.read(folder / "dataset.json").shards[0].bytes / 2**30


def test_staged_samples_are_the_same_and_read_from_the_copy(shard_folder: ShardFolder, tmp_path: Path) -> None:
    folder, lines = shard_folder(count=10, shard_size=4), []
    scratch = Scratch(tmp_path / "scratch", lines.append)
    expected = [ShardReader(folder).read(number).image for number in range(10)]
    scratch.stage(folder)
    assert len(copies(scratch.folder)) == 3
    assert [line.split(":")[0] for line in lines] == ["staged source"]
    for number in range(3):
        flip_bit(folder / f"{number:06d}.tar", 700)  # nobody looks there any more
    reader = ShardReader(folder, open_shard=scratch.open)
    assert all(torch.equal(reader.read(number).image, expected[number]) for number in range(10))
    lines.clear()
    Scratch(tmp_path / "scratch", lines.append).stage(folder)
    assert lines == []  # nothing left to copy


def test_a_long_copy_says_how_far_it_is(
    shard_folder: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "PROGRESS_SECONDS", 0.0)
    lines: list[str] = []
    Scratch(tmp_path / "scratch", lines.append).stage(shard_folder())
    assert lines[0].startswith("staging source: 0.00 of 0.00 GiB")


def test_the_processes_of_a_node_share_one_copy(
    shard_folder: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shard_folder(count=10, shard_size=4)
    copied: list[Path] = []
    original = staging_module.atomic_file

    def begun(path: Path) -> AbstractContextManager[Any]:
        copied.append(path)
        return original(path)

    monkeypatch.setattr(staging_module, "atomic_file", begun)
    scratches = [Scratch(tmp_path / "scratch", print) for _ in range(4)]  # each with locks of its own, like processes
    threads = [threading.Thread(target=one.stage, args=(folder,)) for one in scratches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copied) == 3
    assert sorted(copied) == sorted(copies(scratches[0].folder))


def opened(scratch: Scratch, folder: Path, number: int) -> Path:
    """Opens a shard as a reader does; returns the path of the copy that it may have now."""
    record = Manifest.read(folder / "dataset.json").shards[number]
    os.close(scratch.open(folder / record.file, record))
    return scratch.folder / f"{record.sha256[:32]}.tar"


def test_what_was_not_used_for_longest_makes_room(shard_folder: ShardFolder, tmp_path: Path) -> None:
    folder = shard_folder(count=20, shard_size=4)
    scratch = Scratch(tmp_path / "scratch", print, limit_gib=gib(folder, 3))
    paths = {}
    for number in (0, 1, 2):
        paths[number] = opened(scratch, folder, number)
        os.utime(paths[number], (number, number))
    opened(scratch, folder, 0)  # used again
    opened(scratch, folder, 3)
    assert [paths[number].exists() for number in (0, 1, 2)] == [True, False, True]
    with pytest.raises(StorageError, match=r"data\.scratch_gib=.*Raise it, or set data\.lanes"):
        scratch.stage(folder)


def test_files_of_others_are_left_alone(shard_folder: ShardFolder, tmp_path: Path) -> None:
    folder = shard_folder(count=20, shard_size=4)
    scratch = Scratch(tmp_path, print, limit_gib=gib(folder, 2))
    foreign = [tmp_path / "thesis.tar", scratch.folder / "backup.tar", scratch.folder / ".backup.tar.unfinished"]
    for path in foreign:
        path.write_bytes(bytes(100_000))
        os.utime(path, (0, 0))  # used by nobody for ever
    for number in range(5):
        opened(scratch, folder, number)
    assert all(path.stat().st_size == 100_000 for path in foreign)


def test_copies_under_way_have_their_room_and_those_of_killed_processes_lose_it(
    shard_folder: ShardFolder, tmp_path: Path
) -> None:
    folder, lines = shard_folder(count=8, shard_size=4), []
    scratch = Scratch(tmp_path, lines.append, limit_gib=gib(folder, 1))
    other = Manifest.read(folder / "dataset.json").shards[1]
    unfinished = scratch.folder / f".{other.sha256[:32]}.tar.unfinished"
    unfinished.write_bytes(bytes(other.bytes))
    with open(scratch.folder / f".{other.sha256[:32]}.tar.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a process does that copies it
        assert not opened(scratch, folder, 0).exists()
    assert "no room beside the copies under way" in lines[0]
    assert unfinished.exists()
    assert opened(scratch, folder, 0).exists()
    assert not unfinished.exists()


def test_a_copy_that_is_removed_before_it_is_read_is_no_bad_sample(
    shard_folder: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes room the moment a copy is looked for, and the moment one is finished."""
    folder = shard_folder(count=10, shard_size=4)
    scratch = Scratch(tmp_path, print)
    expected = [ShardReader(folder).read(number).image for number in range(10)]
    scratch.stage(folder)
    original = fcntl.flock

    def remove_everything() -> None:
        for path in copies(scratch.folder):
            path.unlink()

    def locked(file: IO[str], operation: int) -> None:
        original(file, operation)
        remove_everything()

    def opened(tar: Path, record: ShardRecord) -> int:
        descriptor = scratch.open(tar, record)
        remove_everything()
        return descriptor

    monkeypatch.setattr(fcntl, "flock", locked)
    reader = ShardReader(folder, open_shard=opened)
    assert all(torch.equal(reader.read(number).image, expected[number]) for number in range(10))


def test_a_shard_that_differs_gets_no_copy_until_it_is_as_it_was_written(
    shard_folder: ShardFolder, tmp_path: Path
) -> None:
    folder, lines = shard_folder(count=10, shard_size=4), []
    tar = folder / "000001.tar"
    whole = tar.read_bytes()
    flip_bit(tar, 700)  # inside the image of sample 4
    scratch = Scratch(tmp_path, lines.append)
    scratch.stage(folder)
    assert len(copies(scratch.folder)) == 2
    reader = ShardReader(folder, open_shard=scratch.open)
    assert re.search(r"000001\.tar, sample 'sample_0004': its image differs", str(reader.read(4)))
    assert reader.read(5).key == "sample_0005"
    assert len([line for line in lines if "000001.tar is read where it lies" in line]) == 1
    tar.write_bytes(whole)
    later = Scratch(tmp_path, lines.append)
    later.stage(folder)
    assert len(copies(scratch.folder)) == 3
    assert ShardReader(folder, open_shard=later.open).read(4).key == "sample_0004"


def test_lanes_copy_when_their_turn_comes_and_survive_the_removal_of_what_they_read(
    shard_folder: ShardFolder, tmp_path: Path
) -> None:
    folder = shard_folder(count=40, shard_size=4)
    data = DataSection(crop=(16, 24), workers=0, lanes=2, lane_window=4)

    def blocks(open_shard: Callable[[Path, ShardRecord], int]) -> list[torch.Tensor]:
        reader = ShardReader(folder, open_shard=open_shard)
        pipeline = TrainPipeline(
            source=reader, target=reader, seed=0, data=data,
            micro_batch=2, rank=0, world_size=1, blocks_per_step=1,
        )  # fmt: skip
        return [block.source_image.clone() for block in islice(pipeline, 40)]

    scratch = Scratch(tmp_path / "scratch", print, limit_gib=gib(folder, 3))
    staged, direct = blocks(scratch.open), blocks(open_tar)
    assert all(torch.equal(a, b) for a, b in zip(staged, direct, strict=True))
    assert 0 < len(copies(scratch.folder)) <= 3


def test_nothing_half_gets_a_name_and_a_lying_disk_is_told(
    shard_folder: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scratch = shard_folder(), Scratch(tmp_path / "scratch", print)
    monkeypatch.setattr(staging_module, "sha256_of", lambda _: "other")
    with pytest.raises(DataError, match="gives back other bytes"):
        scratch.stage(folder)
    assert copies(scratch.folder) == []


def test_a_missing_origin_is_left_to_the_reader(shard_folder: ShardFolder, tmp_path: Path) -> None:
    folder, lines = shard_folder(count=10, shard_size=4), []
    scratch = Scratch(tmp_path / "scratch", lines.append)
    (folder / "000001.tar").unlink()
    scratch.stage(folder)
    assert len(copies(scratch.folder)) == 2
    reader = ShardReader(folder, open_shard=scratch.open, bad_limit=0.5)
    assert reader.read(3).key == "sample_0003"
    assert re.search(r"000001\.tar, sample 'sample_0005': its image cannot be read", str(reader.read(5)))
    assert len([line for line in lines if "000001.tar" in line]) == 1


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"data\.scratch="):
        Scratch(tmp_path / "file" / "scratch", print)


def test_losses_within_the_limit_are_left_to_the_reader(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=10, shard_size=4)
    os.truncate(folder / "000002.tar", 5000)
    with pytest.raises(DataError, match=r"000002\.tar is truncated"):
        ShardReader(folder)
    with pytest.raises(DataError, match=r"000002\.tar is truncated"):
        ShardReader(folder, bad_limit=0.05)
    assert len(ShardReader(folder, bad_limit=0.2)) == 10


def test_a_disk_that_fills_up_while_reading_is_no_bad_sample(
    shard_folder: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    reader = ShardReader(shard_folder(), open_shard=Scratch(tmp_path / "scratch", lambda _: None).open)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left for"):
        reader.read(0)
