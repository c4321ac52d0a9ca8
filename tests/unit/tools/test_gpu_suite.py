"""tools/gpu_suite.py runs tiny without a GPU; what dies or hangs costs one item; the docs have its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_dist.storage import JsonLines
from tests.helpers.runs import REPOSITORY
from tools.gpu_suite import CALLS, GPU_TESTS, Machine, Wrong, in_process, outcomes_of, table

ALL_CALLS = """
import sys
from tools.gpu_suite import main

sys.exit(max(main([call, "--out", sys.argv[1]]) for call in ("right", "fast", "large")))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for minutes where there is a GPU")
def test_all_three_calls_run_tiny_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALL_CALLS, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for call, items in CALLS.items():
        lines = list(JsonLines(tmp_path / f"{call}.jsonl"))
        assert [line["item"] for line in lines] == [name for name, item in items.items() if item.on_cpu]
        assert lines[0]["item"] == "about"
        assert all(line["tiny"] and line["outcome"] == "well" for line in lines)
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    figures = {(line["call"], line["item"]): line["figures"] for line in printed}
    assert figures["right", "CPU against GPU"]["dacs, ieee"] == {"losses": 0.0, "gradients": 0.0}
    assert figures["fast", "bf16"]["step_ms"] > 0
    assert figures["fast", "trace"]["kernels"] > 100
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000


def test_all_files_with_tests_for_a_gpu_are_run() -> None:
    files = [path.relative_to(REPOSITORY) for path in (REPOSITORY / "tests").rglob("test_*.py")]
    marked = {str(file) for file in files if "pytest.mark.gpu" in (REPOSITORY / file).read_text()}
    assert marked - {str(Path(__file__).relative_to(REPOSITORY))} == set(GPU_TESTS)


@pytest.mark.parametrize("beside", [[], ["-n", "2"]])
def test_outcomes_are_read_from_what_pytest_says(beside: list[str], tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_all.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_x(x): assert x == 'c'\n"
        "def test_y(): pytest.skip()\n@pytest.fixture\ndef broken(): raise ValueError\ndef test_z(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-vv", "-p", "no:cacheprovider", *beside, "tests"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert outcomes_of(said) == {
        "tests/test_all.py::test_x[a b]": "FAILED", "tests/test_all.py::test_x[c]": "PASSED",
        "tests/test_all.py::test_y": "SKIPPED", "tests/test_all.py::test_z": "ERROR",
    }  # fmt: skip


def fails(_: Machine) -> dict[str, Any]:
    raise Wrong("too large", by=3)


def dies(_: Machine) -> dict[str, Any]:
    os._exit(139)


def hangs(_: Machine) -> dict[str, Any]:
    time.sleep(100)
    return {}


def breaks(_: Machine) -> dict[str, Any]:
    raise RuntimeError("CUDA error")


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (fails, "too large"),
        (dies, "died without an answer"),
        (hangs, "no answer within 1 s"),
        (breaks, "RuntimeError: CUDA error"),
    ],
)
def test_whatever_becomes_of_an_item_is_told(work: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(Wrong, match=told) as wrong:
        in_process(work, Machine(tmp_path, tiny=True), seconds=1 if work is hangs else 20, log=tmp_path / "log")
    assert wrong.value.figures == ({"by": 3} if work is fails else {})
    assert ("Traceback" in (tmp_path / "log").read_text()) == (work is breaks)


def test_the_table_of_the_documentation_is_that_of_the_lines() -> None:
    lines = [line for call in CALLS for line in JsonLines(REPOSITORY / "docs/benchmarks/gpu_suite" / f"{call}.jsonl")]
    assert table(lines) in (REPOSITORY / "docs" / "benchmarks.md").read_text()


def test_what_was_found_stands_in_the_table() -> None:
    line = {"call": "fast", "item": "bf16", "outcome": "well", "tiny": False, "seconds": 31.2,
            "figures": {"step_ms": 33.333, "parts": {"a": 1}}}  # fmt: skip
    assert "| fast | bf16 | well | 31 | step_ms 33.3, parts (a 1) |" in table([line])
    assert "| fast | bf16 | not measured yet | | |" in table([{**line, "tiny": True}])
