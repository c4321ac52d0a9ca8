"""A folder of pictures without labels, to an adapted model: no IoU is invented anywhere on the way."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mfm_dist import evaluate, export, predict, train
from mfm_dist.build import build_train_module, open_readers
from mfm_dist.config.loader import load_config
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import ConfigError
from mfm_dist.inference.evaluation import OneProcess
from mfm_dist.inference.unlabelled import look_at_unlabelled
from mfm_dist.report.__main__ import main as report
from mfm_dist.scenes import render_scene
from mfm_dist.shards.make import main as make_shards
from tests.helpers.downloads import save_picture
from tests.helpers.runs import DEFAULTS, result_of, run_train, tiny_overrides
from tools.probe_rebuilder import probe_run
from tools.quickstart_summary import main as summarise

LOOKED_AT = 5
NO_SCORES = {"miou": None, "best_miou": None, "best_step": None}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven photographs of two sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(7):
        width = 128 if number % 2 else 96
        scene = render_scene(seed=3, domain="camera", split="train", index=number, height=64, width=width)
        save_picture(folder / f"{number}.png", scene.image)
    return folder


@pytest.fixture(scope="module")
def target(pictures: Path) -> Path:
    """They, packed by the command."""
    output = pictures.with_name("shards")
    words = ["--input", str(pictures), "--name", "own", "--output", str(output), "--workers", "1", "--format", "png"]
    assert make_shards(["folder", *words]) == 0
    return output / "train"


def overrides(scenes: Path, target: Path, run: Path) -> list[str]:
    sets = [f"data.target={target}", "data.validation=null", "data.source_validation=game_val"]
    return [*tiny_overrides(scenes, run), *sets, f"eval.unlabelled_images={LOOKED_AT}", "eval.overlays=2"]


@pytest.fixture(scope="module")
def run(scenes: Path, target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of two processes under ZeRO-2."""
    folder = tmp_path_factory.mktemp("run") / "unlabelled"
    completed = run_train(["--launch", "configs/accelerate/cpu_zero2.yaml", *overrides(scenes, target, folder)])
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == "", "nothing but what the run says: no library warns of what is meant to be so"
    assert result_of(completed.stdout) == {"run": str(folder), "step": 4, **NO_SCORES}
    assert "step 4: no target labels, agreement 0." in completed.stdout
    return folder


def test_check_names_the_right_fix(
    scenes: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [*DEFAULTS, *overrides(scenes, target, tmp_path / "run"), "--check"]
    assert train.main(good) == 0
    unlabelled = [f"data.{key}={target}" for key in ("source", "validation", "source_validation")]
    assert train.main([*good, *unlabelled]) == 2
    error = capsys.readouterr().err
    for said in (
        r"data\.source=\S+ has no labels .* method\.name=dacs is supervised on them: name a labelled set",
        r"data\.validation=\S+ has no labels .* set data\.validation=null, which trains without that score",
        r"data\.source_validation=\S+ has no labels .* set data\.source_validation=null",
    ):
        assert re.search(said, error), error


def test_check_sees_what_the_run_does_not_render(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rendered = [f"data.root={tmp_path}", "data.render_scenes=true", "data.crop=64x64", "data.validation=null"]
    assert train.main([*DEFAULTS, *tiny_overrides(tmp_path, tmp_path), *rendered, "--check"]) == 0
    assert train.main([*DEFAULTS, *tiny_overrides(tmp_path, tmp_path), *rendered, "data.target=own", "--check"]) == 2
    assert str(tmp_path / "own") in capsys.readouterr().err


def test_evaluations_say_what_one_process_sees(run: Path) -> None:
    first, last = (json.loads((run / f"eval/step_0000000{step}.json").read_text()) for step in (0, 4))
    config = load_config(run / "config.yaml")
    readers = open_readers(config)
    module = build_train_module(config, readers.classes)
    assert isinstance(readers.target, ShardReader)
    assert module.teacher is not None
    scores, _ = look_at_unlabelled(
        module.student,
        module.teacher.segmentor,
        EvaluationSet(readers.target, rank=0, world_size=1, most=LOOKED_AT, with_label=False),
        OneProcess(),
        step=0,
        classes=readers.classes,
        threshold=config.self_training.pseudo_threshold,
    )
    assert first["unlabelled"] == pytest.approx(scores.unlabelled, abs=1e-6)
    for found in (first, last):
        assert (found["miou"], found["iou"], found["images"]) == (None, {}, LOOKED_AT)
        assert 0 < found["source_miou"] < 100
    assert last["unlabelled"]["entropy"] < first["unlabelled"]["entropy"]
    for number, width in enumerate((96, 128)):
        with Image.open(run / f"eval/step_00000004/{number}.png") as picture:
            assert picture.width == 2 * width + 4
            assert picture.height > 64  # a legend


def test_the_page_says_that_there_are_no_labels(run: Path, trained_run: Path) -> None:
    assert report([str(run), "--images", "2"]) == 0
    page = (run / "report.html").read_text()
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for said in (
        "No target labels, step 4",
        "none of it is an accuracy",
        "Source mIoU",
        "Pseudo-weight",
        "First prediction",
    ):
        assert said in words, said
    assert re.findall(r'alt="([^"]+) of 4', page)[:3] == ["Image", "First prediction", "Last prediction"]
    for invented in ("Truth", "Mistakes", "pixels right", "Target mIoU", "There is no evaluation"):
        assert invented not in words, invented
    output = run / "comparison.html"
    assert report([str(run), str(trained_run), "--images", "1", "--output", str(output)]) == 0
    assert "without an mIoU: unlabelled." in output.read_text()


def test_what_comes_after_training(
    run: Path, scenes: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = tmp_path / "model", tmp_path / "predicted"
    assert export.main(["--run", str(run), "--output", str(model)]) == 0
    assert json.loads((model / "config.json").read_text())["miou"] is None
    assert predict.main(["--run", str(run), "--input", str(pictures), "--output", str(output)]) == 0
    assert len(list((output / "overlays").iterdir())) == 7
    with pytest.raises(ConfigError, match=r"no target labels \(data\.validation=null\)"):
        probe_run(run)
    assert summarise(run) == 0
    assert "nothing to score it with" in capsys.readouterr().out
    assert evaluate.main(["--run", str(run)]) == 2
    assert "data.validation=null), so there is nothing to score it on: give" in capsys.readouterr().err
    assert evaluate.main(["--run", str(run), "--data", str(scenes / "game_val"), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["miou"]
    source_miou = json.loads((run / "eval/step_00000004.json").read_text())["source_miou"]
    assert scored == pytest.approx(source_miou, abs=1e-3)


def test_a_finished_run_says_the_same_again_and_a_validation_set_may_come_later(
    run: Path, scenes: Path, target: Path, tmp_path: Path
) -> None:
    again = Path(shutil.copytree(run, tmp_path / "run"))
    completed = run_train(overrides(scenes, target, again))
    assert result_of(completed.stdout) == {"run": str(again), "step": 4, **NO_SCORES}
    completed = run_train([*overrides(scenes, target, again), "data.validation=camera_val", "train.steps=5"])
    assert result_of(completed.stdout)["miou"] > 0, completed.stderr
