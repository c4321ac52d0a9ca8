"""Indexes of tars and folders of shards: what is read back, and how damage to either is told."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mfm_dist.data.index import DatasetIndex, build_index, scan_tar
from mfm_dist.data.manifest import Manifest, index_path
from mfm_dist.data.shard_records import ShardRecords
from mfm_dist.errors import ConfigError, DataError
from mfm_dist.shards.check import main as check
from tests.helpers.shards import ShardFolder, flip_bit


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_the_index_says_what_tarfile_says(shard_folder: ShardFolder) -> None:
    folder = shard_folder()
    for tar in sorted(folder.glob("*.tar")):
        rows = np.load(tar.with_name(f"{tar.stem}.index.npy"))
        content = tar.read_bytes()
        with tarfile.open(tar) as archive:
            members = {info.name: info for info in archive}
        assert len(members) == 3 * len(rows)
        for row in rows:
            for field, extension in (("image", "jpg"), ("label", "label.png"), ("meta", "json")):
                info = members[f"{row['key'].decode()}.{extension}"]
                offset, size, crc = row[field].tolist()
                assert (offset, size) == (info.offset_data, info.size)
                assert crc == zlib.crc32(content[offset : offset + size])


def test_png_images_folders_in_keys_and_other_members_are_understood(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "a.tar", [("city/b.png", b"image"), ("city/b.txt", b"?"), ("city/c.jpg", b"jpeg")])
    rows = build_index(tar)
    assert rows["key"].tolist() == [b"city/b", b"city/c"]
    assert rows["image_format"].tolist() == [b"png", b"jpg"]
    assert rows["label"]["offset"].tolist() == [-1, -1]


def test_every_number_is_located_once(shard_folder: ShardFolder) -> None:
    index = DatasetIndex.open(shard_folder(count=10, shard_size=4))
    assert len(index) == 10
    assert [index.locate(number) for number in range(10)] == [divmod(number, 4) for number in range(10)]
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            index.locate(outside)


def test_a_missing_folder_names_what_exists_and_the_command(shard_folder: ShardFolder, tmp_path: Path) -> None:
    shard_folder("game_train")
    shard_folder("game_val")
    with pytest.raises(ConfigError) as caught:
        DatasetIndex.open(tmp_path / "game_trian")
    message = str(caught.value)
    assert "game_trian" in message
    assert "game_train, game_val" in message
    assert f"mfm-shards make scenes --output {tmp_path}" in message


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("file", "../../elsewhere.tar", "file is no name such as 000000.tar"),
        ("file", "/etc/000000.tar", "file is no name such as 000000.tar"),
        ("sha256", "../../victim", "sha256 is not 64 hex digits"),
        ("index_sha256", "0" * 63, "index_sha256 is not 64 hex digits"),
        ("classes_sha256", "?", "classes_sha256 is not 64 hex digits"),
        ("samples", "4", "samples of the wrong type"),
        ("bytes", -1, "samples or bytes are negative"),
        ("pixel_counts", {"road": None}, "pixel_counts of the wrong type"),
        ("image_sizes", [], "image_sizes of the wrong type"),
        ("left_out", {"a": 1}, "left_out of the wrong type"),
        ("sha256", None, "sha256 of the wrong type"),
    ],
)
def test_a_manifest_is_trusted_with_nothing(shard_folder: ShardFolder, field: str, value: object, problem: str) -> None:
    """Names and checksums become paths, where shards are read and where copies are written."""
    path = shard_folder() / "dataset.json"
    content = json.loads(path.read_text())
    content["shards"][1][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"dataset\.json cannot be read as a manifest.*{problem}"):
        DatasetIndex.open(path.parent)


def test_the_rest_of_a_manifest_has_its_types_too(shard_folder: ShardFolder) -> None:
    path = shard_folder() / "dataset.json"
    whole = json.loads(path.read_text())
    for field, value in [
        ("name", 1),
        ("command", None),
        ("recipe", {**whole["recipe"], "version": "1"}),
    ]:
        path.write_text(json.dumps({**whole, field: value}))
        with pytest.raises(DataError, match="of the wrong type"):
            DatasetIndex.open(path.parent)


def test_an_unfinished_folder_names_the_command_that_ends_it(shard_folder: ShardFolder) -> None:
    folder = shard_folder()
    (folder / "dataset.json").rename(folder / "dataset.unfinished.json")
    with pytest.raises(DataError, match=f"unfinished.*mfm-shards make test --output {folder.parent}"):
        DatasetIndex.open(folder)
    (folder / "dataset.unfinished.json").unlink()
    with pytest.raises(DataError, match=r"no dataset\.json"):
        DatasetIndex.open(folder)


def test_all_damaged_shards_are_named_at_once(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=10, shard_size=2)
    size = (folder / "000000.tar").stat().st_size
    with open(folder / "000000.tar", "r+b") as file:
        file.truncate(size - 700)
    (folder / "000001.tar").unlink()
    (folder / "000002.index.npy").write_bytes(b"no index")
    (folder / "000003.index.npy").unlink()
    with pytest.raises(DataError) as caught:
        DatasetIndex.open(folder)
    lines = str(caught.value).split("\n")
    assert len(lines) == 5
    assert "000000.tar is truncated" in lines[0]
    assert f"it has {size - 700} bytes, {size} were written" in lines[0]
    assert "000001.tar is missing" in lines[1]
    assert "000002.index.npy is damaged" in lines[2]
    assert "000003.index.npy cannot be read" in lines[3]
    assert "mfm-shards make test --output" in lines[4]


@pytest.mark.parametrize("offset", [0, 9, 40, 300, -1])
def test_one_flipped_bit_in_an_index_is_noticed(shard_folder: ShardFolder, offset: int) -> None:
    folder = shard_folder()
    flip_bit(folder / "000001.index.npy", offset)
    with pytest.raises(DataError, match=r"000001\.index\.npy is damaged"):
        DatasetIndex.open(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', "null"])
def test_a_broken_manifest_is_told(shard_folder: ShardFolder, content: str) -> None:
    folder = shard_folder()
    (folder / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset\.json cannot be read"):
        DatasetIndex.open(folder)


def test_a_manifest_of_another_format_is_told(shard_folder: ShardFolder) -> None:
    folder = shard_folder()
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(DataError, match="format 99, not 2"):
        DatasetIndex.open(folder)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.label.png", b"x")], "sample 'a': it needs exactly one image"),
        ([("a.jpg", b"x"), ("a.png", b"x")], "sample 'a': it needs exactly one image"),
        ([("a.jpg", b"x"), ("a.jpg", b"x")], r"a\.jpg occurs twice"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.json", b"x")], "sample 'a': its members are not side by side"),
    ],
)
def test_impossible_tars_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        build_index(tar_of(tmp_path / "a.tar", members))


def test_a_tar_cut_anywhere_is_noticed(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "a.tar", [(f"{key}.jpg", bytes([65]) * 600) for key in "abc"])
    content = tar.read_bytes()
    assert len(build_index(tar)) == 3
    end_mark = 3 * (512 + 1024)
    for length in range(0, end_mark, 256):
        tar.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"a\.tar"):
            build_index(tar)


@pytest.mark.parametrize("damage", [b"\xff" * 512, bytes(512)])
def test_a_broken_header_in_the_middle_is_no_end(tmp_path: Path, damage: bytes) -> None:
    tar = tar_of(tmp_path / "a.tar", [(f"{key}.jpg", bytes([65]) * 600) for key in "abc"])
    content = tar.read_bytes()
    tar.write_bytes(content[:1536] + damage + content[2048:])
    with pytest.raises(DataError, match="damaged header at byte"):
        build_index(tar)


def test_what_follows_a_truncated_member_is_told_too(shard_folder: ShardFolder) -> None:
    """Also where the end is missing inside what training never reads."""
    tar = shard_folder(count=4, shard_size=4) / "000000.tar"
    tar.write_bytes(tar.read_bytes()[: int(build_index(tar)["meta"]["offset"][1]) + 5])
    assert [damage.key for damage in scan_tar(tar).bad] == ["sample_0001", ""]


def _array(shape: str, dtype: str = "'<i8'", content: bytes = b"") -> bytes:
    """A file of numpy with this header, whatever follows."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content


