"""Every shipped configuration builds, and every launch file says only what a launch file may say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.launch import Launch, launch_problems
from tests.conftest import REPOSITORY

RUNS = sorted(
    path for path in (REPOSITORY / "configs").rglob("*.yaml") if path.parent.name not in ("accelerate", "deepspeed")
)
LAUNCHES = sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(REPOSITORY / "configs")))
def test_run_builds_with_mfm(path: Path) -> None:
    config = load_config(path, ["mfm.enabled=true"])
    assert config.model.pretrained or config.model.weights, "adaptation from random weights fails, and silently"
    if config.model.weights is None or not (REPOSITORY / config.model.weights).is_file():  # what a user has to fetch
        config.model.pretrained, config.model.weights = False, None
    with torch.device("meta"):
        module = build_train_module(config)
    assert sum(p.numel() for p in module.student.parameters()) > 0
    assert module.rebuilder is not None


def test_run_folders_differ() -> None:
    folders = [load_config(path).run.folder for path in RUNS]
    assert len(set(folders)) == len(folders)


PAPER = [path for path in RUNS if "2" in path.parent.name]


def test_there_is_a_run_for_each_method_on_each_benchmark() -> None:
    methods = ["dacs", "daformer", "hrda", "mic"]
    folders = ["cs2acdc", "cs2dz", "gta2cs", "scenes", "syn2cs"]
    found = [(path.parent.name, path.stem) for path in RUNS if path.parent.name in folders]
    assert found == [(folder, method) for folder in folders for method in methods]


@pytest.mark.parametrize("path", PAPER, ids=lambda p: str(p.relative_to(REPOSITORY / "configs")))
def test_paper_run_keeps_the_published_recipe(path: Path) -> None:
    config = load_config(path)
    large = path.stem in ("hrda", "mic")
    assert path.stem == config.method.name
    assert config.data.crop == ((1024, 1024) if large else (512, 512))
    assert config.two_resolutions == large
    assert config.data.rare_class_sampling.enabled == (path.stem != "dacs")
    assert config.self_training.ema_decay == (0.99 if path.stem == "dacs" else 0.999)
    to_cityscapes = path.parent.name in ("gta2cs", "syn2cs")
    assert config.data.target_margins == ((30, 240, 30, 30) if large and to_cityscapes else (0, 0, 0, 0))
    assert (config.mic.mode, config.mic.augment) == (
        ("separate", False) if path.stem == "mic" and not to_cityscapes else ("separatetrg", True)
    )
    rare = config.data.rare_class_sampling
    if rare.enabled:  # as many pixels of the crop as published, to a rounded per mille
        assert rare.min_pixels * rare.min_crop_ratio == pytest.approx(6000 if large else 1500, rel=1e-3)
    assert (len(config.eval.class_sets) == 2) == (path.parent.name == "syn2cs")


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(REPOSITORY / "configs")))
def test_run_says_only_what_differs_from_the_defaults(path: Path) -> None:
    def repeated(tree: dict, default: object, prefix: str = "") -> list[str]:
        names = []
        for key, value in tree.items():
            there = getattr(default, key)
            if isinstance(value, dict) and not isinstance(there, dict):
                names += repeated(value, there, f"{prefix}{key}.")
            elif prefix + key != "method.name" and value == there:  # a run may well name its method
                names.append(prefix + key)
        return names

    assert repeated(yaml.safe_load(path.read_text()), RunConfig()) == []


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda p: p.stem)
def test_launch_file_leaves_the_mathematics_to_the_run(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    launch = load_config_from_file(str(path))
    deepspeed = launch.deepspeed_config
    assert launch.mixed_precision == "no"
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & set(deepspeed)
    environment = {"ACCELERATE_USE_DEEPSPEED": str(launch.distributed_type == "DEEPSPEED").lower()}
    if file := deepspeed.get("deepspeed_config_file"):
        environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(REPOSITORY / file)
    elif deepspeed:
        environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(deepspeed["zero_stage"])
    assert launch_problems(environment) == []
    stage = re.search(r"zero(\d)", path.stem)
    assert Launch.from_environment(environment).zero_stage == (int(stage[1]) if stage else None)
