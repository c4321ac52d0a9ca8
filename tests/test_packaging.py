"""What is installed works without a clone: files, commands, names. Built as pip builds it, without its copying."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mfm_dist
from tests.helpers.runs import REPOSITORY

SETUP = (REPOSITORY / "setup.py").read_text()
DOORS = {
    "make_shards": "mfm_dist.shards.make",
    "check_shards": "mfm_dist.shards.check",
    "profile_flops": "mfm_dist.profiling.flops",
    "profile_throughput": "mfm_dist.profiling.throughput",
}
"""Tool -> what it runs."""


def test_a_wheel_has_configurations_weights_and_scripts(tmp_path: Path) -> None:
    built, empty = tmp_path / "built", tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    installed = built / "mfm_dist"
    assert (installed / "py.typed").is_file()
    listed = "git", "ls-files", "configs", "slurm"
    files = subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split()
    for file in files:
        assert (installed / "_shipped" / file).read_bytes() == (REPOSITORY / file).read_bytes()
    # --check builds the quickstart's networks, of which the encoder is read from the weights in configs/scenes.
    settings = ["--check", "--launch", "configs/accelerate/cpu_zero2.yaml", "--config", "configs/own_data.yaml"]
    run = subprocess.run(
        [sys.executable, "-m", "mfm_dist.train", *settings, "data.target=camera_train"],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(built)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("ok: dacs + MFM")
    assert list(empty.iterdir()) == []


def test_every_console_command_is_there() -> None:
    commands = re.findall(r'"(mfm-\w+) = ([\w.]+):(\w+)"', SETUP)
    assert [name for name, _, _ in commands] == [
        f"mfm-{name}" for name in ("train", "evaluate", "predict", "export", "report", "shards", "profile")
    ]
    for _, module, function in commands:
        assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("tool", DOORS)
def test_tools_are_doors_to_the_package(tool: str) -> None:
    assert import_module(f"tools.{tool}").main is import_module(DOORS[tool]).main


@pytest.mark.parametrize("module", ["shards", "profiling"])
def test_a_command_that_is_not_there_is_told_with_those_that_are(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = import_module(f"mfm_dist.{module}.__main__")
    for wrong in ([], ["nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            program.main(wrong)
        assert ",".join(program.COMMANDS) in capsys.readouterr().err


def test_the_version_has_one_place() -> None:
    newest = re.findall(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == mfm_dist.__version__
    assert not re.search(r"version=\W*\d", SETUP)
