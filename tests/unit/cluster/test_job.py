"""What becomes of a batch job after each attempt: from outcome.json and checkpoints, never from a launcher's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mfm_dist.cluster import job
from mfm_dist.config.loader import load_config
from tests.helpers.runs import REPOSITORY

CONFIG = REPOSITORY / "tests" / "defaults.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of job 7, prepared in a clone of one file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mfm_dist").mkdir()
    (tmp_path / "mfm_dist" / "train.py").write_text("# as submitted")
    return prepare([f"run.folder={tmp_path / 'my run'}", "train.global_batch=8"])


def prepare(overrides: list[str], *, config: Path = CONFIG, restart: bool = False) -> Path:
    return job.prepare([str(config), *overrides], job="7", seed=None, restart=restart)


def run_of(folder: Path) -> Path:
    return folder.parent.parent


def ended(folder: Path, *, saved: int, outcome: dict[str, Any] | None, **told: Any) -> tuple[str, int]:
    """An attempt that saved up to a step and then said what it could."""
    job.plan(folder, nodes=2, processes=1)
    checkpoints = run_of(folder) / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    (checkpoints / "latest").write_text(f"step_{saved:08d}\n")
    if outcome is not None:
        outcome = {"reason": "told", "step": saved, "job": "7"} | outcome
        (run_of(folder) / "outcome.json").write_text(json.dumps(outcome))
    return job.next_action(folder, **({"signalled": False, "cancelled": False, "lost": []} | told))


def test_prepare_keeps_code_and_configuration_of_the_first_start(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mfm_dist" / "train.py").write_text("# edited")
    again = prepare([f"run.folder={tmp_path / 'my run'}", "train.global_batch=2"], restart=True)
    assert again == folder == tmp_path / "my run" / "jobs" / "7"
    assert (folder / "code" / "mfm_dist" / "train.py").read_text() == "# as submitted"
    assert "global_batch: 8" in (folder / "config.yaml").read_text()


def test_a_number_that_comes_again_is_another_job(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mfm_dist" / "train.py").write_text("# edited")
    assert prepare([f"run.folder={tmp_path / 'my run'}", "train.global_batch=2"]) == folder
    assert (folder / "code" / "mfm_dist" / "train.py").read_text() == "# edited"
    assert "global_batch: 2" in (folder / "config.yaml").read_text()
    (before,) = folder.parent.glob("7.until-*")
    assert "global_batch: 8" in (before / "config.yaml").read_text()


def test_a_task_of_an_array_has_a_seed_and_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [f"run.folder={tmp_path / 'sweep'}", "seed=1"]
    assert job.main(["prepare", "--job", "8", "--array-task", "3", str(CONFIG), *overrides]) == 0
    other = tmp_path / "sweep" / "seed_3" / "jobs" / "8"
    assert capsys.readouterr().out == f"{other}\n"
    assert "seed: 3" in (other / "config.yaml").read_text().splitlines()


def test_later_files_win_and_the_command_line_over_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("run: {folder: a}\ntrain: {steps: 5, micro_batch: 1}\nseed: 1\n")
    (tmp_path / "b.yml").write_text("train: {steps: 6}\nseed: 2\n")
    assert job.main(["prepare", "--job", "8", "run.name=x.yaml", "seed=3", str(CONFIG), "a.yaml", "b.yml"]) == 2
    assert "run.name" in capsys.readouterr().err  # holds a =, so it is no file
    assert job.main(["prepare", "--job", "8", "seed=3", str(CONFIG), "a.yaml", "b.yml"]) == 0
    config = load_config(tmp_path / "a" / "jobs" / "8" / "config.yaml")
    assert (config.train.steps, config.train.micro_batch, config.seed) == (6, 1, 3)


@pytest.mark.parametrize(
    ("nodes", "processes", "used", "each", "all_used"),
    [(1, 1, 1, 1, 0), (2, 1, 2, 1, 0), (3, 1, 2, 1, 12), (5, 1, 4, 1, 10), (3, 2, 2, 2, 12), (2, 8, 1, 4, 32),
     (4, 8, 1, 4, 64), (1, 3, 1, 2, 12), (3, 3, 2, 2, 18)],
)  # fmt: skip
def test_plan_takes_the_most_processes_that_share_four_micro_batches(
    folder: Path, nodes: int, processes: int, used: int, each: int, all_used: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(["plan", f"--nodes={nodes}", f"--processes={processes}", str(folder)]) == 0
    printed, told = capsys.readouterr()
    assert printed == f"{used} {each}\n"
    assert f"{used} node(s) x {each} process(es), train.global_batch=8 = 4 micro-batches of 2" in told
    assert f"{4 // (used * each)} a process and step" in told
    idle = f"of {nodes} node(s) x {processes} process(es), {nodes * processes - used * each} stay idle"
    assert (idle in told) == bool(all_used)
    assert (f"train.global_batch={all_used} would use all" in told) == bool(all_used)


@pytest.mark.parametrize("name", ["quickstart", "scenes/dacs", "gta2cs/mic"])
def test_shipped_runs_begin_on_nodes_of_eight(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = prepare(["run.folder=run"], config=REPOSITORY / "configs" / f"{name}.yaml")
    used, each = job.plan(folder, nodes=4, processes=8)
    assert used * each >= 1


def test_plan_names_lanes_that_leave_processes_idle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("lanes: 0", "lanes: 6"))
    assert job.plan(folder, nodes=4, processes=1) == (2, 1)
    assert "data.lanes=6 cannot be shared evenly by more; a multiple of 4 would use all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "decision"),
    [(0, ("done", 0)), (2, ("stop", 2)), (3, ("stop", 3)), (4, ("stop", 4)), (5, ("stop", 5)), (6, ("stop", 6)),
     (75, ("requeue", 0)), (76, ("again", 0)), (77, ("again", 0))],
)  # fmt: skip
def test_every_exit_code_leads_on(folder: Path, code: int, decision: tuple[str, int]) -> None:
    assert ended(folder, saved=1, outcome={"code": code}) == decision


def test_who_ended_without_a_word_starts_again(folder: Path) -> None:
    assert ended(folder, saved=1, outcome=None) == ("again", 0)
    # An outcome of another job, which was refused this folder, is none of this one's.
    assert ended(folder, saved=2, outcome={"code": 2, "job": "8"}) == ("again", 0)


def test_lost_nodes_and_announced_ends_need_a_requeue(folder: Path) -> None:
    assert ended(folder, saved=1, outcome=None, lost=["n2", "n3"]) == ("requeue n2,n3", 0)
    assert ended(folder, saved=2, outcome={"code": 76}, signalled=True) == ("requeue", 0)
    assert ended(folder, saved=3, outcome={"code": 75}, cancelled=True) == ("stop", 75)
    assert ended(folder, saved=4, outcome=None, cancelled=True) == ("stop", 75)
    assert ended(folder, saved=4, outcome={"code": 0}, signalled=True, cancelled=True) == ("done", 0)


def test_the_third_failure_at_one_step_is_the_last(folder: Path) -> None:
    for saved in (0, 0, 5, 5):
        assert ended(folder, saved=saved, outcome=None)[0] == "again"
    with (folder / "node-1.log").open("a") as log:
        log.write("=== attempt 6\nTraceback\n[rank1]: RuntimeError: CUDA error: an illegal access\nValueError: later\n")
    assert ended(folder, saved=5, outcome=None) == ("stop", 1)
    summary = (folder / "summary.log").read_text()
    assert "GIVING UP: 3 attempts in a row brought no checkpoint beyond step 5" in summary
    assert "node-0.log: no error in it" in summary


def test_signals_in_between_do_not_hide_a_crash_loop_and_are_no_failures(folder: Path) -> None:
    for _ in range(4):
        assert ended(folder, saved=5, outcome={"code": 75})[0] == "requeue"
    assert ended(folder, saved=5, outcome=None)[0] == "again"
    assert ended(folder, saved=5, outcome={"code": 75})[0] == "requeue"
    assert ended(folder, saved=5, outcome={"code": 76})[0] == "again"
    assert ended(folder, saved=5, outcome={"code": 77}) == ("stop", 1)


def killed_with_its_node(folder: Path, *, saved: int, outcome: dict[str, Any] | None = None) -> int:
    """An attempt after which nobody was left to say what comes next; returns the exit code of its plan."""
    code = job.main(["plan", "--nodes=2", "--processes=1", str(folder)])
    (run_of(folder) / "checkpoints").mkdir(exist_ok=True)
    (run_of(folder) / "checkpoints" / "latest").write_text(f"step_{saved:08d}\n")
    if outcome is not None:
        (run_of(folder) / "outcome.json").write_text(
            json.dumps({"reason": "told", "step": saved, "job": "7"} | outcome)
        )
    return code


def test_a_crash_loop_that_takes_the_first_node_with_it_is_noticed(folder: Path) -> None:
    assert [killed_with_its_node(folder, saved=saved) for saved in (0, 0, 5, 5, 5, 5)] == [0, 0, 0, 0, 0, 1]
    summary = (folder / "summary.log").read_text()
    assert "GIVING UP: 3 attempts in a row brought no checkpoint beyond step 5" in summary
    lines = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("failed", s) for s in (0, 0, 5, 5, 5)]


def test_who_said_before_it_was_killed_that_it_stopped_did_not_fail(folder: Path) -> None:
    assert [killed_with_its_node(folder, saved=5, outcome={"code": 75}) for _ in range(4)] == [0] * 4
    assert ended(folder, saved=5, outcome=None) == ("again", 0)


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        ({"code": 0}, 0),
        ({"code": 75}, 0),
        ({"code": 76}, 1),
        ({"code": 77}, 1),
        ({"code": 2, "job": "8"}, 1),
        (None, 1),
    ],
)
def test_only_a_last_word_of_its_own_keeps_lost_nodes_from_being_looked_for(
    folder: Path, outcome: dict[str, Any] | None, code: int
) -> None:
    killed_with_its_node(folder, saved=1, outcome=outcome)
    assert job.main(["has_outcome", str(folder)]) == code


def test_ten_starts_that_end_before_their_first_step_are_enough(folder: Path) -> None:
    decisions = [ended(folder, saved=5, outcome={"code": 75})[0] for _ in range(job.SAME_STEP_ATTEMPTS)]
    assert decisions == ["requeue"] * (job.SAME_STEP_ATTEMPTS - 1) + ["stop"]


@pytest.mark.parametrize(
    ("code", "nodes", "decision"), [(2, [], ("stop", 2)), (2, ["n2"], ("requeue n2", 0)), (76, [], ("again", 0))]
)
def test_what_preflight_found(folder: Path, code: int, nodes: list[str], decision: tuple[str, int]) -> None:
    job.plan(folder, nodes=2, processes=1)
    report = {"code": code, "problems": ["n2: its scratch is full: free some space"], "nodes": nodes, "job": "7"}
    (run_of(folder) / "preflight.json").write_text(json.dumps(report))
    assert job.next_action(folder, signalled=False, cancelled=False, lost=[]) == decision
    assert "preflight: n2: its scratch is full" in (folder / "summary.log").read_text()
    job.plan(folder, nodes=2, processes=1)
    assert not (run_of(folder) / "preflight.json").exists()


def test_what_another_job_left_in_the_run_folder_says_nothing_of_this_one(folder: Path) -> None:
    """That one was refused, while this one trained and was killed."""
    job.plan(folder, nodes=2, processes=1)
    for name, report in (("outcome.json", {"reason": "in use"}), ("preflight.json", {"problems": ["x"], "nodes": []})):
        (run_of(folder) / name).write_text(json.dumps({"code": 2, "job": "8"} | report))
    assert job.next_action(folder, signalled=False, cancelled=False, lost=[]) == ("again", 0)


def test_the_first_error_of_the_last_attempt_is_the_cause() -> None:
    log = "=== attempt 1\nValueError: old\n=== attempt 2\nloss 3\nTraceback (most recent call last):\n  File x\n"
    assert job.first_failure(log) is None
    cause = "[rank3]: torch.OutOfMemoryError: CUDA out of memory"
    assert job.first_failure(f"{log}{cause}\ntorch.distributed.ChildFailedError: \n") == cause
    assert job.first_failure(f"{log}  exitcode  : -9 (pid: 12)\n") == "exitcode  : -9 (pid: 12)"
