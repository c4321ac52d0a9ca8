from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mfm_dist.data.class_statistics import read_statistics
from mfm_dist.data.index import build_index
from mfm_dist.data.manifest import Manifest, ShardRecord
from mfm_dist.data.reader import ShardReader
from mfm_dist.shards import repair
from mfm_dist.shards.repair import repair_folder
from mfm_dist.shards.verify import check_shard
from mfm_dist.shards.writer import sha256_of
from tests.unit.data.small_shards import ShardFolder, flip_bit, raw_sample, write_set
from tools.check_shards import main

PARTS = ("image", "label", "meta")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def mend(folder: Path) -> list[str]:
    """What ``--repair`` does to one folder, in this process; the folder must be well afterwards."""
    manifest = Manifest.read(folder / "dataset.json")
    checks = [check_shard(folder, record, manifest.class_names) for record in manifest.shards]
    said = repair_folder(folder, manifest, checks)
    again = Manifest.read(folder / "dataset.json")
    assert [check_shard(folder, record, again.class_names).problems for record in again.shards] == [[]] * len(checks)
    return said


def keys_of(folder: Path) -> list[str]:
    """Reads every sample as a training would, and compares it with what was packed."""
    reader = ShardReader(folder)
    keys = []
    for number in range(len(reader)):
        sample = reader.read(number)
        assert sample.label is not None
        assert np.array_equal(sample.label.numpy(), raw_sample(int(sample.key.removeprefix("sample_"))).label)
        keys.append(sample.key)
    statistics = read_statistics(folder, reader.index.manifest)
    assert statistics.sum() == sum(n for name, n in reader.index.manifest.pixel_counts.items() if name != "ignore")
    return keys


def all_keys(count: int) -> list[str]:
    return [f"sample_{index:04d}" for index in range(count)]


@pytest.mark.parametrize("name", ["000001.index.npy", "000001.classes.npy"])
@pytest.mark.parametrize("damage", ["remove", "flip", "empty"])
def test_sidecars_are_made_anew_from_the_tar(shard_folder: ShardFolder, name: str, damage: str) -> None:
    folder = shard_folder()
    whole = files_of(folder)
    if damage == "remove":
        (folder / name).unlink()
    elif damage == "flip":
        flip_bit(folder / name, 100)
    else:
        (folder / name).write_bytes(b"")
    assert main([str(folder)]) == 3
    assert main([str(folder), "--repair"]) == 0
    assert files_of(folder) == whole


def test_wrong_counts_are_made_anew(shard_folder: ShardFolder) -> None:
    folder = shard_folder()
    whole = files_of(folder)
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace('"32x48": 4', '"32x48": 5'))
    mend(folder)
    assert files_of(folder) == whole


def test_a_damaged_header_loses_nothing_and_the_bytes_come_back(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=4)
    whole = files_of(folder)
    for at in (0, 20, 130, 300):  # name, name, checksum, padding
        flip_bit(folder / "000000.tar", at)
    (said,) = mend(folder)
    assert "equal to what it was before the damage" in said
    assert files_of(folder) == whole
    assert not list((folder / "quarantine").iterdir())


