"""Shards are plain WebDataset, equal for equal samples, and whole or not there whatever interrupts them."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mfm_dist.data.manifest import DatasetPlan, Manifest, Recipe, conflict, is_complete
from mfm_dist.data.shard_records import ShardRecord
from mfm_dist.errors import DataError, StorageError
from mfm_dist.shards import writer as writer_module
from mfm_dist.shards.writer import RawSample, ShardSetWriter, encode_jpeg, encode_label_png, remove_shards, write_shard
from mfm_dist.storage import atomic_file
from tests.helpers.classes import CLASSES
from tests.helpers.shards import ShardFolder, raw_sample

RECIPE = Recipe(generator="test", version=1, arguments={"samples": 10})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def begin(folder: Path, recipe: Recipe = RECIPE) -> ShardSetWriter:
    command = "mfm-shards make test"
    plan = DatasetPlan(folder=folder, recipe=recipe, command=command, classes=CLASSES, samples=10, shard_size=4)
    return ShardSetWriter(plan)


def test_of_many_shards_the_notes_are_written_once_in_a_hundredth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them each time would grow with their square, and 100,000 shards could not be made."""
    sizes = []
    monkeypatch.setattr(
        writer_module, "write_atomically", lambda _, text: sizes.append(len(json.loads(text)["shards"]))
    )
    plan = DatasetPlan(folder=tmp_path / "set", recipe=RECIPE, command="", classes=CLASSES, samples=400, shard_size=1)
    writer = ShardSetWriter(plan)
    record = ShardRecord(
        file="", samples=1, bytes=1, sha256="0" * 64, index_sha256="0" * 64, image_sizes={}, pixel_counts={}
    )
    for number in range(400):
        writer.add(replace(record, file=f"{number:06d}.tar"))
        assert sizes[-1] >= (number + 1) / 1.01 - 1
    assert sizes[:100] == list(range(100))
    assert len(sizes) < 280


def test_plain_webdataset_reads_the_same_samples_and_bytes(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=10, shard_size=4)
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    found = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [f"sample_{index:04d}" for index in range(10)]
    for index, sample in enumerate(found):
        raw = raw_sample(index)
        assert raw.label is not None
        assert sample["jpg"] == encode_jpeg(raw.image)
        assert sample["label.png"] == encode_label_png(raw.label)
        assert json.loads(sample["json"]) == {"key": raw.key, "index": index}


def test_an_unlabelled_set_has_no_label_member(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=3, labelled=False)
    (sample, *_) = webdataset.WebDataset(str(folder / "000000.tar"), shardshuffle=False)
    assert {name for name in sample if not name.startswith("__")} == {"jpg", "json"}
    assert Manifest.read(folder / "dataset.json").pixel_counts == {}


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 31)])
def test_label_png_is_lossless_in_another_reader(shape: tuple[int, int]) -> None:
    label = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    picture = Image.open(io.BytesIO(encode_label_png(label)))
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), label)


def test_jpeg_is_baseline_with_halved_chroma() -> None:
    data = encode_jpeg(raw_sample(0).image)
    picture = Image.open(io.BytesIO(data))
    assert "progressive" not in picture.info
    frame = data.index(b"\xff\xc0")  # start of a baseline frame
    assert data[frame + 11] == 0x22  # luma is sampled twice as often as chroma, both ways
    assert np.abs(np.asarray(picture).mean() - raw_sample(0).image.mean()) < 2


def test_equal_samples_give_equal_files(shard_folder: ShardFolder) -> None:
    first, second = bytes_of(shard_folder("a")), bytes_of(shard_folder("b"))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].replace(b'"a"', b"") == second[name].replace(b'"b"', b"")


def test_the_manifest_counts_what_the_labels_hold(shard_folder: ShardFolder) -> None:
    manifest = Manifest.read(shard_folder(count=10, shard_size=4) / "dataset.json")
    labels = np.stack([raw_sample(index).label for index in range(10)])
    assert manifest.samples == 10
    assert manifest.image_sizes == {"32x48": 10}
    assert [record.samples for record in manifest.shards] == [4, 4, 2]
    for train_id, name in enumerate(CLASSES.names):
        assert manifest.pixel_counts[name] == (labels == train_id).sum()
    assert manifest.pixel_counts["ignore"] == (labels == 255).sum()


