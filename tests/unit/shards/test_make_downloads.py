"""mfm-shards make of downloads and of one's own images: where shards go, labels, and mistakes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mfm_dist.config.class_files import load_class_set
from mfm_dist.data.manifest import Manifest
from mfm_dist.data.reader import ShardReader
from mfm_dist.shards import check
from mfm_dist.shards.make import main
from tests.helpers import downloads


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_gta_goes_where_the_configurations_look_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    downloads.gta(tmp_path / "download")
    options = ["--input", "download", "--size", "18x32", "--shard-size", "2", "--workers", "1"]
    assert main(["gta", *options]) == 3
    error = capsys.readouterr().err
    assert "24963 of 24966 pairs are missing: 00004 to 24966" in error
    assert not Path("data").exists()
    assert main(["gta", *options, "--allow-incomplete"]) == 0
    reader = ShardReader("data/gta/train")
    assert len(reader) == 3
    assert reader.read(0).image.shape == (3, 18, 30)
    assert check.main(["data/gta"]) == 0
    capsys.readouterr()
    assert main(["gta", *options, "--allow-incomplete"]) == 0
    assert capsys.readouterr().out == "data/gta is complete: train 3 samples\n"


def test_the_command_in_the_manifest_mends_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    downloads.gta(tmp_path / "download", (1, 2, 3, 4, 5))
    (tmp_path / "download/labels/00002.png").write_bytes(b"")
    words = ["gta", "--input", "download", "--shard-size", "2", "--allow-incomplete", "--bad-limit", "0.2"]
    assert main([*words, "--format", "png"]) == 0
    whole = bytes_of(Path("data/gta/train"))
    Path("data/gta/train/000001.tar").write_bytes(b"")
    command = shlex.split(Manifest.read(Path("data/gta/train/dataset.json")).command)
    assert command[:2] == ["mfm-shards", "make"]
    assert str(tmp_path / "download") in command
    assert main([*command[2:], "--output", "data/gta"]) == 0
    assert bytes_of(Path("data/gta/train")) == whole
    assert "1 samples left out:\n  labels/00002.png is no PNG" in capsys.readouterr().out


def test_own_images_with_ids(tmp_path: Path) -> None:
    downloads.save_picture(tmp_path / "mine/rgb/day 1/a.b.jpg", downloads.picture(0))
    downloads.save_picture(tmp_path / "mine/rgb/day 2/a.b.jpg", downloads.picture(1))
    for day in (1, 2):
        downloads.save_palette(tmp_path / f"mine/ids/day {day}/a.b.png", downloads.blocks(day, [1, 2, 3]), 4)
    Path("ids.yaml").write_text("names: [field, path]\nids: {1: path, 2: field}\nignore: [3]\n")
    where = ["--images", "rgb", "--labels", "ids", "--classes", "ids.yaml"]
    assert main(["folder", "--input", "mine", "--name", "city", *where]) == 0
    reader = ShardReader("data/city/train")
    table = {1: 1, 2: 0, 3: 255}
    for number in range(2):
        sample = reader.read(number)
        assert sample.label is not None
        ids = downloads.slow_ids(tmp_path / f"mine/ids/day {number + 1}/a.b.png")
        assert sample.label.tolist() == [[table[value] for value in row] for row in ids]
    assert reader.read(0).key.startswith("day_1_a_b_")
    assert f"--classes {tmp_path / 'ids.yaml'}" in reader.index.manifest.command
    Path("ids.yaml").write_text("names: [field, path]\nids: {1: path, 2: field}\nignore: others\n")
    assert main(["folder", "--input", "mine", "--name", "city", *where]) == 2  # what is stored was made otherwise


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "palette"])
def test_own_images_with_colours(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A palette PNG is read as the colours that it shows."""
    downloads.save_picture(tmp_path / "mine/a.jpg", downloads.picture(0))
    index = downloads.blocks(0, [0, 1, 2])
    colours = np.array([(128, 64, 128), (1, 2, 3), (0, 0, 0)], dtype=np.uint8)
    label = Image.fromarray(colours[index])
    label = label.convert(kind) if kind != "palette" else label.quantize(colors=3)
    (tmp_path / "mine/labels").mkdir()
    label.save(tmp_path / "mine/labels/a.png")
    file = 'names: [a, b]\ncolours: {"1 2 3": a, "#804080": b}\n'
    Path("c.yaml").write_text(file)
    words = ["folder", "--input", "mine", "--name", "city", "--labels", "labels", "--classes", "c.yaml"]
    assert main(words) == 3
    assert "labels/a.png holds the colours #000000, which stand neither for a class" in capsys.readouterr().err
    Path("c.yaml").write_text(file + "ignore: others\n")
    assert main([*words, "--overwrite"]) == 0
    sample = ShardReader("data/city/train").read(0)
    assert sample.label is not None
    assert sample.label.tolist() == np.array([1, 0, 255])[index].tolist()


def test_a_label_folder_is_never_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["folder", "--input", ".", "--name", "a", "--labels", "b"]) == 2
    error = capsys.readouterr().err
    assert "cityscapes19, cityscapes19_ids, cityscapes7, synthia13, synthia16, or a file" in error
    assert "names: [soil, crop, weed]" in error


