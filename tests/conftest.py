"""What many tests share: a tiny data set on disk, a tiny configuration, and a way to start the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.shards.scene_shards import write_scenes
from mfm_dist.storage import JsonLines

REPOSITORY = Path(__file__).parent.parent
SCENE_SIZE = (64, 128)
DEFAULTS = ["--config", str(REPOSITORY / "tests" / "defaults.yaml")]
"""Without it, the command would start from the quickstart."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="append one line of JSON for each test of a campaign to this file")


class Record:
    """What ``make campaign`` leaves of its tests."""

    def __init__(self, file: JsonLines) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            packages = {name: version(name) for name in ("torch", "accelerate", "deepspeed")}
            measured = dict(report.user_properties)
            about = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
            date = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self.file.append({**about, **measured, "packages": packages, "date": date})


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--record"):
        config.pluginmanager.register(Record(JsonLines(path)))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and five validation scenes a domain at 64 x 128, as real shards."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, train=12, val=5, size=SCENE_SIZE, seed=0, shard_size=5, workers=1, report=lambda _: None)
    return folder


def tiny_overrides(scenes: Path, run: Path) -> list[str]:
    """A run of four steps of two micro-batches that takes a second or two, with BatchNorm and Dropout2d in it."""
    return [
        f"run.folder={run}", f"data.root={scenes}", "data.crop=64x64", "data.workers=0", "data.bad_sample_limit=0",
        "model.backbone=test_resnet", "model.backbone_options={out_indices: [1, 2, 3, 4]}",
        "model.decoder=daformer", "model.decoder_options={width: 16}",
        "mfm.enabled=true", "rebuilder.width=32", "rebuilder.heads=2", "rebuilder.depth=1", "rebuilder.grid=4",
        "optim.lr=1e-3", "optim.decoder_lr_factor=1", "optim.eps=1e-4", "optim.warmup_steps=0",
        "train.steps=4", "train.global_batch=4", "log.every=1", "eval.every=1000", "checkpoint.every=2",
        "eval.overlays=1", "debug.check_gradients=true",
    ]  # fmt: skip


@pytest.fixture
def tiny_config(scenes: Path, tmp_path: Path) -> RunConfig:
    """``tiny_overrides`` as a configuration, writing below the test's own folder."""
    return load_config(None, tiny_overrides(scenes, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _one_thread_and_no_leaking_seed() -> None:
    """Tests share two cores, and none may depend on what another drew."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def run_train(
    arguments: Sequence[str],
    *,
    launch: str | None = None,
    processes: int = 2,
    timeout: float = 240,
    cwd: Path = REPOSITORY,
    module: str = "mfm_dist.train",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """The real command, alone or below ``accelerate launch`` with a file of configs/accelerate."""
    return run_module(
        module,
        [*DEFAULTS, *arguments],
        launch=launch,
        processes=processes,
        timeout=timeout,
        cwd=cwd,
        environment=environment,
    )


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    launch: str | None = None,
    processes: int = 2,
    timeout: float = 240,
    cwd: Path = REPOSITORY,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """A module as a program, alone or below ``accelerate launch`` with a file of configs/accelerate."""
    command = [sys.executable, "-m"]
    if launch is not None:
        file = REPOSITORY / "configs" / "accelerate" / f"{launch}.yaml"
        command += ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
        if not launch.endswith("single"):
            command += ["--num_processes", str(processes)]
        command += ["--main_process_port", "0", "-m"]
    command += [module, *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="session")
def trained_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``tiny_overrides``; not to be changed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    completed = run_train(tiny_overrides(scenes, run))
    assert completed.returncode == 0, completed.stderr
    return run


def result_of(output: str) -> dict[str, Any]:
    """The JSON of the RESULT line, which is the last line of a finished run."""
    last = output.strip().splitlines()[-1]
    assert last.startswith("RESULT "), output[-3000:]
    result: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    return result
