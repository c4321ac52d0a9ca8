"""Fixtures of all tests: a tiny data set on disk, a tiny configuration, a finished run; and what no test may leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.run.signals import STOP_SIGNALS
from mfm_dist.shards.scene_shards import write_scenes
from mfm_dist.storage import JsonLines
from tests.helpers.runs import SCENE_SIZE, run_train, tiny_overrides


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


@pytest.fixture
def tiny_config(scenes: Path, tmp_path: Path) -> RunConfig:
    """``tiny_overrides`` as a configuration, writing below the test's own folder."""
    return load_config(None, tiny_overrides(scenes, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _one_thread_and_no_leaking_seed() -> None:
    """Tests share two cores, and none may depend on what another drew."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A command that a test starts in this process takes signals over, which the next test must not inherit."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(wakeup)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def trained_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``tiny_overrides``; not to be changed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    completed = run_train(tiny_overrides(scenes, run))
    assert completed.returncode == 0, completed.stderr
    return run
