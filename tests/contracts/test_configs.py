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
def test_run_builds(path: Path) -> None:
    config = load_config(path)
    with torch.device("meta"):
        module = build_train_module(config)
    assert sum(p.numel() for p in module.student.parameters()) > 0


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
