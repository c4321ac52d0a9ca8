"""mfm-shards check finds every kind of damage, and what it advises brings the bytes back."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import BadSample
from mfm_dist.shards import verify
from mfm_dist.shards.check import main
from mfm_dist.storage import sha256_of
from tests.helpers.shards import ShardFolder, flip_bit, write_set


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_whole_folders_pass(shard_folder: ShardFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard_folder("source", count=10, shard_size=4)
    shard_folder("target", count=3, labelled=False)
    assert main([str(tmp_path)]) == 0
    head, source, target = capsys.readouterr().out.splitlines()
    assert head.split("  ")[-1] == "other problems"
    assert source.split() == [str(tmp_path / "source"), "3", "10", "0", "none", "none"]
    assert target.split() == [str(tmp_path / "target"), "1", "3", "0", "none", "none"]


def forge_index(folder: Path) -> None:
    """An index that carries the right checksum and the wrong size of one member."""
    index = folder / "000000.index.npy"
    rows = np.load(index)
    rows["meta"]["size"][1] += 1
    old = sha256_of(index)
    np.save(index, rows)
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace(old, sha256_of(index)))


def test_every_kind_of_damage_is_found(
    shard_folder: ShardFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bit, other_index, counts, cut = (shard_folder(name, count=4) for name in ("bit", "index", "counts", "truncated"))
    flip_bit(bit / "000000.tar", 700)
    forge_index(other_index)
    text = (counts / "dataset.json").read_text()
    (counts / "dataset.json").write_text(text.replace('"32x48": 4', '"32x48": 5'))
    (cut / "000000.tar").write_bytes(b"")
    assert main([str(tmp_path)]) == 3
    out, err = capsys.readouterr()
    assert not any(line.endswith("none") for line in out.splitlines())
    assert f"{bit}/000000.tar: its SHA-256" in err
    assert f"{bit}/000000.tar, sample 'sample_0000': its image differs" in err
    assert f"{other_index}/000000.tar: its index differs from its contents" in err
    assert f"{counts}/000000.tar: dataset.json counts other pixels or sizes" in err
    assert f"{cut}/000000.tar is truncated" in err


def test_an_unfinished_folder_is_found(shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shard_folder()
    (folder / "dataset.json").rename(folder / "dataset.unfinished.json")
    assert main([str(folder)]) == 3
    assert "unfinished" in capsys.readouterr().err


def test_no_shards_is_a_wrong_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "nowhere")]) == 2
    assert "2 configuration errors" in capsys.readouterr().err


def test_no_workers_is_a_wrong_argument(shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(shard_folder()), "--workers", "0"])
    assert "--workers: 0 is not at least 1" in capsys.readouterr().err


def test_a_tar_that_the_disk_does_not_give_back_is_named(
    shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checking processes are forked, so they meet the same disk."""
    folder = shard_folder(count=8, shard_size=4)
    whole = sha256_of

    def failing(path: Path) -> str:
        if path.name == "000001.tar":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return whole(path)

    monkeypatch.setattr(verify, "sha256_of", failing)
    assert main([str(folder)]) == 3
    problem, advice = capsys.readouterr().err.splitlines()
    assert problem == f"{folder}/000001.tar cannot be read ([Errno 5] Input/output error: '{folder}/000001.tar')"
    assert advice.startswith(f"{folder}: delete 000001.tar in it, then")


@pytest.mark.parametrize("name", ["000001.tar", "000001.index.npy", "000001.classes.npy"])
@pytest.mark.parametrize("damage", ["remove", "flip", "empty"])
def test_what_is_damaged_is_remade_as_the_message_says(
    shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    folder = shard_folder(count=10, shard_size=4)
    whole = files_of(folder)
    if damage == "remove":
        (folder / name).unlink()
    elif damage == "flip":
        flip_bit(folder / name, 700 if name.endswith("tar") else 100)
    else:
        (folder / name).write_bytes(b"")
    assert main([str(folder)]) == 3
    (advice,) = (line for line in capsys.readouterr().err.splitlines() if "delete" in line)
    assert advice.startswith(f"{folder}: delete 000001.tar in it, then remake what is missing (the rest is kept): ")
    assert f"mfm-shards make test --output {folder.parent}. Without what it is made of" in advice
    (folder / "000001.tar").unlink(missing_ok=True)
    write_set(folder, count=10, shard_size=4)
    assert files_of(folder) == whole
    assert main([str(folder)]) == 0


def test_without_the_download_a_damaged_sample_is_passed_over_and_the_rest_read(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=10, shard_size=4)
    row = np.load(folder / "000001.index.npy")[2]
    flip_bit(folder / "000001.tar", int(row["image"]["offset"]) + 300)
    assert main([str(folder)]) == 3
    reader = ShardReader(folder)
    found = [reader.read(number) for number in range(10)]
    assert [one.key for one in found if isinstance(one, BadSample)] == ["sample_0006"]


def test_a_damaged_description_costs_no_sample(shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shard_folder(count=4)
    row = np.load(folder / "000000.index.npy")[1]
    flip_bit(folder / "000000.tar", int(row["meta"]["offset"]) + 3)
    assert main([str(folder)]) == 3
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].split()[4] == "none"
    assert "sample 'sample_0001': its description differs from what was written (wrong CRC-32)" in err


@pytest.mark.parametrize("name", ["../../evil", "stranger", "sample_0001"])
def test_what_nobody_wrote_there_is_named(
    shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = shard_folder(count=4)
    with tarfile.open(folder / "000000.tar", "a") as archive:  # as somebody with ``tar --append`` would
        info = tarfile.TarInfo(f"{name}.jpg")
        archive.addfile(info, io.BytesIO())
    assert main([str(folder)]) == 3
    err = capsys.readouterr().err
    assert "its index differs from its contents" in err or f"sample {name!r}" in err
    assert "000000.tar: its SHA-256 is not the one in dataset.json" in err


def test_tars_that_the_manifest_does_not_know_are_named(
    shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shard_folder()
    shutil.copy(folder / "000000.tar", folder / "000007.tar")
    assert main([str(folder)]) == 3
    assert "dataset.json does not know 000007.tar" in capsys.readouterr().err


def test_a_broken_manifest_is_told(shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shard_folder()
    (folder / "dataset.json").write_text("{")
    assert main([str(folder)]) == 3
    assert "cannot be read as a manifest" in capsys.readouterr().err
