"""A run folder is of use from any working folder, as long as its data is somewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mfm_dist.errors import StorageError
from mfm_dist.evaluate import main as evaluate
from mfm_dist.run.folder import LEASE, RunFolder, read_config
from tests.helpers.runs import REPOSITORY


def test_the_data_of_a_run_is_found_from_any_working_folder(
    trained_run: Path,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, project, elsewhere = (tmp_path / name for name in ("run", "project", "elsewhere"))
    shutil.copytree(trained_run, run)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["started_in"] == str(REPOSITORY)
    config = (run / "config.yaml").read_text()
    assert f"root: {scenes}" in config
    (run / "config.yaml").write_text(config.replace(f"root: {scenes}", "root: data"))
    (run / "environment.json").write_text(json.dumps({**environment, "started_in": str(project)}))
    for folder in (project, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(elsewhere)

    (project / "data").symlink_to(scenes)
    assert read_config(run).data.root == project / "data"
    assert evaluate(["--run", str(run)]) == 0
    scores = capsys.readouterr().out

    (project / "data").unlink()
    assert evaluate(["--run", str(run)]) == 2
    assert "data.root=data, is neither in the working folder nor" in capsys.readouterr().err

    (elsewhere / "data").symlink_to(scenes)
    (run / "environment.json").unlink()
    assert evaluate(["--run", str(run)]) == 0
    assert capsys.readouterr().out == scores


def test_a_rank_that_sees_another_folder_is_refused(tmp_path: Path) -> None:
    """Such as one of the same name on a disk of its own machine."""
    (tmp_path / LEASE).write_text("held by rank 0")
    run = RunFolder(tmp_path, writes=False)
    run.check_shared("held by rank 0", rank=1)
    told = rf"run\.folder={tmp_path} on \S+ \(rank 1\) is not the folder that rank 0 has under this name"
    with pytest.raises(StorageError, match=told):
        run.check_shared("held by another", rank=1, patience=0.0)
    with pytest.raises(StorageError, match="on storage that all machines share"):
        RunFolder(tmp_path / "nothing", writes=False).check_shared("held by rank 0", rank=1, patience=0.0)