def test_a_download_in_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    downloads.gta(tmp_path / "download")
    options = ["gta", "--input", "download", "--allow-incomplete", "--workers", "1"]
    for name in ("cityscapes19", "cityscapes7"):
        assert main([*options, "--output", name, "--classes", name]) == 0
    plain, merged = (ShardReader(f"{name}/train") for name in ("cityscapes19", "cityscapes7"))
    assert "classes" not in plain.index.manifest.recipe.arguments
    relabelling = load_class_set("cityscapes7").relabelling(load_class_set("cityscapes19"))
    assert relabelling is not None
    for number in range(len(plain)):
        before, after = plain.read(number).label, merged.read(number).label
        assert np.array_equal(relabelling.apply(before.numpy()), after.numpy())
    Path("other.yaml").write_text("names: [soil, crop]\n")
    assert main([*options, "--classes", "other.yaml"]) == 2
    assert "none of them is a class of GTA5, or merges one" in capsys.readouterr().err


def test_own_images_without_labels_keep_their_jpeg_bytes(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.JPEG", "c.png", "d.bmp"):
        downloads.save_picture(tmp_path / "mine" / name, downloads.picture(0))
    (tmp_path / "mine/notes.txt").write_text("")
    assert main(["folder", "--input", "mine", "--name", "city", "--split", "val", "--workers", "1"]) == 0
    reader = ShardReader("data/city/val")
    assert [reader.read(i, with_label=False).key for i in range(len(reader))] == ["a", "b", "c", "d"]
    row = reader.index.rows[0][0]["image"]
    tar = Path("data/city/val/000000.tar").read_bytes()
    assert tar[row["offset"] : row["offset"] + row["size"]] == (tmp_path / "mine/a.jpg").read_bytes()


def test_labels_beside_their_images_by_the_ends_of_their_names(tmp_path: Path) -> None:
    downloads.cityscapes(tmp_path / "cs")
    ends = ["--image-end", "_leftImg8bit.png", "--label-end", "_gtFine_labelIds.png", "--classes", "ids.json"]
    Path("ids.json").write_text(json.dumps({"names": ["road"], "ids": {"7": "road"}, "ignore": "others"}))
    folders = ["--images", "leftImg8bit/train", "--labels", "gtFine/train"]
    assert main(["folder", "--input", "cs", "--name", "mine", *folders, *ends]) == 0
    assert len(ShardReader("data/mine/train")) == 2


def test_images_and_labels_may_share_a_folder(tmp_path: Path) -> None:
    for number in range(2):
        downloads.save_picture(tmp_path / f"mine/{number}.jpg", downloads.picture(number))
        downloads.save_grey(tmp_path / f"mine/labels/{number}.png", downloads.blocks(number, [0, 5, 255]))
    assert main(["folder", "--input", "mine", "--name", "city", "--labels", "labels", "--classes", "cityscapes19"]) == 0
    assert len(ShardReader("data/city/train")) == 2


def test_unknown_ids_of_own_labels_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    downloads.save_picture(tmp_path / "mine/a.jpg", downloads.picture(0))
    downloads.save_grey(tmp_path / "mine/labels/a.png", downloads.blocks(0, [0, 33, 200]))
    assert main(["folder", "--input", "mine", "--name", "city", "--labels", "labels", "--classes", "cityscapes19"]) == 3
    assert "labels/a.png holds the ids 33, 200, which stand neither for a class" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["gta", "--input", "nowhere"], "nowhere is no folder"),
        (["gta", "--input", ".", "--size", "1280"], "1280 is no height x width such as 720x1280"),
        (["gta", "--input", ".", "--size", "0x5"], "0x5 is no height x width"),
        (["gta", "--input", ".", "--size", "1280x720"], "pictures of streets are wider than high: 720x1280"),
        (["gta", "--input", ".", "--val-size", "10x10"], "--val-size"),
        (["cityscapes", "--input", ".", "--splits", "test"], "invalid choice: 'test'"),
        (["cityscapes", "--input", ".", "--bad-limit", "2"], "2 is not between 0 and 1"),
        (["folder", "--input", "."], "--name"),
        (["folder", "--input", ".", "--name", "../up"], "../up holds more than letters"),
        (["folder", "--input", ".", "--name", "a", "--classes", "x.yaml"], "no labels are given"),
        (
            ["folder", "--input", ".", "--name", "a", "--labels", "b", "--classes", "x.yaml"],
            "x.yaml: no class set has this name",
        ),
    ],
)
def test_wrong_arguments(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert reason in capsys.readouterr().err
    assert not Path("data").exists()


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    for number in range(40):
        image = np.random.default_rng(number).integers(256, size=(120, 200, 3), dtype=np.uint8)
        downloads.save_picture(tmp_path / f"mine/{number:03d}.png", np.asarray(Image.fromarray(image)))
    words = ["folder", "--input", str(tmp_path / "mine"), "--name", "a", "--shard-size", "2", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mfm_dist.shards", "make", *words, "--output", str(tmp_path / "out")],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()  # the first shard is there
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    folder = tmp_path / "out/train"
    kept = [record.file for record in Manifest.read(folder / "dataset.unfinished.json").shards]
    assert 0 < len(kept) < 20
    stamps = {name: (folder / name).stat().st_mtime_ns for name in kept}
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == stamps
    assert main([*words, "--output", str(tmp_path / "undisturbed")]) == 0
    again = {n: c for n, c in bytes_of(folder).items() if not n.endswith(".unfinished")}
    assert again == bytes_of(tmp_path / "undisturbed/train")
