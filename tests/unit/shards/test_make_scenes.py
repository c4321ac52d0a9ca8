"""mfm-shards make scenes: the same bytes however it is run or interrupted, and mistakes told in one message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mfm_dist.config.class_files import load_class_set
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import DataError
from mfm_dist.scenes import Gap, Scene, render_scene
from mfm_dist.shards import scene_shards
from mfm_dist.shards.make import main

SMALL = ["--train", "5", "--val", "2", "--height", "32", "--width", "64", "--shard-size", "2", "--workers", "2"]
CITYSCAPES7 = load_class_set("cityscapes7")
FOLDERS = ["camera_train", "camera_val", "game_train", "game_val"]


def run(output: Path, *more: str) -> int:
    return main(["scenes", "--output", str(output), *SMALL, *more])


def bytes_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.glob("*/*"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of an undisturbed run; to be read only."""
    output = tmp_path_factory.mktemp("whole")
    assert run(output) == 0
    return output


def test_the_shards_hold_the_scenes(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir() if path.is_dir()) == FOLDERS
    reader = ShardReader(whole / "camera_train")
    assert len(reader) == 5
    for number in range(5):
        scene = render_scene(seed=0, domain="camera", split="train", index=number, height=32, width=64)
        sample = reader.read(number)
        assert sample.key == f"camera_train_{number:06d}"
        assert sample.label is not None
        assert np.array_equal(sample.label.numpy(), scene.label)
        assert np.abs(sample.image.permute(1, 2, 0).numpy().astype(int) - scene.image).mean() < 12
    (sample_json, *_) = [
        s["json"] for s in webdataset.WebDataset(str(whole / "game_val/000000.tar"), shardshuffle=False)
    ]
    assert json.loads(sample_json) == {
        "key": "game_val_000000", "domain": "game", "split": "val", "index": 0, "seed": 0,
    }  # fmt: skip


def test_the_bytes_do_not_depend_on_workers_or_place(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--workers", "1") == 0
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_scenes_in_other_classes(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--classes", "cityscapes7") == 0
    plain, merged = (ShardReader(root / "game_val", classes=CITYSCAPES7) for root in (whole, tmp_path))
    assert (plain.relabelling is None, merged.relabelling is None) == (False, True)
    pairs = zip(plain.class_statistics(), merged.class_statistics(), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
    assert np.array_equal(plain.read(0).label, merged.read(0).label)
    assert merged.index.manifest.command.endswith("--classes cityscapes7")


def test_running_it_again_is_one_line_and_touches_nothing(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*/*")}
    assert run(whole) == 0
    assert capsys.readouterr().out == (
        f"{whole} is complete: game_train 5, game_val 2, camera_train 5, camera_val 2 samples\n"
    )
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*/*")} == before


def test_a_run_that_fails_half_way_goes_on_and_ends_the_same(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_late(*, domain: str, index: int, **keywords: object) -> Scene:
        if domain == "camera" and index == 3:
            raise DataError("scene 3 is cursed")
        return render_scene(domain=domain, index=index, **keywords)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(scene_shards, "render_scene", fail_late)
        assert run(tmp_path) == 3
    assert "scene 3 is cursed" in capsys.readouterr().err
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "game_train").glob("*.tar")}
    assert len(done) == 3
    with pytest.raises(DataError, match="unfinished"):
        ShardReader(tmp_path / "game_train")
    assert run(tmp_path) == 0
    assert bytes_of(tmp_path) == bytes_of(whole)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_ctrl_c_ends_at_once_without_traceback_and_the_next_run_goes_on(tmp_path: Path) -> None:
    many = ["--train", "60", "--val", "1", "--height", "32", "--width", "64", "--shard-size", "2", "--workers", "2"]
    command = ["scenes", "--output", str(tmp_path), *many]
    process = subprocess.Popen(
        [sys.executable, "-m", "mfm_dist.shards", "make", *command],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests themselves run in the background of a script, it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    process.stdout.readline()  # the first shard is there
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert errors.strip() == "interrupted; the same command goes on from the last finished shard"
    with open(tmp_path / "game_train/dataset.unfinished.json") as file:
        kept = [record["file"] for record in json.load(file)["shards"]]
    assert 0 < len(kept) < 30
    stamps = {name: (tmp_path / "game_train" / name).stat().st_mtime_ns for name in kept}
    assert main(command) == 0
    assert len(ShardReader(tmp_path / "game_train")) == 60
    assert {name: (tmp_path / "game_train" / name).stat().st_mtime_ns for name in kept} == stamps
    assert not list(tmp_path.glob("*/*unfinished*"))


def test_a_damaged_shard_is_repaired_by_the_same_command(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    (tmp_path / "camera_val/000000.tar").write_bytes(b"cut")
    (tmp_path / "game_val/dataset.json").unlink()
    assert run(tmp_path, "--overwrite") == 0
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_another_recipe_is_refused_for_every_folder_until_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    before = bytes_of(tmp_path)
    assert run(tmp_path, "--seed", "1", "--train", "3") == 2
    error = capsys.readouterr().err
    assert "4 configuration errors" in error
    assert "samples: 5 -> 3; seed: 0 -> 1" in error
    assert "--overwrite" in error
    assert bytes_of(tmp_path) == before
    assert run(tmp_path, "--seed", "1", "--train", "3", "--overwrite") == 0
    assert len(ShardReader(tmp_path / "game_train")) == 3
    assert not (tmp_path / "game_train/000002.tar").exists()


def test_the_gap_can_be_switched_by_cause(tmp_path: Path) -> None:
    assert run(tmp_path / "a", "--gap", "layout,texture") == 0
    scene = render_scene(
        seed=0, domain="camera", split="val", index=1, height=32, width=64, gap=Gap(photometric=False)
    )  # fmt: skip
    sample = ShardReader(tmp_path / "a/camera_val").read(1)
    assert np.abs(sample.image.permute(1, 2, 0).numpy().astype(int) - scene.image).mean() < 12
    assert run(tmp_path / "b", "--gap", "none") == 0
    assert "--gap none" in (tmp_path / "b/game_val/dataset.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "data set"),
        (["gta5"], "invalid choice: 'gta5'"),
        (["scenes"], "--output"),
        (["scenes", "--output", "x", "--train", "0"], "0 is not at least 1"),
        (["scenes", "--output", "x", "--train", "many"], "invalid whole_number value: 'many'"),
        (["scenes", "--output", "x", "--gap", "colour"], "unknown colour; known are photometric, texture, layout"),
        (["scenes", "--output", "x", "--sede", "1"], "--sede"),
    ],
)
def test_wrong_arguments_are_one_message(
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.startswith("configuration error: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert run(tmp_path / "file" / "scenes") == 4
    assert "cannot be written to: Not a directory" in capsys.readouterr().err
