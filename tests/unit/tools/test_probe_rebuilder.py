"""The probe as a command: what it prints and leaves in the run folder, what the report makes of it, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mfm_dist.report.page import render
from mfm_dist.report.run import read_runs
from mfm_dist.run.folder import PROBE
from tests.helpers.runs import checkpoint_tensors, rewrite_tensors
from tools.probe_rebuilder import main


def change(run: Path, before: str, after: str) -> None:
    text = (run / "config.yaml").read_text()
    assert before in text
    (run / "config.yaml").write_text(text.replace(before, after))


def test_a_run_is_probed_and_its_report_shows_it(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    change(run, "pseudo_threshold: 0.968", "pseudo_threshold: 0.0")  # or all gradients of a random teacher are 0
    assert f"Not measured yet: python tools/probe_rebuilder.py --run {run}" in render(read_runs([run]), images=0)
    assert main(["--run", str(run), "--json"]) == 0
    said = capsys.readouterr().out
    assert said == (run / PROBE).read_text()
    found = json.loads(said)
    assert (found["step"], found["images"]) == (4, 4)
    page = render(read_runs([run]), images=0)
    assert 'id="rebuilder"' in page
    assert "the Rebuilder, shown another image" in page
    assert f"{100 * found['agreement']['other_image']['hidden']:.1f}</td>" in page
    # The same again, from a run that recomputes activations; a table for people.
    change(run, "checkpoint_rebuilder: false", "checkpoint_rebuilder: true")
    (run / PROBE).unlink()
    assert main(["--run", str(run)]) == 0
    assert (run / PROBE).read_text() == said
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 4, 4 validation images"
    assert any(
        line.split() == ["rebuilder", "-", "diffusion", f"{found['rebuilder_minus_diffusion']:+.3f}"] for line in lines
    )
    # Adam's state is that of the checkpoint: without it the first step is another one.
    for checkpoint in (run / "checkpoints").glob("step_*"):
        tensors = checkpoint_tensors(checkpoint).items()
        parts = ("student/", "teacher/", "rebuilder/")
        rewrite_tensors(checkpoint, {name: one for name, one in tensors if name.startswith(parts)})
    assert main(["--run", str(run), "--json"]) == 0
    fresh = json.loads(capsys.readouterr().out)
    assert fresh.pop("output_change") != found.pop("output_change")
    assert fresh == found


def test_what_cannot_be_probed_is_told(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    change(run, "reconstruction: classes", "reconstruction: student_features")
    assert main(["--run", str(run)]) == 2
    assert "nothing to probe: rebuilt features are not classified in this run" in capsys.readouterr().err
    assert not (run / PROBE).exists()
    assert 'id="rebuilder"' not in render(read_runs([run]), images=0)
