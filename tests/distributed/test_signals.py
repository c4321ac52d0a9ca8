"""Signals, kills and hangs of real processes over gloo; the same command then goes on to the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mfm_dist.shards.scene_shards import write_scenes
from tests.helpers.processes import family, is_running, wait_until
from tests.helpers.runs import SCENE_SIZE, Start, assert_equal_bits, metrics_of, read_json, tiny_overrides

STEPS = 30


@pytest.fixture(scope="module")
def long_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With enough validation images for an evaluation of some seconds."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, train=12, val=160, size=SCENE_SIZE, seed=0, workers=2, report=lambda _: None)
    return folder


@pytest.fixture
def start(long_scenes: Path) -> Iterator[Callable[..., Start]]:
    """Starts runs, and leaves none behind."""
    started: list[Start] = []

    def one(
        run: Path, *overrides: str, launch: str | None = "cpu_ddp", module: str = "mfm_dist.train", **said: str
    ) -> Start:
        arguments = [*tiny_overrides(long_scenes, run), f"train.steps={STEPS}", "checkpoint.every=5", *overrides]
        started.append(Start(run, arguments, launch=launch, module=module, environment=said))
        return started[-1]

    yield one
    for life in started:
        for process in family(life.launcher.pid):
            if is_running(process):
                os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_disturbed_five_times_ends_like_an_undisturbed_one(start: Callable[..., Start], tmp_path: Path) -> None:
    """Its launcher is killed, a rank is, Slurm warns it, a rank hangs, and it is stopped in the last evaluation."""
    run = tmp_path / "run"
    events = run / "events.jsonl"
    undisturbed = start(tmp_path / "undisturbed")
    assert "RESULT" in undisturbed.output()

    # kill -9 of the launcher: ranks and loader workers are gone within 5 s, and nothing is written any more.
    life = start(run, "data.workers=1")
    ranks = life.wait_for_ranks(2)
    life.wait_for_step(7)
    everyone = family(life.launcher.pid)
    assert len(everyone) >= 5, "a launcher, two ranks, two workers"
    assert set(ranks.values()) < set(everyone)
    life.launcher.kill()
    wait_until(lambda: not any(map(is_running, everyone)), seconds=5, what="everyone gone")

    # kill -9 of a rank: the other says that it has lost it, in a line.
    life = start(run)
    ranks = life.wait_for_ranks(2)
    life.wait_for_step(9)
    os.kill(ranks[1], signal.SIGKILL)
    output = life.output()
    assert "trainer.py" not in output, "a traceback"
    assert "rank 0: another process of the job is gone" in output
    assert life.outcome()["code"] == 1

    # USR1 as Slurm sends it, to the launcher and to every rank, which the launcher then warns again.
    life = start(run)
    ranks = life.wait_for_ranks(2)
    life.wait_for_step(14)
    for process in (life.launcher.pid, *ranks.values()):
        os.kill(process, signal.SIGUSR1)
    output = life.output()
    outcome = life.outcome()
    assert (outcome["code"], outcome["reason"]) == (75, "stopped by SIGUSR1"), output
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{outcome['step']:08d}"
    assert metrics_of(run)[-1]["step"] == outcome["step"] >= 14

    # A rank that stops: the watchdogs of the others name it and end the run. Amid a save they would wait longer.
    life = start(run, "watchdog.seconds=6", "checkpoint.every=1000")
    ranks = life.wait_for_ranks(2)
    life.wait_for_step(outcome["step"] + 5)
    os.kill(ranks[0], signal.SIGSTOP)
    wait_until(lambda: life.outcome().get("code") == 76, seconds=20, what="the watchdog")
    os.kill(ranks[0], signal.SIGKILL)  # what the launcher would do after PET_SHUTDOWN_TIMEOUT
    output = life.output()
    assert f"hung: rank 0 ({os.uname().nodename}, process {ranks[0]}" in output
    assert "gave no sign of life" in life.outcome()["reason"]
    assert '"event": "hang"' in events.read_text()
    assert "trainer.py" in (run / "hang" / "rank_00001.txt").read_text()
    exchanges = read_json(run / "hang" / "rank_00001.exchanges.json")["entries"]
    assert exchanges[-1]["profiling_name"] == "gloo:all_reduce", "what it waits in for rank 0"

    # TERM to one rank, which comes into the last evaluation: all ranks leave it together, and it is done again.
    life = start(run)
    ranks = life.wait_for_ranks(2)
    life.wait_for_step(STEPS)
    os.kill(ranks[1], signal.SIGTERM)
    output = life.output()
    assert life.outcome() == {"code": 75, "reason": "stopped by SIGTERM", "step": STEPS}, output
    assert '"signal": "SIGTERM"' in events.read_text()
    assert not (run / "eval" / f"step_{STEPS:08d}.json").exists()
    life = start(run)
    assert "RESULT" in life.output()
    assert life.outcome()["code"] == 0

    assert_equal_bits(run, undisturbed.run, step=STEPS)
    assert metrics_of(run) == metrics_of(undisturbed.run)
    for step in (0, STEPS):
        name = f"eval/step_{step:08d}.json"
        assert read_json(run / name) == read_json(undisturbed.run / name)


@pytest.mark.parametrize(
    ("overrides", "number"),
    [(["checkpoint.background=false"], signal.SIGTERM), (["checkpoint.background=true"], signal.SIGHUP)],
)
def test_a_signal_to_the_launcher_while_a_checkpoint_is_written(
    overrides: list[str], number: signal.Signals, start: Callable[..., Start], tmp_path: Path
) -> None:
    """The write ends, all ranks end after the same step, and a checkpoint of that step is there."""
    otherwise = {"module": "tests.distributed.train_otherwise", "OTHERWISE": "slow_write"}
    life = start(tmp_path / "run", "train.steps=100000", "checkpoint.every=3", *overrides, **otherwise)
    life.wait_for((life.run / "writing").exists, "a checkpoint being written")
    life.launcher.send_signal(number)
    output = life.output()
    outcome = life.outcome()
    assert (outcome["code"], outcome["reason"]) == (75, f"stopped by {number.name}"), output
    assert (life.run / "checkpoints" / "latest").read_text().strip() == f"step_{outcome['step']:08d}"
    if overrides == ["checkpoint.background=false"]:
        assert outcome["step"] == 4, "training stood still; said in step 4, and read there, for it is logged"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_torch_is_imported_ends_with_75(
    number: signal.Signals, start: Callable[..., Start], tmp_path: Path
) -> None:
    life = start(tmp_path / "run", launch=None)
    maps = Path(f"/proc/{life.launcher.pid}/maps")
    wait_until(lambda: "libtorch" in maps.read_text(), seconds=30, what="torch being loaded")
    life.launcher.send_signal(number)
    output = life.output()
    assert life.launcher.returncode == 75, output
    assert output == f"stopped by {number.name} before training began; the same command starts again\n"
    assert life.outcome() == {"code": 75, "reason": f"stopped by {number.name} before training began", "step": -1}


def test_a_signal_while_scenes_are_rendered_ends_with_75(start: Callable[..., Start], tmp_path: Path) -> None:
    """Sent to the whole group, as by Ctrl-C: the packing processes get it too."""
    overrides = [
        "data.render_scenes=true",
        "scenes.train=100000",
        "scenes.size=64x128",
        f"data.root={tmp_path / 'data'}",
    ]
    life = start(tmp_path / "run", *overrides, launch=None)
    life.wait_for(lambda: len(family(life.launcher.pid)) >= 3, "packing processes")
    everyone = family(life.launcher.pid)
    os.killpg(life.launcher.pid, signal.SIGINT)
    output = life.output()
    assert life.launcher.returncode == 75, output
    assert "stopped by SIGINT before training began" in output
    assert "packing process" not in output
    assert "Traceback" not in output
    wait_until(lambda: not any(map(is_running, everyone)), seconds=5, what="packing processes gone")


def test_a_lone_process_saves_when_its_launcher_dies(start: Callable[..., Start], tmp_path: Path) -> None:
    life = start(tmp_path / "run", "train.steps=100000", "checkpoint.every=100000", launch="cpu_single")
    (process,) = life.wait_for_ranks(1).values()
    life.wait_for_step(3)
    life.launcher.kill()
    wait_until(lambda: not is_running(process), seconds=10, what="the process has ended")
    assert life.outcome()["code"] == 75
    assert (life.run / "checkpoints" / f"step_{life.outcome()['step']:08d}").is_dir()
