"""Whatever happens to a run's folder and processes, outcome.json tells the truth and the same command goes on."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

from mfm_dist.errors import ConfigError, DiskFullError
from mfm_dist.run.folder import LEASE, OUTCOME, REFUSED, RunFolder, storage_error
from mfm_dist.train import tell
from tests.helpers.processes import family, kill
from tests.helpers.runs import Start, tiny_overrides


def said(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_a_refused_start_leaves_the_running_runs_outcome_alone(tmp_path: Path) -> None:
    refused = ConfigError("run.folder is in use")
    (tmp_path / LEASE).write_text("{}")
    assert tell(refused, 0, tmp_path, step=-1, owned=False) == 2
    assert not (tmp_path / OUTCOME).exists()
    assert said(tmp_path / REFUSED)["code"] == 2
    RunFolder(tmp_path, writes=True).create()
    assert not (tmp_path / REFUSED).exists()
    tell(refused, 0, tmp_path, step=7, owned=True)
    assert said(tmp_path / OUTCOME) == {"code": 2, "reason": str(refused), "step": 7}
    (tmp_path / LEASE).unlink()
    tell(refused, 0, tmp_path, step=-1, owned=False)
    assert said(tmp_path / OUTCOME)["step"] == -1


def test_which_errors_of_the_system_are_the_runs(tmp_path: Path) -> None:
    def of(number: int, path: Path) -> str:
        return str(storage_error(OSError(number, "reason", str(path)), tmp_path))

    assert "run.folder=" in of(errno.EPERM, tmp_path / "metrics.jsonl")
    assert "make room" in of(errno.ENOSPC, Path("elsewhere"))
    assert of(errno.EPERM, Path("elsewhere")) == "None"
    assert storage_error(OSError(errno.ECONNRESET, "reason"), tmp_path) is None
    assert storage_error(DiskFullError("full"), tmp_path) is None  # a message of its own
    emptied = of(errno.ENOENT, tmp_path / "metrics.jsonl")
    assert "metrics.jsonl is gone, somebody removed it" in emptied
    assert "make room" not in emptied
    shutil.rmtree(tmp_path)
    assert "is gone: somebody removed it while the run went on" in of(errno.ENOENT, tmp_path / "metrics.jsonl")


def test_a_killed_loader_worker_and_a_removed_folder_are_told(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    endless = [*tiny_overrides(scenes, run), "data.workers=1", "train.steps=100000", "log.trackers=[]"]
    first = Start(run, endless, launch=None)
    first.wait_for_step(2)
    _, *below = family(first.launcher.pid)
    for process in below:
        kill(process)
    assert "worker" in first.output()
    outcome = first.outcome()
    assert outcome["code"] == 1
    assert "worker" in outcome["reason"]
    assert outcome["step"] >= 2

    again = Start(run, endless, launch=None)
    again.wait_for(lambda: (run / LEASE).exists() and not (run / OUTCOME).exists(), "the lease")
    again.wait_for_step(int(outcome["step"]) + 4)
    while run.exists():  # it writes meanwhile
        shutil.rmtree(run, ignore_errors=True)
    output = again.output()
    assert again.launcher.returncode == 4, output
    assert "Traceback" not in output
    assert "is gone" in output
    assert not run.exists()
