"""TensorBoard shows the numbers of metrics.jsonl and of the evaluations, each point once; other trackers by name."""

from __future__ import annotations

import io
import json
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mfm_dist import train
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed import trackers as trackers_module
from mfm_dist.distributed.trackers import Trackers, tracker_problems
from mfm_dist.errors import ConfigError, StorageError
from tests.helpers.runs import DEFAULTS, run_train, tiny_overrides


@pytest.fixture(autouse=True)
def _accelerate_started() -> None:
    """Its trackers ask it for the rank."""
    Accelerator(cpu=True)


def shown(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point that TensorBoard would draw, by name."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from the run's own files."""
    points: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((run / "eval").glob("step_*.json")):
        scores = json.loads(file.read_text())
        values = {f"eval/{name}": scores[name] for name in ("miou", "boundary_miou")}
        values |= {f"eval/iou/{name}": value for name, value in scores["iou"].items()}
        for name, value in values.items():
            if value is not None:
                points.setdefault(name, []).append((scores["step"], pytest.approx(value)))
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name != "step":
                points.setdefault(name, []).append((record["step"], pytest.approx(value)))
    return points


def test_tensorboard_shows_what_the_run_wrote(trained_run: Path) -> None:
    points = shown(trained_run)
    assert points == expected(trained_run)
    assert [step for step, _ in points["loss/mfm"]] == [1, 2, 3, 4]
    assert [step for step, _ in points["eval/miou"]] == [0, 4]
    assert any(name.startswith("eval/iou/") for name in points)


def test_tensorboard_shows_the_overlays_of_each_evaluation(trained_run: Path) -> None:
    events = EventAccumulator(str(trained_run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    (saved,) = {path.name for path in (trained_run / "eval").glob("*/*.png")}
    assert events.Tags()["images"] == [f"overlays/{saved.removesuffix('.png')}"]
    for shown in events.Images(events.Tags()["images"][0]):
        with (
            Image.open(trained_run / "eval" / f"step_{shown.step:08d}" / saved) as picture,
            Image.open(io.BytesIO(shown.encoded_image_string)) as found,
        ):
            assert np.array_equal(np.array(found), np.array(picture))


def test_large_overlays_are_shown_smaller_and_to_tensorboard_alone(
    tiny_config: RunConfig, service: list[Recorder], tmp_path: Path
) -> None:
    tiny_config.log.trackers = ("wandb", "tensorboard")
    tiny_config.run.folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4000, 1000), (1, 2, 3)).save(tmp_path / "wide.png")
    trackers = Trackers(tiny_config, enabled=True, step=0)
    assert trackers.show(tmp_path, 0) == trackers.show(tmp_path / "nothing", 1) == []
    (tmp_path / "bad.png").write_text("not a picture")
    (problem,) = trackers.show(tmp_path, 2)
    assert problem.startswith("tensorboard failed and is left out")
    trackers.close()
    assert service[0].points == []
    events = EventAccumulator(str(tiny_config.run.folder / "tensorboard"))
    events.Reload()
    (shown,) = events.Images("overlays/wide")
    assert (shown.step, shown.width, shown.height) == (0, 1600, 400)


def test_a_resumed_run_shows_no_point_twice(trained_run: Path, scenes: Path, tmp_path: Path) -> None:
    """Goes back to step 2, as after a kill; then a finished run is started once more."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    for _ in range(2):
        resumed = run_train(tiny_overrides(scenes, run))
        assert resumed.returncode == 0, resumed.stderr
        points = shown(run)
        assert points == expected(run)
        assert [step for step, _ in points["loss/total"]] == [1, 2, 3, 4]
        assert [step for step, _ in points["eval/miou"]] == [0, 4]


def test_a_run_that_starts_anew_shows_nothing_of_the_start_before(tiny_config: RunConfig) -> None:
    for value in (1.0, 2.0):
        tiny_config.run.folder.mkdir(parents=True, exist_ok=True)
        trackers = Trackers(tiny_config, enabled=True, step=0)
        assert trackers.log({"eval/miou": value}, 0) == []
        trackers.close()
    assert shown(tiny_config.run.folder) == {"eval/miou": [(0, 2.0)]}


def test_zero_reports_to_tensorboard_too(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_train([*tiny_overrides(scenes, run), "train.steps=2"], launch="cpu_zero2")
    assert done.returncode == 0, done.stderr
    assert len(list((run / "tensorboard").iterdir())) == 1  # one rank writes
    assert shown(run) == expected(run)


def test_no_tracker_leaves_no_folder_and_other_ranks_start_none(tiny_config: RunConfig) -> None:
    Trackers(tiny_config, enabled=False, step=0).log({"loss": 1.0}, 1)
    tiny_config.log.trackers = ()
    Trackers(tiny_config, enabled=True, step=0).log({"loss": 1.0}, 1)
    assert not (tiny_config.run.folder / "tensorboard").exists()


def test_names_are_checked_with_the_nearest() -> None:
    assert load_config(None, ["log.trackers=[]"]).log.trackers == ()
    assert load_config(None, ["log.trackers=wandb"]).log.trackers == ("wandb",)
    assert load_config(None, ["log.trackers=[wandb,tensorboard]"]).log.trackers == ("wandb", "tensorboard")
    with pytest.raises(ConfigError, match=r"log\.trackers: expected a list.*did you mean 'tensorboard'"):
        load_config(None, ["log.trackers=[wandb,tensorbord]"])
    with pytest.raises(ConfigError, match=r"log\.trackers: expected"):
        load_config(None, ["log.trackers=3"])


def test_a_tracker_that_is_not_installed_is_named_with_its_package(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers_module, "get_available_trackers", lambda: ["tensorboard"])
    config = load_config(None, ["log.trackers=[tensorboard,comet_ml,wandb]"])
    assert [problem.partition(": pip")[0] for problem in tracker_problems(config)] == [
        "log.trackers: comet_ml is not installed", "log.trackers: wandb is not installed",
    ]  # fmt: skip
    overrides = [*tiny_overrides(scenes, tmp_path / "run"), "log.trackers=[comet_ml]"]
    assert train.main(["--check", *DEFAULTS, *overrides]) == 2
    assert "pip install comet-ml" in capsys.readouterr().err


class Recorder(GeneralTracker):
    """Stands for a tracking service."""

    name = "wandb"
    requires_logging_directory = False
    started: list[Recorder] = []  # noqa: RUF012  one list for the test to look at

    def __init__(self, project: str, **settings: Any) -> None:
        super().__init__()
        self.project, self.settings = project, settings
        self.points: list[tuple[int | None, dict[str, float]]] = []
        self.config: dict[str, Any] = {}
        self.fails = self.finished = False

    @property
    def tracker(self) -> Recorder:
        return self

    def start(self) -> None:
        self.started.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        if self.fails:
            raise ConnectionError("the service is gone")
        self.points.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    Recorder.started.clear()
    yield Recorder.started
    Recorder.started.clear()


def test_a_service_gets_settings_and_numbers(tiny_config: RunConfig, service: list[Recorder]) -> None:
    tiny_config.log.trackers = ("wandb", "wandb")
    trackers = Trackers(tiny_config, enabled=True, step=3)
    trackers.log({"loss/total": 0.5}, 4)
    trackers.close()
    (tracker,) = service
    assert (tracker.project, tracker.settings["name"]) == ("mfm_dist", "run")
    assert tracker.points == [(4, {"loss/total": 0.5})]
    assert tracker.config["train.steps"] == 4
    assert tracker.config["data.crop"] == "[64, 64]"
    assert {type(value) for value in tracker.config.values()} <= {str, int, float, bool, type(None), dict}
    assert tracker.finished


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tiny_config: RunConfig, service: list[Recorder]) -> None:
    tiny_config.log.trackers = ("wandb", "tensorboard")
    trackers = Trackers(tiny_config, enabled=True, step=0)
    assert trackers.log({"loss": 1.0}, 1) == []
    service[0].fails = True
    (problem,) = trackers.log({"loss": 2.0}, 2)
    assert problem == "wandb failed and is left out from here: ConnectionError: the service is gone"
    assert trackers.log({"loss": 3.0}, 3) == []
    trackers.close()
    assert shown(tiny_config.run.folder) == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0)]}


def test_a_full_disk_ends_tensorboard_and_no_thread_complains(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    tiny_config.log.trackers = ("tensorboard",)
    trackers, problems = Trackers(tiny_config, enabled=True, step=0), list[str]()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))  # beyond which no file grows, in place of a full disk
    try:
        deadline = time.monotonic() + 30
        while not problems and time.monotonic() < deadline:
            problems = trackers.log({"loss": 1.0}, 1)
        trackers.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (problem,) = problems
    assert problem.startswith("tensorboard failed and is left out from here: OSError")
    assert complaints == []
    assert threading.excepthook == complaints.append


@pytest.mark.usefixtures("service")
def test_a_tracker_that_cannot_start_is_told(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_login(_: Recorder) -> None:
        raise RuntimeError("log in first")

    monkeypatch.setattr(Recorder, "start", no_login)
    tiny_config.log.trackers = ("wandb",)
    with pytest.raises(ConfigError, match=r"wandb could not be started .*log in first"):
        Trackers(tiny_config, enabled=True, step=0)
    tiny_config.log.trackers = ("tensorboard",)
    tiny_config.run.folder.mkdir(parents=True)
    (tiny_config.run.folder / "tensorboard").write_text("in the way")
    with pytest.raises(StorageError, match="tensorboard cannot write"):
        Trackers(tiny_config, enabled=True, step=0)
