"""tools/reproduce.py: its rows are configurations, and what it collects is what finished runs wrote."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mfm_dist.build import build_train_module
from mfm_dist.config.loader import dump_config, load_config
from mfm_dist.config.validate import problems
from tests.helpers.classes import CLASSES
from tests.helpers.runs import REPOSITORY
from tools.paper_rows import (
    ABLATIONS,
    FORMS,
    FOUNDATION,
    GROWTH,
    MIC_ON_OTHERS,
    NETWORKS,
    RESULTS,
    SCENES,
    SCENES_ABLATIONS,
    Row,
    paper_rows,
)
from tools.reproduce import Run, main

ROWS = {row.name: row for row in (*paper_rows(), *SCENES, *SCENES_ABLATIONS)}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_every_row_is_a_configuration_of_its_own(row: Row) -> None:
    plain = load_config(row.config)
    for form in row.forms:
        config = load_config(row.config, Run(row, form, 3).overrides())
        assert problems(config) == []
        assert (config.mfm.enabled, config.seed) == (form == "with", 3)
        assert config != plain
    of_sets = {"miou", *(f"miou_{name}" for name in plain.eval.class_sets)}
    assert {published.score for published in row.published} <= of_sets


@pytest.mark.parametrize("base", ["dacs", "daformer"])
def test_mic_on_another_method_is_its_configuration_with_masked_images(base: str) -> None:
    row, plain = ROWS[f"gta2cs/mic_on_{base}"], load_config(Path(f"configs/gta2cs/{base}.yaml"))
    config = load_config(row.config, row.overrides)
    assert (config.method_label, config.data.crop, config.mic.mask_block_pixels) == (f"mic on {base}", (512, 512), None)
    config.method.name, config.mic.base_method = base, "hrda"
    assert config == plain


def test_main_rows_have_the_figures_of_their_files() -> None:
    """What a file's head promises is what the table shows."""
    for row in RESULTS:
        head = " ".join(line for line in row.config.read_text().splitlines() if line.startswith("# "))
        for figure in (row.published[0].without, row.published[0].with_mfm):
            assert figure is None or f"{figure}" in head, row.name


def finish(run: Run, under: Path, miou: float, *overrides: str) -> None:
    """What a finished run leaves."""
    folder = run.folder(under)
    (folder / "eval").mkdir(parents=True)
    config = load_config(run.row.config, [*run.overrides(overrides), f"run.folder={folder}"])
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "outcome.json").write_text('{"code": 0, "reason": "done", "step": 400}')
    means = {"miou_synthia16": miou + 1, "miou_synthia13": miou + 2}
    for step, value in ((0, 1.0), (200, miou + 5), (400, miou)):
        (folder / "eval" / f"step_{step:08}.json").write_text(json.dumps({"miou": value, "means": means}))
    speed = 2.0 if run.form == "with" else 3.0
    line = {"images_per_second": speed, "memory_gib": 1.5}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(line)}\n" * 3)


def test_gains_are_paired_and_stand_beside_what_was_published(tmp_path: Path, capsys: Any) -> None:
    row, json_file = ROWS["gta2cs/daformer"], tmp_path / "new" / "figures.json"
    for seed, (without, with_mfm) in enumerate([(60.0, 61.0), (70.0, 71.0)]):
        finish(Run(row, "without", seed), tmp_path, without)
        finish(Run(row, "with", seed), tmp_path, with_mfm)
    finish(Run(row, "with", 2), tmp_path, 100.0)
    assert main(["--folder", str(tmp_path), "--json", str(json_file)]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("| gta2cs/daformer |"))
    assert "| 68.3 | 70.3 | 65.00 ± " in line
    assert line.endswith("| 70.00 | 82.33 | +1.00 ± 0.00 | 2, 3 | x 1.50 | x 1.00 |")
    assert "other settings" not in shown
    found = {result["row"]: result for result in json.loads(json_file.read_text())["results"]}
    assert len(found) == len(list(paper_rows()))
    assert found["gta2cs/daformer"]["ours"]["with"]["by_seed"] == {"0": 61.0, "1": 71.0, "2": 100.0}
    assert found["gta2cs/hrda"]["ours"] == {}


