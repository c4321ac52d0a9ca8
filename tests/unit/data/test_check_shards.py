from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from mfm_dist.shards import repair, verify
from mfm_dist.shards.writer import sha256_of
from tests.unit.data.small_shards import ShardFolder, flip_bit
from tools.check_shards import main


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


@pytest.mark.parametrize("options", [[], ["--repair"]])
def test_a_tar_that_the_disk_does_not_give_back_is_named(
    shard_folder: ShardFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
) -> None:
    """The checking processes are forked, so they meet the same disk."""
    folder = shard_folder(count=8, shard_size=4)
    whole = sha256_of

    def failing(path: Path) -> str:
        if path.name == "000001.tar":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return whole(path)

    monkeypatch.setattr(verify, "sha256_of", failing)
    monkeypatch.setattr(repair, "sha256_of", failing)
    monkeypatch.setattr(repair, "scan_tar", failing)
    assert main([str(folder), *options]) == 3
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"{folder}/000001.tar cannot be read ([Errno 5] Input/output error: '{folder}/000001.tar')"
    ]
    assert ("000001.tar is left as it is: [Errno 5]" in out) == bool(options)
