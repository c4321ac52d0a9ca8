"""Downloads become shards: labels as a slow reader finds them, images byte for byte, and damage named."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mfm_dist.data.class_statistics import read_statistics
from mfm_dist.data.manifest import Manifest
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import ConfigError, CorruptFileError, DataError
from mfm_dist.shards.card import Card, read_card
from mfm_dist.shards.convert import Conversion, convert, sample_key
from mfm_dist.shards.download import SourceFile, SourceTree
from tests.helpers import downloads
from tests.helpers.classes import CLASSES

# The tables of the facts, typed again: Cityscapes ids (also of GTA5) and SYNTHIA ids to train ids.
CITYSCAPES = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
              27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
SYNTHIA = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14,
           19: 15, 20: 16, 12: 17, 11: 18}  # fmt: skip
SAME = {i: i for i in range(19)}


def small(name: str) -> Card:
    """The card of a data set whose fixtures are small."""
    card = read_card(name)
    return card if card.sizes_vary else replace(card, size=downloads.SIZE)


def run(card: Card, source: Path, output: Path, **changes: object) -> list[str]:
    """Converts; returns what was reported."""
    said: list[str] = []
    workers = changes.pop("workers", 2)
    overwrite = bool(changes.pop("overwrite", False))
    settings = {"box": None, "val_box": None, "image_format": "png", "shard_size": 2, "bad_limit": 0.0}
    conversion = Conversion(
        source=source, output=output, allow_incomplete=True, command="make shards", **{**settings, **changes}
    )  # type: ignore[arg-type]
    convert(card, conversion, report=said.append, workers=workers, overwrite=overwrite)  # type: ignore[arg-type]
    return said


def looked_up(ids: list[list[int]], table: dict[int, int]) -> list[list[int]]:
    return [[table.get(value, 255) for value in row] for row in ids]


LABELS = {
    "gta": ("train", ["labels/00001.png", "labels/00002.png", "labels/00003.png"], CITYSCAPES),
    "synthia": ("train", [f"RAND_CITYSCAPES/GT/LABELS/000000{i}.png" for i in range(3)], SYNTHIA),
    "cityscapes": (
        "train",
        [
            "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
            "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png",
        ],
        CITYSCAPES,
    ),
    "urbansyn": ("train", [f"ss/ss_000{i}.png" for i in (1, 2, 3)], SAME),
    "acdc": (
        "train",
        [
            "gt_trainval/gt/fog/train/GOPR00/GOPR00_frame_000001_gt_labelTrainIds.png",
            "gt_trainval/gt/night/train/GOPR01/GOPR01_frame_000001_gt_labelTrainIds.png",
        ],
        SAME,
    ),
    "dark_zurich": (
        "val",
        ["Dark_Zurich_val_anon/gt/val/night/GOPR0356/GOPR0356_frame_000321_gt_labelTrainIds.png"],
        SAME,
    ),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_those_a_slow_reader_finds_pixel_by_pixel(name: str, tmp_path: Path) -> None:
    make: Callable[[Path], Path] = vars(downloads)[name]
    source = make(tmp_path / "download")
    run(small(name), source, tmp_path / "shards")
    split, files, table = LABELS[name]
    reader = ShardReader(tmp_path / "shards" / split)
    assert len(reader) == len(files)
    for number, file in enumerate(files):
        label = reader.read(number).label
        assert label is not None
        assert label.tolist() == looked_up(downloads.slow_ids(source / file), table)
    everything = np.concatenate([np.array(reader.read(i).label).ravel() for i in range(len(reader))])
    assert set(everything.tolist()) == {*table.values(), 255}  # every class was there to be found
    counts = np.concatenate(list(read_statistics(tmp_path / "shards" / split, reader.index.manifest)))
    assert counts.tolist() == [
        [int((np.array(reader.read(i).label) == c).sum()) for c in range(19)] for i in range(len(reader))
    ]


def test_images_keep_their_bytes(tmp_path: Path) -> None:
    source = downloads.cityscapes(tmp_path / "download")
    run(small("cityscapes"), source, tmp_path / "shards")
    (sample,) = webdataset.WebDataset(str(tmp_path / "shards/val/000000.tar"), shardshuffle=False)
    name = "leftImg8bit/val/munster/munster_000002_000019_leftImg8bit.png"
    assert sample["__key__"] == "munster_000002_000019"
    assert sample["png"] == (source / name).read_bytes()
    assert json.loads(sample["json"]) == {"key": "munster_000002_000019", "file": name, "original_size": [24, 40]}


def test_only_the_night_of_dark_zurich_is_packed_and_its_training_has_no_labels(tmp_path: Path) -> None:
    run(small("dark_zurich"), downloads.dark_zurich(tmp_path / "download"), tmp_path / "shards")
    reader = ShardReader(tmp_path / "shards/train")
    assert [reader.read(i, with_label=False).key for i in range(len(reader))] == [
        "GOPR03_frame_000000", "GOPR03_frame_000001",
    ]  # fmt: skip
    assert reader.index.manifest.pixel_counts == {}
    assert len(ShardReader(tmp_path / "shards/val")) == 1


def test_a_16_bit_label_read_as_8_bits_would_be_all_road_or_void(tmp_path: Path) -> None:
    """The trap itself, so that the fixture is known to hold it."""
    source = downloads.synthia(tmp_path, (0,))
    red = np.array(Image.open(source / "RAND_CITYSCAPES/GT/LABELS/0000000.png"))[..., 0]
    assert not red.any()


def test_archives_give_the_same_shards_without_unpacking(tmp_path: Path) -> None:
    source = downloads.gta(tmp_path / "unpacked")
    packed = tmp_path / "packed"
    packed.mkdir()
    for kind in ("images", "labels"):
        with zipfile.ZipFile(packed / f"01_{kind}.zip", "w") as archive:
            for file in sorted(source.glob(f"{kind}/*.png")):
                archive.write(file, file.relative_to(source))
            archive.write(source / f"{kind}/00001.png", f"../../{kind}/00009.png")
    run(small("gta"), source, tmp_path / "a")
    run(small("gta"), packed, tmp_path / "b")
    first, second = (Manifest.read(tmp_path / name / "train/dataset.json") for name in "ab")
    assert not list(tmp_path.rglob("00009.png"))
    readers = [ShardReader(tmp_path / name / "train") for name in "ab"]
    assert first.samples == second.samples == 3
    for number in range(3):
        one, other = (reader.read(number) for reader in readers)
        assert one.key == other.key
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(np.array(one.label), np.array(other.label))


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation without anti-aliasing, one pixel after the other."""
    height, width, _ = image.shape
    out = np.zeros((*size, 3))
    for y in range(size[0]):
        for x in range(size[1]):
            v = min(max((y + 0.5) * height / size[0] - 0.5, 0), height - 1)
            u = min(max((x + 0.5) * width / size[1] - 0.5, 0), width - 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            b, a = v - top, u - left
            upper = (1 - a) * image[top, left] + a * image[top, right].astype(float)
            lower = (1 - a) * image[bottom, left] + a * image[bottom, right].astype(float)
            out[y, x] = (1 - b) * upper + b * lower
    return out


def test_resizing_keeps_the_aspect_and_pads_nothing(tmp_path: Path) -> None:
    source = downloads.gta(tmp_path / "download", (1,), size=(52, 96))
    run(small("gta"), source, tmp_path / "shards", box=(64, 36))
    sample = ShardReader(tmp_path / "shards/train").read(0)
    size = (35, 64)  # 64 / 96 * 52 = 34.67; the box is 36 high
    assert sample.image.shape[1:] == size
    ids = looked_up(downloads.slow_ids(source / "labels/00001.png"), CITYSCAPES)
    assert sample.label is not None
    assert sample.label.tolist() == [[ids[int(y * 52 / 35)][int(x * 96 / 64)] for x in range(64)] for y in range(35)]
    expected = bilinear(downloads.picture(1, (52, 96)), size)
    assert np.abs(sample.image.permute(1, 2, 0).numpy() - expected).max() <= 0.501
    meta = next(iter(webdataset.WebDataset(str(tmp_path / "shards/train/000000.tar"), shardshuffle=False)))["json"]
    assert json.loads(meta)["original_size"] == [52, 96]
    manifest = Manifest.read(tmp_path / "shards/train/dataset.json")
    counts = np.concatenate(list(read_statistics(tmp_path / "shards/train", manifest)))
    assert counts.sum() == (np.array(sample.label) != 255).sum()  # counted at the stored size


def test_validation_images_have_a_size_of_their_own(tmp_path: Path) -> None:
    source = downloads.cityscapes(tmp_path / "download")
    run(small("cityscapes"), source, tmp_path / "shards", box=(20, 12), image_format="jpg")
    assert Manifest.read(tmp_path / "shards/train/dataset.json").image_sizes == {"12x20": 2}
    assert Manifest.read(tmp_path / "shards/val/dataset.json").image_sizes == {"24x40": 1}


def test_gta_pairs_of_different_size_are_left_out_and_named(tmp_path: Path) -> None:
    source = downloads.gta(tmp_path / "download", (1, 2, 3, 4))
    downloads.save_palette(source / "labels/00003.png", downloads.blocks(3, [*range(34)], (26, 40)))
    said = run(small("gta"), source, tmp_path / "shards")
    reason = "labels/00003.png has 26x40 pixels and its image 24x40 (height x width)"
    manifest = Manifest.read(tmp_path / "shards/train/dataset.json")
    assert manifest.left_out == {"00003": reason}
    assert [record.samples for record in manifest.shards] == [2, 1]
    assert said[-1] == f"{tmp_path}/shards/train: 1 samples left out:\n  {reason}"
    reader = ShardReader(tmp_path / "shards/train")
    assert [reader.read(i).key for i in range(len(reader))] == ["00001", "00002", "00004"]


def test_unequal_pairs_elsewhere_are_a_mistake(tmp_path: Path) -> None:
    source = downloads.synthia(tmp_path / "download")
    ids = downloads.blocks(0, downloads.SYNTHIA_IDS, (20, 40))
    downloads.save_rgb16(source / "RAND_CITYSCAPES/GT/LABELS/0000001.png", ids, ids)
    with pytest.raises(DataError, match=r"1 of 3 samples cannot be used.*\n.*0000001\.png has 20x40"):
        run(small("synthia"), source, tmp_path / "shards")


def damage(source: Path) -> dict[str, str]:
    """Spoils pairs of a GTA5 download in every way; key -> what must be said about it."""
    labels, images = source / "labels", source / "images"
    content = (images / "00001.png").read_bytes()
    (images / "00001.png").write_bytes(content[: len(content) // 2])
    (images / "00002.png").write_bytes(b"<html>404</html>")
    flipped = bytearray((labels / "00003.png").read_bytes())
    flipped[-30] ^= 1
    (labels / "00003.png").write_bytes(flipped)
    downloads.save_palette(labels / "00004.png", downloads.blocks(4, [7, 8, 40, 41]))
    downloads.save_picture(labels / "00005.png", downloads.picture(5))
    (labels / "00006.png").write_bytes(b"")
    header = (images / "00007.png").read_bytes()
    (images / "00007.png").write_bytes(header[:16] + (1 << 30).to_bytes(4, "big") * 2 + header[24:])
    return {
        "00001": "images/00001.png cannot be decoded",
        "00002": "images/00002.png cannot be decoded",
        "00003": "labels/00003.png cannot be decoded",
        "00004": "labels/00004.png holds the ids 40, 41, which stand neither for a class",
        "00005": "labels/00005.png is 8-bit RGB; expected is 8-bit palette or 8-bit grey",
        "00006": "labels/00006.png is no PNG",
        "00007": "images/00007.png c",
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files_are_all_named_and_whole_shards_kept(tmp_path: Path) -> None:
    source = downloads.gta(tmp_path / "download", tuple(range(1, 13)))
    whole = {path: path.read_bytes() for path in source.rglob("*.png")}
    expected = damage(source)
    output = tmp_path / "shards"
    with pytest.raises(DataError, match="7 of 12 samples cannot be used, 0 may be:") as caught:
        run(small("gta"), source, output)
    for reason in expected.values():
        assert reason in str(caught.value)
    kept = {record.file for record in Manifest.read(output / "train/dataset.unfinished.json").shards}
    assert kept == {"000004.tar", "000005.tar"}  # samples 9 to 12
    said = run(small("gta"), source, output, bad_limit=0.6)
    manifest = Manifest.read(output / "train/dataset.json")
    assert manifest.left_out.keys() == expected.keys()
    assert all(manifest.left_out[key].startswith(reason) for key, reason in expected.items())
    assert "7 samples left out:" in said[-1]
    reader = ShardReader(output / "train")
    assert [reader.read(i).key for i in range(len(reader))] == ["00008", "00009", "00010", "00011", "00012"]
    for path, content in whole.items():  # downloaded again
        path.write_bytes(content)
    run(small("gta"), source, tmp_path / "again")
    assert len(ShardReader(tmp_path / "again/train")) == 12


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_inside_an_archive_leaves_out_that_sample_alone(method: int, tmp_path: Path) -> None:
    source, packed = downloads.gta(tmp_path / "download"), tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w", method) as archive:
        for file in sorted(source.rglob("0000?.png")):
            archive.write(file, file.relative_to(source))
        start = archive.getinfo("images/00002.png").header_offset + 30 + len("images/00002.png")
    whole = packed.read_bytes()
    for where in range(start, start + 40):
        (tmp_path / "zips").mkdir(exist_ok=True)
        (tmp_path / "zips/gta.zip").write_bytes(whole[:where] + bytes([whole[where] ^ 0xFF]) + whole[where + 1 :])
        with suppress(CorruptFileError):
            found = SourceTree(tmp_path / "zips").read(SourceFile("images/00002.png", "gta.zip"))
            assert found == (source / "images/00002.png").read_bytes()  # LZMA has two bytes that mean nothing
    run(small("gta"), tmp_path / "zips", tmp_path / "shards", bad_limit=0.4)
    manifest = Manifest.read(tmp_path / "shards/train/dataset.json")
    assert list(manifest.left_out) == ["00002"]
    assert manifest.samples == 2


def test_a_directory_of_an_archive_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "gta.zip", "w") as archive:
        archive.writestr("images/straße.png", b"")
    content = (tmp_path / "gta.zip").read_bytes()
    name = content.rindex("straße".encode())
    (tmp_path / "gta.zip").write_bytes(content[:name] + b"\xff" + content[name + 1 :])
    with pytest.raises(DataError, match=r"gta\.zip cannot be opened .*; download it again"):
        SourceTree(tmp_path).files()


def test_files_mended_after_a_failed_run_complete_the_set(tmp_path: Path) -> None:
    source = downloads.gta(tmp_path / "download", tuple(range(1, 6)))
    whole = (source / "images/00002.png").read_bytes()
    (source / "images/00002.png").write_bytes(whole[:100])
    with pytest.raises(DataError, match="1 of 5 samples"):
        run(small("gta"), source, tmp_path / "shards")
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards/train").glob("00000[12].tar")}
    assert len(kept) == 2
    (source / "images/00002.png").write_bytes(whole)
    run(small("gta"), source, tmp_path / "shards")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards/train").glob("00000[12].tar")} == kept
    assert len(ShardReader(tmp_path / "shards/train")) == 5


def test_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    source = downloads.synthia(tmp_path / "download")
    for workers in (1, 3):
        run(small("synthia"), source, tmp_path / str(workers), workers=workers, image_format="jpg", box=(20, 12))
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "train").iterdir()} for name in ("1", "3")
    )
    assert first == second