def test_an_interrupted_set_goes_on_and_ends_the_same(shard_folder: ShardFolder, tmp_path: Path) -> None:
    whole = bytes_of(shard_folder("set"))
    shutil.rmtree(tmp_path / "set")
    writer = begin(tmp_path / "set")
    shard = writer.pending[1]
    writer.add(write_shard(writer.folder, shard.number, [raw_sample(i) for i in shard.samples], CLASSES.names))
    before = (writer.folder / "000001.tar").stat().st_mtime_ns
    again = begin(tmp_path / "set")
    assert [shard.number for shard in again.pending] == [0, 2]
    assert not is_complete(again.folder, RECIPE)
    for shard in again.pending:
        again.add(write_shard(again.folder, shard.number, [raw_sample(i) for i in shard.samples], CLASSES.names))
    again.finish()
    assert bytes_of(tmp_path / "set") == whole
    assert (again.folder / "000001.tar").stat().st_mtime_ns == before
    assert is_complete(again.folder, RECIPE)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_only_the_damaged_shard_is_made_again(shard_folder: ShardFolder, damage: str) -> None:
    folder = shard_folder()
    tar = folder / "000001.tar"
    content = tar.read_bytes()
    if damage == "remove":
        tar.unlink()
    else:
        tar.write_bytes(content[:-512] if damage == "truncate" else content[:700] + b"\x00\xff" + content[702:])
    assert [shard.number for shard in begin(folder).pending] == [1]


def test_a_damaged_index_is_made_again(shard_folder: ShardFolder) -> None:
    folder = shard_folder()
    index = folder / "000001.index.npy"
    content = index.read_bytes()
    index.write_bytes(content[:-20])
    begin(folder).finish()
    assert index.read_bytes() == content


def test_another_recipe_is_a_conflict_that_names_the_difference(shard_folder: ShardFolder) -> None:
    folder = shard_folder()
    assert conflict(folder, RECIPE) is None
    other = conflict(folder, Recipe(generator="test", version=2, arguments={"samples": 12}))
    assert other is not None
    assert "version: 1 -> 2" in other
    assert "samples: 10 -> 12" in other
    remove_shards(folder)
    assert conflict(folder, RECIPE) is None
    (folder / "precious.tar").write_bytes(b"")
    assert "did not write" in (conflict(folder, RECIPE) or "")


def test_a_broken_manifest_is_a_conflict(shard_folder: ShardFolder) -> None:
    folder = shard_folder()
    (folder / "dataset.json").write_text("{")
    assert "cannot be read" in (conflict(folder, RECIPE) or "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": np.full((32, 48), 19, dtype=np.uint8)}, "class ids 19; allowed are 0 to 18 and 255"),
        ({"label": np.zeros((32, 40), dtype=np.uint8)}, r"\(32, 40\), not uint8 \(32, 48\)"),
        ({"label": np.zeros((32, 48), dtype=np.int64)}, "int64"),
        ({"image": np.zeros((32, 48), dtype=np.uint8)}, r"not uint8 \[H, W, 3\]"),
        ({"key": "a.b"}, "letters, digits"),
    ],
)
def test_an_impossible_sample_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    fields = {**vars(raw_sample(0)), **change}
    with pytest.raises(DataError, match=reason) as caught:
        write_shard(tmp_path, 0, [raw_sample(1), type(raw_sample(0))(**fields)], CLASSES.names)
    assert "000000.tar" in str(caught.value)
    assert str(fields["key"]) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_the_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begin(tmp_path / "set")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 5 * 2**20))
    writer.require_free_space(2**19)
    with pytest.raises(StorageError, match=r"set: it needs at least 10.0 MiB, 5.0 MiB are free"):
        writer.require_free_space(2**20)


def test_a_disk_that_fills_up_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = begin(tmp_path / "set")
    before = set(writer.folder.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left for .*000000\.tar") as caught:
        write_shard(writer.folder, 0, [raw_sample(0)], CLASSES.names)
    assert "MiB are free" in str(caught.value)
    assert set(writer.folder.iterdir()) == before


def test_a_write_that_fails_half_way_leaves_nothing_half(tmp_path: Path) -> None:
    def until_the_disk_is_full() -> Iterator[RawSample]:
        yield from map(raw_sample, range(20))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError):
        write_shard(tmp_path, 0, until_the_disk_is_full(), CLASSES.names)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_writer_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"new", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