def test_synthia_is_told_over_16_and_13_classes_and_other_settings_are_named(tmp_path: Path, capsys: Any) -> None:
    finish(Run(ROWS["syn2cs/mic"], "with", 0), tmp_path, 50.0, "train.precision=bf16")
    assert main(["--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "| syn2cs/mic | 16 | 67.3 | 68.1\\* |  | 51.00 (one seed) |" in shown
    assert shown.count("\n\\* The MFM paper heads its SYNTHIA table with 13 classes") == 1
    assert shown.count("\\*") == 4 + 1, "no figure of another benchmark is marked"
    assert "| syn2cs/mic | 13 |  |  |  | 52.00 (one seed) |" in shown
    assert shown.count("syn2cs/mic, with MFM, seed 0: train.precision: fp32 -> bf16") == 1


def test_the_grid_on_the_scenes_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trained: list[list[str]] = []

    def train(command: list[str], **_: Any) -> SimpleNamespace:
        trained.append(command)
        said = dict(word.split("=", 1) for word in command if "=" in word)
        run = Path(said["run.folder"])
        if "/mic/" in str(run):
            return SimpleNamespace(returncode=5)
        row, form = ROWS[f"scenes/{run.parts[-3]}"], run.parts[-2]
        finish(Run(row, form, int(said["seed"])), tmp_path, 20.0)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", train)
    asked = ["--data", "scenes", "--folder", str(tmp_path)]
    assert main([*asked, "--seeds", "1"]) == 1, "mic failed, the others ran"
    assert len(trained) == len(SCENES) * len(FORMS)
    assert "train.log" in capsys.readouterr().err
    trained.clear()
    assert main([*asked, "--seeds", "2", "scenes/dacs", "scenes/hrda"]) == 0
    folders = [word for command in trained for word in command if word.startswith("run.folder=")]
    assert sorted(folders) == sorted(
        f"run.folder={tmp_path}/scenes/{method}/{form}/seed_1" for method in ("dacs", "hrda") for form in FORMS
    )
    trained.clear()
    assert main([*asked, "--collect"]) == 0
    assert not trained
    assert main([*asked, "scenes/dacs", "optim.lr=1.0"]) == 1
    assert "other settings (optim.lr: 0.0015 -> 1.0)" in capsys.readouterr().err


def test_the_ablations_on_the_scenes_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trained: list[str] = []

    def train(_config: Path, folder: Path, _overrides: list[str], **_: Any) -> dict[str, float]:
        trained.append(str(folder.relative_to(tmp_path)))
        return {"miou": 20.0}

    monkeypatch.setattr("tools.reproduce.train", train)
    asked = ["--data", "scenes", "--folder", str(tmp_path)]
    assert main([*asked, "scenes/dacs_depth4"]) == 0
    assert trained == ["scenes/dacs_depth4/with/seed_0"], "an ablation has no form without MFM"
    trained.clear()
    assert main([*asked, "--all"]) == 0
    assert len(trained) == len(SCENES) * len(FORMS) + len(SCENES_ABLATIONS)
    assert "| scenes/dacs_source_and_target | 19 |" in capsys.readouterr().out


@pytest.mark.parametrize(("paper", "small"), zip(ABLATIONS, SCENES_ABLATIONS, strict=True), ids=lambda row: row.name)
def test_an_ablation_on_the_scenes_is_the_papers_in_small(paper: Row, small: Row) -> None:
    """As far from the twin's setting as the paper's is from the paper's; a grid of as many cells across."""
    assert paper.name.removeprefix("gta2cs/") == small.name.removeprefix("scenes/")
    of_paper, of_scenes = (load_config(row.config, row.overrides) for row in (paper, small))
    plain_paper, plain_scenes = (load_config(row.config) for row in (paper, small))
    blocks = plain_scenes.mfm.mask_block_cells  # of several cells, for the scenes' are smaller than the paper's
    assert of_scenes.mfm == replace(of_paper.mfm, mask_block_cells=blocks)
    ours, theirs = of_scenes.rebuilder, of_paper.rebuilder
    assert ours.depth == theirs.depth
    assert ours.width / plain_scenes.rebuilder.width == theirs.width / plain_paper.rebuilder.width
    for axis in (0, 1):
        finer = theirs.grid[axis] / plain_paper.rebuilder.grid[axis]
        assert ours.grid[axis] / plain_scenes.rebuilder.grid[axis] == finer
    assert problems(of_scenes) == []


@pytest.mark.parametrize(
    "row", [*NETWORKS, *MIC_ON_OTHERS, *FOUNDATION, *ABLATIONS, *GROWTH, *SCENES_ABLATIONS], ids=lambda row: row.name
)
def test_every_row_builds(row: Row) -> None:
    config = load_config(row.config, Run(row, "with", 0).overrides())
    if config.model.lora.rank:
        pytest.importorskip("peft")
    config.model.weights, config.model.pretrained = None, False  # what a user has to fetch
    with torch.device("meta"):
        module = build_train_module(config, CLASSES)
    assert (module.rebuilder is None) == ("mfm.use_rebuilder=false" in row.overrides)
    assert module.teacher is not None


def test_the_large_rows_are_the_large_preset() -> None:
    """As far as a preset has sections of its own."""
    preset = load_config([Path("configs/gta2cs/dacs.yaml"), Path("configs/rebuilder/large.yaml")])
    row = ROWS["gta2cs/dacs_stable_large"]
    assert load_config(row.config, [*row.overrides, *FORMS["with"]]) == preset


def test_rows_are_launched_by_accelerate_or_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[list[str]] = []

    def record(command: list[str], **_: Any) -> SimpleNamespace:
        said.append(command)
        return SimpleNamespace(returncode=0, stdout="17\n", stderr="")

    monkeypatch.setattr(subprocess, "run", record)
    row = ["gta2cs/mic_mit_b3", "--forms", "with", "--folder", str(tmp_path), "train.precision=bf16"]
    finish(Run(ROWS["gta2cs/mic_mit_b3"], "with", 1), tmp_path, 70.0, "train.precision=bf16")
    assert main([*row, "--seeds", "3", "--sbatch"]) == 0
    (submitted,) = said
    assert submitted[:3] == ["sbatch", "--parsable", "--array=0,2"], "seed 1 is finished"
    assert submitted[4:6] == ["slurm/train_mfm.sh", "configs/gta2cs/mic.yaml"]
    folder = f"run.folder={tmp_path}/gta2cs/mic_mit_b3/with"  # of which a task makes its seed's
    assert {folder, "mfm.enabled=true", "model.backbone=mit_b3", "train.precision=bf16"} < set(submitted)
    assert not [word for word in submitted if word.startswith("seed=")]
    assert main([*row, "--seeds", "2", "--sbatch", "optim.lr=1.0"]) == 1, "seed 1 had another rate"
    assert len(said) == 1
    assert main(row) == 1, "nothing was trained, so it has no evaluation"
    launched = " ".join(said[1])
    assert "launch --config_file configs/accelerate/gpu_single.yaml -m mfm_dist.train --config configs/gta" in launched
    with pytest.raises(SystemExit, match="2"):
        main(["gta2cs/nothing"])
