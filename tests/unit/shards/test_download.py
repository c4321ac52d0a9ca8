"""Downloaded files are found wherever they lie, and what is missing, twice there or broken is named."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from mfm_dist.errors import ConfigError, CorruptFileError, DataError
from mfm_dist.shards.card import Card, read_card
from mfm_dist.shards.download import SourceFile, SourceTree, find_pairs
from tests.helpers import downloads


def gta_of(count: int) -> Card:
    """GTA5 as if it had fewer pictures."""
    card = read_card("gta")
    return replace(card, splits=(replace(card.splits[0], numbers=range(1, count + 1), samples=count),))


def complaint(card: Card, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        find_pairs(card, SourceTree(root), allow_incomplete=False)
    return str(caught.value)


def test_a_complete_tree_is_found_in_any_folder(tmp_path: Path) -> None:
    downloads.gta(tmp_path / "some/where")
    (pairs,) = find_pairs(gta_of(3), SourceTree(tmp_path), allow_incomplete=False).values()
    assert [pair.key for pair in pairs] == ["00001", "00002", "00003"]
    assert str(pairs[0].label) == "some/where/labels/00001.png"


def test_gaps_in_numbers_are_named_with_the_place_to_get_them(tmp_path: Path) -> None:
    downloads.gta(tmp_path, (1, 2, 6, 9))
    text = complaint(gta_of(9), tmp_path)
    assert "is no complete GTA5" in text
    assert "train: 5 of 9 pairs are missing: 00003 to 00005, 00007 to 00008" in text
    assert "Download 01_images.zip to 10_images.zip" in text
    assert "https://download.visinf.tu-darmstadt.de/data/from_games/" in text
    assert "--allow-incomplete" in text
    found = find_pairs(gta_of(9), SourceTree(tmp_path), allow_incomplete=True)
    assert len(found["train"]) == 4


def test_half_pairs_are_named(tmp_path: Path) -> None:
    downloads.gta(tmp_path)
    (tmp_path / "labels/00002.png").unlink()
    (tmp_path / "images/00003.png").unlink()
    text = complaint(gta_of(3), tmp_path)
    assert "1 have no label (00002); looked for labels/<key>.png" in text
    assert "1 have no image (00003); looked for images/<key>.png" in text
    found = find_pairs(gta_of(3), SourceTree(tmp_path), allow_incomplete=True)
    assert [pair.key for pair in found["train"]] == ["00001"]


def test_cities_and_weathers_that_are_short_are_named(tmp_path: Path) -> None:
    text = complaint(read_card("cityscapes"), downloads.cityscapes(tmp_path / "cs"))
    assert "train: aachen: 1 images instead of 174" in text
    assert "val: frankfurt: 0 images instead of 267" in text
    assert "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip" in text
    text = complaint(read_card("acdc"), downloads.acdc(tmp_path / "acdc"))
    assert "train: snow: 0 images instead of 400" in text
    text = complaint(read_card("dark_zurich"), downloads.dark_zurich(tmp_path / "dz"))
    assert "train: 2 images instead of 2416" in text


def test_a_wrong_folder_is_told_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    text = complaint(read_card("cityscapes"), tmp_path)
    assert "no image at all; their paths look like leftImg8bit/train/<part>/<key>_leftImg8bit.png" in text
    assert "--allow-incomplete" not in text
    with pytest.raises(DataError):
        find_pairs(read_card("cityscapes"), SourceTree(tmp_path), allow_incomplete=True)
    with pytest.raises(ConfigError, match="is no folder"):
        SourceTree(tmp_path / "nowhere")


def test_one_split_can_be_packed_alone(tmp_path: Path) -> None:
    downloads.cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "leftImg8bit/train")
    found = find_pairs(read_card("cityscapes"), SourceTree(tmp_path), allow_incomplete=True)
    assert list(found) == ["val"]
    assert [split.name for split in read_card("cityscapes").only(["val"]).splits] == ["val"]


def test_a_file_that_is_there_twice_is_a_mistake_unless_one_is_in_an_archive(tmp_path: Path) -> None:
    downloads.gta(tmp_path)
    with zipfile.ZipFile(tmp_path / "01_images.zip", "w") as archive:
        archive.write(tmp_path / "images/00001.png", "images/00001.png")
    (pairs,) = find_pairs(gta_of(3), SourceTree(tmp_path), allow_incomplete=False).values()
    assert pairs[0].image == SourceFile("images/00001.png")
    shutil.copytree(tmp_path / "images", tmp_path / "copy/images")
    assert "copy/images/00001.png and images/00001.png" in complaint(gta_of(3), tmp_path)


def test_names_with_backslashes_from_a_windows_archive(tmp_path: Path) -> None:
    source = downloads.synthia(tmp_path / "whole", (0,))
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in source.rglob("*.png"):
        shutil.copy(file, flat / str(file.relative_to(source)).replace("/", "\\"))
    found = find_pairs(read_card("synthia"), SourceTree(flat), allow_incomplete=True)
    assert str(found["train"][0].label) == "RAND_CITYSCAPES\\GT\\LABELS\\0000000.png"


def test_hidden_files_and_loops_of_links_are_passed_over(tmp_path: Path) -> None:
    downloads.gta(tmp_path)
    (tmp_path / "images/._00001.png").write_bytes(b"resource fork")
    (tmp_path / "images/loop").symlink_to(tmp_path)
    names = [file.name for file in SourceTree(tmp_path).files()]
    assert len(names) == len(set(names)) == 7
    assert not any("._" in name for name in names)


def test_archives_that_are_broken_say_so(tmp_path: Path) -> None:
    (tmp_path / "01_images.zip").write_bytes(b"PK half")
    with pytest.raises(DataError, match=r"01_images\.zip cannot be opened .*; download it again"):
        SourceTree(tmp_path).files()


def test_a_damaged_or_bloated_member_is_unreadable(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("images/00001.png", b"0123456789" * 50)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[100] ^= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(CorruptFileError, match="Bad CRC-32"):
        SourceTree(tmp_path).read(SourceFile("images/00001.png", "a.zip"))
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes((1 << 28) + 1))
    with pytest.raises(CorruptFileError, match="would unpack to 268435457 bytes"):
        SourceTree(tmp_path).read(SourceFile("bomb", "b.zip"))
    with pytest.raises(CorruptFileError, match="No such file"):
        SourceTree(tmp_path).read(SourceFile("gone.png"))
