"""Classes of one's own, from folders of pictures to a model: five, in labels of ids and in labels of colours."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mfm_dist import evaluate, export, predict, train
from mfm_dist.data.manifest import Manifest
from mfm_dist.report.__main__ import main as report
from mfm_dist.shards.make import main as make_shards
from tests.helpers.downloads import save_grey, save_picture
from tests.helpers.runs import DEFAULTS, run_train, tiny_overrides

NAMES = ["soil", "crop", "weed", "tool", "sky"]
COLOURS = [(128, 64, 0), (0, 128, 0), (230, 30, 60), (90, 90, 200), (150, 200, 255)]
IDS = [3, 10, 11, 40, 7]
OF_IDS = """
names: [soil, crop, weed, tool, sky]
palette: ["#804000", "#008000", "#e61e3c", "#5a5ac8", "#96c8ff"]
ids: {3: soil, 10: crop, 11: weed, 40: tool, 7: sky}
ignore: [0]
groups: {plants: [crop, weed]}
"""
OF_COLOURS = """
names: [soil, crop, weed, tool, sky]
colours: {"#804000": soil, "0 128 0": crop, "#e61e3c": weed, "#5a5ac8": tool, "#96c8ff": sky}
ignore: ["#000000"]
"""


def field(number: int) -> np.ndarray:
    """Draw a label, indices of NAMES and -1 for nothing, int64 [64, 96]: blocks, with every value in it."""
    generator = np.random.default_rng(number)
    grid = np.resize(np.arange(-1, len(NAMES)), (4, 6))
    generator.shuffle(grid.reshape(-1))
    return grid.repeat(16, axis=0).repeat(16, axis=1)


def picture_of(label: np.ndarray, number: int) -> np.ndarray:
    """Draw a picture whose colours follow from the label, uint8 [H, W, 3]."""
    noise = np.random.default_rng(number).integers(40, size=(*label.shape, 3))
    return (np.array([*COLOURS, (0, 0, 0)])[label] * 0.8 + noise).astype(np.uint8)


def write_pictures(folder: Path, count: int, *, colours: bool) -> None:
    for number in range(count):
        label = field(number)
        save_picture(folder / f"rgb/{number}.png", picture_of(label, number))
        if colours:
            save_picture(folder / f"labels/{number}.png", np.array([*COLOURS, (0, 0, 0)])[label].astype(np.uint8))
        else:
            save_grey(folder / f"labels/{number}.png", np.array([*IDS, 0])[label])


def pack(folder: Path, name: str, classes: Path, split: str, output: Path) -> None:
    where = ["--input", str(folder), "--images", "rgb", "--labels", "labels", "--classes", str(classes)]
    words = ["--name", name, "--split", split, "--output", str(output / name), "--workers", "1"]
    assert make_shards(["folder", *where, *words, "--format", "png"]) == 0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ids/train`` and ``colours/{train,val}``, packed by the command."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "ids.yaml").write_text(OF_IDS)
    (folder / "colours.yaml").write_text(OF_COLOURS)
    write_pictures(folder / "of_ids", 6, colours=False)
    write_pictures(folder / "of_colours", 3, colours=True)
    pack(folder / "of_ids", "ids", folder / "ids.yaml", "train", folder / "shards")
    for split in ("train", "val"):
        pack(folder / "of_colours", "colours", folder / "colours.yaml", split, folder / "shards")
    return folder / "shards"


def overrides(shards: Path, run: Path) -> list[str]:
    sets = ["data.source=ids/train", "data.target=colours/train", "data.validation=colours/val"]
    rare = "data.rare_class_sampling={enabled: true, min_pixels: 100}"
    few = ["train.steps=20", "checkpoint.every=20", "eval.class_sets=[plants]", "optim.lr=1e-2"]
    return [*tiny_overrides(shards, run), *sets, rare, *few]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of two processes under ZeRO-2."""
    folder = tmp_path_factory.mktemp("run") / "own"
    completed = run_train(overrides(shards, folder), launch="cpu_zero2")
    assert completed.returncode == 0, completed.stderr
    return folder


def test_both_kinds_of_labels_become_the_same_shards(shards: Path) -> None:
    manifests = [Manifest.read(shards / name / "dataset.json") for name in ("ids/train", "colours/train")]
    for manifest in manifests:
        assert manifest.classes is not None
        assert list(manifest.classes.names) == NAMES
        assert list(manifest.classes.palette) == COLOURS
        counts = manifest.pixel_counts
        assert list(counts) == [*NAMES, "ignore"]
        assert set(counts.values()) == {manifest.samples * 16 * 16 * 4}


