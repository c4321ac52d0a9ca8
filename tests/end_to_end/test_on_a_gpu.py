"""The real command on a GPU: what metrics say there, the trace, and memory that runs out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from mfm_dist.inference.metrics import boundary_counts, confusion_matrix
from tests.helpers.runs import run_train, tiny_overrides

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU = {"CUDA_VISIBLE_DEVICES": "0"}


def test_metrics_and_trace_of_a_run_on_a_gpu(scenes: Path, tmp_path: Path) -> None:
    """Alone, without a launch file: a GPU that is there is used, and said."""
    run = tmp_path / "run"
    traced = ["log.profile.start=1", "log.profile.steps=2", "train.precision=bf16"]
    completed = run_train([*tiny_overrides(scenes, run), *traced], environment=GPU)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert f"1 process, {torch.cuda.get_device_name()}" in completed.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert 0 < line["memory_gib"] <= line["memory_reserved_gib"]
        assert line["tflops"] > 0
        assert 0 < line.get("mfu", 0.5) < 1
    with gzip.open(run / "trace_00000001.json.gz") as file:
        kinds = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert {"kernel", "user_annotation"} <= kinds


def test_memory_that_runs_out_is_told_with_what_was_held(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {**GPU, "BAD_BLOCKS": "3", "BAD_KIND": "gpu memory"}
    planted = "tests.distributed.train_with_bad_gradients"
    completed = run_train(tiny_overrides(scenes, run), module=planted, environment=environment)
    assert completed.returncode == 6, completed.stderr[-3000:]
    assert completed.stderr.count("ran out of memory: CUDA out of memory") == 1
    assert "train.precision=bf16" in completed.stderr
    assert "Traceback" not in completed.stderr
    snapshot = json.loads((run / "out_of_memory" / "rank_00000.json").read_text())
    assert snapshot["segments"]
    assert any("Allocated memory" in line for line in snapshot["summary"])


def test_counts_of_an_evaluation_are_those_of_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    label, prediction = (torch.randint(0, 19, (128, 256), generator=generator).byte() for _ in range(2))
    label[:20] = 255
    for count in (confusion_matrix, boundary_counts):
        assert torch.equal(count(label.cuda(), prediction.cuda(), 19).cpu(), count(label, prediction, 19))