def _saved(rows: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, rows)
    return file.getvalue()


def _placed(rows: np.ndarray, member: str, field: str, value: int) -> bytes:
    rows = rows.copy()
    rows[member][field][0] = value
    return _saved(rows)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda _: b"no array", "is not a readable array"),
        (lambda _: b"", "is not a readable array"),
        (lambda _: _array("(1000000000000,)"), "its header claims 8 bytes x"),
        (lambda _: _array("(-1,)"), "its header claims|is not a readable array"),
        (lambda _: _array("(" * 90), "is not a readable array"),
        (lambda _: _array("(1,)", "'|O'", b"x" * 8), "it holds objects"),
        (lambda _: _saved(np.zeros(4)), "holds float64"),
        (lambda rows: _saved(rows[:, None]), "is no index of a tar"),
        (lambda rows: _placed(rows, "image", "size", -5), "places its image outside the tar"),
        (lambda rows: _placed(rows, "label", "size", 1 << 42), "places its label outside the tar"),
        (lambda rows: _placed(rows, "meta", "offset", 1 << 42), "places its meta outside the tar"),
        (lambda rows: _placed(rows, "image", "offset", -2), "places its image outside the tar"),
    ],
)
def test_an_index_that_its_checksum_vouches_for_and_that_is_none(
    make: Callable[[np.ndarray], bytes], reason: str, shard_folder: ShardFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shard_folder(count=4)
    index = index_path(folder / "000000.tar")
    content = make(np.load(index))
    index.write_bytes(content)
    manifest = Manifest.read(folder / "dataset.json")
    record = replace(manifest.shards[0], index_sha256=hashlib.sha256(content).hexdigest())
    (folder / "dataset.json").write_text(
        replace(manifest, shards=ShardRecords([record, *manifest.shards[1:]])).to_json()
    )
    with pytest.raises(DataError, match=reason):
        DatasetIndex.open(folder)
    assert check([str(folder), "--workers", "1"]) == 3
    assert re.search(reason, capsys.readouterr().err)


def test_a_manifest_of_any_content_is_told(shard_folder: ShardFolder) -> None:
    file = shard_folder(count=4) / "dataset.json"
    whole = json.loads(file.read_text())
    for content in ("[" * 100_000, "3", "", '{"format": ' + "9" * 5000 + "}", json.dumps({**whole, "shards": [3]})):
        file.write_text(content)
        with pytest.raises(DataError, match="cannot be read as a manifest"):
            DatasetIndex.open(file.parent)
    file.write_text(json.dumps({**whole, "shards": []}))
    with pytest.raises(DataError, match="counts no samples"):
        DatasetIndex.open(file.parent)


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf ~",
        "mfm-shards make scenes; rm -rf ~",
        "mfm-shards make $(rm)",
        "python x.py",
        "'",
    ],
)
def test_only_a_command_of_ours_is_passed_on_as_advice(command: str, shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=4)
    manifest = replace(Manifest.read(folder / "dataset.json"), command=command)
    (folder / "dataset.json").write_text(manifest.to_json())
    (folder / "000000.tar").unlink()
    with pytest.raises(DataError, match="is none of ours") as caught:
        DatasetIndex.open(folder)
    assert command not in str(caught.value)