def test_a_damaged_sample_is_taken_out_and_nothing_else(
    shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shard_folder(count=10, shard_size=4)
    row = np.load(folder / "000001.index.npy")[2]
    flip_bit(folder / "000001.tar", int(row["image"]["offset"]) + 300)
    damaged = (folder / "000001.tar").read_bytes()
    assert main([str(folder), "--repair"]) == 0
    said = capsys.readouterr().out
    assert "written anew with 3 whole samples; 1 put aside in" in said
    assert "To have those back, delete" in said
    assert "make test shards --output" in said
    assert "10 -> 9 samples. Their numbers have changed" in said
    assert said.splitlines()[-1].split()[1:] == ["3", "9", "1", "none", "none"]
    assert keys_of(folder) == [key for key in all_keys(10) if key != "sample_0006"]
    reason = "its image differs from what was written (wrong CRC-32)"
    assert Manifest.read(folder / "dataset.json").left_out == {"sample_0006": reason}
    assert (folder / "quarantine/000001.0.tar").read_bytes() == damaged
    assert json.loads((folder / "quarantine/000001.0.json").read_text())["lost"] == {"sample_0006": reason}
    assert main([str(folder)]) == 0


def test_what_was_taken_out_comes_back_by_the_command_that_is_named(shard_folder: ShardFolder, tmp_path: Path) -> None:
    folder = shard_folder(count=10, shard_size=4)
    whole = files_of(folder)
    flip_bit(folder / "000001.tar", 700)
    mend(folder)
    (folder / "000001.tar").unlink()
    write_set(folder, count=10, shard_size=4)
    shutil.rmtree(folder / "quarantine")
    assert files_of(folder) == whole
    assert list(tmp_path.iterdir()) == [folder]


def test_a_damaged_description_costs_no_sample(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=4)
    row = np.load(folder / "000000.index.npy")[1]
    flip_bit(folder / "000000.tar", int(row["meta"]["offset"]) + 3)
    mend(folder)
    assert keys_of(folder) == all_keys(4)


def test_an_empty_or_missing_tar_is_left_to_be_made_again(
    shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shard_folder(count=10, shard_size=4)
    (folder / "000000.tar").write_bytes(b"")
    (folder / "000002.tar").unlink()
    before = files_of(folder)
    assert main([str(folder), "--repair"]) == 3
    out, err = capsys.readouterr()
    assert "000000.tar: nothing in it can be used. Delete it and run: make test shards" in out
    assert "000002.tar is missing" in err
    assert files_of(folder) == before


def harm(content: bytearray, generator: np.random.Generator) -> np.ndarray:
    """Damages a tar in place, without moving anything; returns which of its old bytes are still there."""
    intact = np.ones(len(content), dtype=bool)
    for _ in range(int(generator.integers(1, 4))):
        start = int(generator.integers(len(content)))
        kind = generator.choice(["flip", "zeros", "noise", "cut"], p=[0.4, 0.2, 0.2, 0.2])
        length = 1 if kind == "flip" else int(generator.integers(1, 3000))
        stop = len(content) if kind == "cut" else min(start + length, len(content))
        if kind == "cut":
            del content[start:]
        elif kind == "flip":
            content[start] ^= 1 << int(generator.integers(8))
        else:
            new = generator.bytes(stop - start) if kind == "noise" else bytes(stop - start)
            content[start:stop] = new
        intact[start:stop] = False
        if not content:
            break
    return intact


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_no_undamaged_sample_is_lost_whatever_the_damage(
    shard_folder: ShardFolder, seed: int, with_index: bool
) -> None:
    folder = shard_folder(count=8, shard_size=8)
    rows = build_index(folder / "000000.tar")
    content = bytearray((folder / "000000.tar").read_bytes())
    intact = harm(content, np.random.default_rng(seed))
    (folder / "000000.tar").write_bytes(content)
    if not with_index:
        (folder / "000000.index.npy").unlink()

    def survives(row: np.void) -> bool:
        parts = [(row[part]["offset"].item(), row[part]["size"].item()) for part in PARTS[: 2 if with_index else 3]]
        headers = [] if with_index else [(offset - 512, 512) for offset, _ in parts]  # a scan needs them
        return all(intact[offset : offset + size].all() for offset, size in [*parts, *headers])

    expected = [row["key"].decode() for row in rows if survives(row)]
    if not expected and not with_index:
        return
    manifest = Manifest.read(folder / "dataset.json")
    check = check_shard(folder, manifest.shards[0], manifest.class_names)
    assert not check.is_well()
    repair_folder(folder, manifest, [check])
    mended = Manifest.read(folder / "dataset.json")
    if not expected and mended.samples == 8:
        return  # nothing could be saved, so nothing was touched
    found = [row["key"].decode() for row in build_index(folder / "000000.tar")]
    assert set(expected) <= set(found)
    if with_index:
        assert found == expected
        assert {*found, *mended.left_out} == set(all_keys(8))
        assert keys_of(folder) == found


def test_blocks_missing_from_the_middle_move_the_rest(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=6, shard_size=6)
    rows = np.load(folder / "000000.index.npy")
    content = (folder / "000000.tar").read_bytes()
    start = int(rows[2]["image"]["offset"])
    (folder / "000000.tar").write_bytes(content[:start] + content[start + 512 :])
    mend(folder)
    assert keys_of(folder) == [key for key in all_keys(6) if key != "sample_0002"]


def appended(tar: Path, members: dict[str, bytes]) -> None:
    """Adds members behind the last one, as somebody with ``tar --append`` would."""
    with tarfile.open(tar, "a") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("name", ["../../evil", "stranger", "sample_0001"])
def test_what_nobody_wrote_there_is_taken_out(shard_folder: ShardFolder, name: str, tmp_path: Path) -> None:
    folder = shard_folder(count=4)
    whole = files_of(folder)
    with tarfile.open(folder / "000000.tar") as archive:
        image, label = (archive.extractfile(f"sample_0000.{end}").read() for end in ("jpg", "label.png"))  # type: ignore[union-attr]
    appended(folder / "000000.tar", {f"{name}.jpg": image, f"{name}.label.png": label})
    mend(folder)
    assert files_of(folder) == whole
    assert list(tmp_path.iterdir()) == [folder]


def test_a_repair_that_is_interrupted_is_finished_by_the_next(
    shard_folder: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shard_folder(count=10, shard_size=4)
    flip_bit(folder / "000001.tar", 700)
    real = repair.write_shard

    def killed(*args: object) -> ShardRecord:
        real(*args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(repair, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            mend(folder)
    assert sha256_of(folder / "000001.tar") != Manifest.read(folder / "dataset.json").shards[1].sha256
    mend(folder)
    assert keys_of(folder) == [key for key in all_keys(10) if key != "sample_0004"]
    assert Manifest.read(folder / "dataset.json").left_out.keys() == {"sample_0004"}
    assert main([str(folder)]) == 0


def test_tars_that_the_manifest_does_not_know_are_named(
    shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shard_folder()
    shutil.copy(folder / "000000.tar", folder / "000007.tar")
    assert main([str(folder)]) == 3
    assert "dataset.json does not know 000007.tar" in capsys.readouterr().err


def test_a_broken_manifest_is_told_and_not_repaired(
    shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shard_folder()
    (folder / "dataset.json").write_text("{")
    assert main([str(folder), "--repair"]) == 3
    assert "cannot be read as a manifest" in capsys.readouterr().err