def test_another_size_is_another_recipe(tmp_path: Path) -> None:
    source = downloads.gta(tmp_path / "download")
    run(small("gta"), source, tmp_path / "shards")
    with pytest.raises(ConfigError, match=r"size: as downloaded -> 12x20\)"):
        run(small("gta"), source, tmp_path / "shards", box=(20, 12))
    run(small("gta"), source, tmp_path / "shards", box=(20, 12), overwrite=True)
    assert Manifest.read(tmp_path / "shards/train/dataset.json").image_sizes == {"12x20": 3}


def test_wrong_size_of_a_picture_is_named(tmp_path: Path) -> None:
    source = downloads.cityscapes(tmp_path / "download")
    with pytest.raises(DataError, match=r"aachen.*has 24x40 pixels \(height x width\), not 1024x2048"):
        run(read_card("cityscapes"), source, tmp_path / "shards")


def test_keys_fit_a_shard_and_stay_apart() -> None:
    paths = ["plain_1-a", "a b", "a_b", "a/b", "a.b", "x" * 200, "x" * 201, "été"]
    keys = [sample_key(path) for path in paths]
    assert keys[0] == "plain_1-a"
    assert len(set(keys)) == len(paths)
    assert all(len(key) <= 80 and key.replace("_", "").replace("-", "").isalnum() and key.isascii() for key in keys)


@pytest.mark.parametrize("name", ["acdc", "cityscapes", "dark_zurich", "gta", "synthia"])
def test_every_card_is_sound(name: str) -> None:
    card = read_card(name)
    assert card.name == name
    assert card.labels is not None
    assert set(card.labels.classes.values()) <= {*range(len(CLASSES)), 255}
    assert "https://" in card.download or "http://" in card.download
    for split in card.splits:
        assert not split.parts or sum(split.parts.values()) == split.samples
        assert split.numbers is None or len(split.numbers) == split.samples
