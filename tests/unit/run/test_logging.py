"""What metrics.jsonl is made of: means since the last line, and lines that survive a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from mfm_dist.run.logging import RunningMean
from mfm_dist.storage import JsonLines, write_atomically


def test_running_mean_starts_anew_after_pop() -> None:
    means = RunningMean()
    for value in (1.0, 2.0, 6.0):
        means.add({"a": torch.tensor(value), "b": torch.tensor(-value)})
    assert means.pop() == {"a": 3.0, "b": -3.0}
    assert means.pop() == {}
    means.add({"a": torch.tensor(5.0)})
    assert means.pop() == {"a": 5.0}


def test_json_lines_forgets_later_steps_and_survives_a_torn_line(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    assert list(file) == []
    for step in (10, 20, 30):
        file.append({"step": step, "loss": math.nan if step == 20 else 0.5})
    with file.path.open("a") as stream:
        stream.write('{"step": 40, "lo')  # killed while writing
    assert [record["step"] for record in file] == [10, 20, 30]
    file.forget_after(20)
    assert list(file) == [{"step": 10, "loss": 0.5}, {"step": 20, "loss": None}]
    assert all(json.loads(line) for line in file.path.read_text().splitlines())


def test_write_atomically_leaves_nothing_beside(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_atomically(tmp_path / "file", text)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "two")]