def test_scores_have_the_names(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = json.loads((run / "eval/step_00000020.json").read_text())
    assert list(scores["iou"]) == NAMES
    assert "miou_plants" in scores["means"]
    assert evaluate.main(["--run", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["iou"] == pytest.approx(scores["iou"], nan_ok=True)
    assert again["means"] == pytest.approx(scores["means"], nan_ok=True)


def test_pictures_and_page_have_the_names_and_colours(run: Path) -> None:
    with Image.open(run / "eval/step_00000020/0.png") as picture:
        panels = np.asarray(picture).astype(float)[:64]  # without the legend below them
    image, label = panels[:, :96], panels[:, 100:196]  # 4 pixels between them
    expected = 0.35 * image + 0.65 * np.array([*COLOURS, (0, 0, 0)])[field(0)]
    np.testing.assert_allclose(label, expected, atol=0.51)
    assert report([str(run), "--images", "1"]) == 0
    page = (run / "report.html").read_text()
    for name, colour in zip(NAMES, COLOURS, strict=True):
        assert f'style="background:#{bytes(colour).hex()}" aria-hidden="true"></span>{name}' in page
    assert "sidewalk" not in page


def test_the_export_has_them_too(run: Path, shards: Path, tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "predicted"
    onnx = ["--onnx"] if find_spec("onnx") and find_spec("onnxscript") else []
    assert export.main(["--run", str(run), "--output", str(model), *onnx]) == 0
    card = json.loads((model / "config.json").read_text())
    assert (card["class_names"], card["palette"]) == (NAMES, [list(colour) for colour in COLOURS])
    if onnx:
        import onnx as onnx_package

        (described,) = onnx_package.load(model / "model.onnx").metadata_props
        assert json.loads(described.value)["class_names"] == NAMES
    photo = tmp_path / "photo/a.png"
    save_picture(photo, picture_of(field(50), 50))
    assert predict.main(["--model", str(model), "--input", str(photo), "--output", str(output)]) == 0
    assert json.loads((output / "predictions.json").read_text())["classes"] == NAMES
    with Image.open(output / "ids/a.png") as ids:
        assert np.asarray(ids).max() < len(NAMES)
        palette = ids.getpalette()
    assert palette is not None
    assert palette[:15] == [part for colour in COLOURS for part in colour]
    assert evaluate.main(["--model", str(model), "--data", str(shards / "colours/val")]) == 0


def test_reversed_lists_are_refused_everywhere(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same names in another order are other classes: before training, on resume, and by what was trained."""
    classes = tmp_path / "reversed.yaml"
    classes.write_text(OF_COLOURS.replace("[soil, crop, weed, tool, sky]", "[sky, tool, weed, crop, soil]"))
    write_pictures(tmp_path / "of_colours", 2, colours=True)
    for split in ("train", "val"):
        pack(tmp_path / "of_colours", "reversed", classes, split, shards)
    both = ("5: soil, crop, weed, tool, sky", "5: sky, tool, weed, crop, soil")
    capsys.readouterr()

    mixed = [*overrides(shards, tmp_path / "new"), "data.target=reversed/train"]
    assert train.main([*DEFAULTS, *mixed, "--check"]) == 2
    error = capsys.readouterr().err
    assert "ids/train and reversed/train do not agree, the classes are the same in another order" in error
    assert all(text in error for text in both)

    for words in (["--run", str(run)], ["--run", str(run), "--classes", str(classes)]):
        data = ["--data", str(shards / "reversed/val")] if len(words) == 2 else []
        assert evaluate.main([*words, *data]) == 2
        error = capsys.readouterr().err
        assert "do not agree" in error
        assert all(text in error for text in both)

    other = [f"data.{role}=reversed/{split}" for role, split in (("source", "train"), ("target", "train"))]
    rest = ["data.validation=reversed/val", "eval.class_sets=[]", "train.steps=24"]
    resumed = run_train([*overrides(shards, run), *other, *rest])
    assert resumed.returncode == 2
    assert "step_00000020 and the data do not agree" in resumed.stderr
    assert all(text in resumed.stderr for text in both)
