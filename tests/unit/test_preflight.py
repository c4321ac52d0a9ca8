"""A look at every node before training: what is wrong is named, with the node and what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_dist import preflight
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed import preflight_checks
from mfm_dist.distributed.launch import Launch
from tests.conftest import DEFAULTS, run_train, tiny_overrides


def test_two_processes_find_nothing_wrong(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    completed = run_train(tiny_overrides(scenes, run), launch="cpu_ddp", module="mfm_dist.preflight")
    assert completed.returncode == 0, completed.stderr
    assert "preflight: all well, 1 node(s), 2 process(es) on cpu, all-reduce" in completed.stdout
    assert json.loads((run / "preflight.json").read_text()) == {"code": 0, "problems": [], "nodes": []}
    assert [path.name for path in run.iterdir()] == ["preflight.json"]


def test_everything_wrong_is_told_at_once(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((scenes / "camera_train").glob("*.tar"))
    (tmp_path / "scratch").write_text("a file")
    wrong = ["data.source=nowhere", f"data.scratch={tmp_path / 'scratch'}"]
    overrides = [*tiny_overrides(scenes, tmp_path / "run"), *wrong]
    content = shard.read_bytes()
    shard.write_bytes(content[:600] + b"\0" * (len(content) - 600))
    try:
        assert preflight.main([*DEFAULTS, *overrides]) == 2
    finally:
        shard.write_bytes(content)
    told = capsys.readouterr().out
    for what in ("data.scratch=", "data.source: ", "data.target: "):
        assert f"preflight: {os.uname().nodename}: {what}" in told
    assert "Traceback" not in told


def test_a_node_with_other_versions_is_named() -> None:
    same = {"torch": "2.15.0", "numpy": "2.4.6"}
    found = list(preflight.unlike(["n1", "n2", "n3"], [same, {**same, "torch": "2.14.0"}, same]))
    assert found == [("n2", "torch is 2.14.0, on n1 it is 2.15.0: install the same on all nodes")]
    assert set(preflight.versions()) >= {"python", "torch", "CUDA", "deepspeed"}


def test_a_node_with_another_time_is_named() -> None:
    assert list(preflight.wrong_clocks(["n1", "n2", "n3"], [100.0, 100.2, 99.9])) == []
    ((node, problem),) = preflight.wrong_clocks(["n1", "n2", "n3"], [100.0, 63.5, 100.1])
    assert (node, "-36.5 s" in problem) == ("n2", True)


def test_a_full_folder_is_named_with_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(preflight.folder_problems("run.folder", tmp_path, 1)) == []
    (problem,) = preflight.folder_problems("run.folder", tmp_path, 1 << 60)
    assert "GiB free, 1073741824.00 are needed: free some space" in problem
    monkeypatch.setattr(os, "fsync", _no_space)
    (problem,) = preflight.folder_problems("data.scratch", tmp_path, 1)
    assert "No space left" in problem
    assert list(tmp_path.iterdir()) == []


def shards_of(scenes: Path, folder: Path) -> RunConfig:
    """A copy of the scenes to damage."""
    shutil.copytree(scenes, folder)
    return load_config(None, [f"data.root={folder}"])


def spoil(shards: Path, *names: str) -> None:
    """Leave the size of tars as it is, and nothing in them that can be read."""
    for name in names:
        (shards / name).write_bytes(b"\0" * (shards / name).stat().st_size)


def test_shards_that_the_run_will_render_or_finish_are_not_missed(scenes: Path, tmp_path: Path) -> None:
    config = shards_of(scenes, tmp_path / "scenes")
    manifest = tmp_path / "scenes" / "game_train" / "dataset.json"
    manifest.rename(manifest.with_name("dataset.unfinished.json"))
    shutil.rmtree(tmp_path / "scenes" / "camera_val")
    assert len(list(preflight.shard_problems(config))) == 2
    config.data.render_scenes = True
    assert list(preflight.shard_problems(config)) == []


def test_single_bad_samples_are_left_to_the_limit_of_the_run(scenes: Path, tmp_path: Path) -> None:
    config = shards_of(scenes, tmp_path / "scenes")
    shards = tmp_path / "scenes" / "game_train"
    spoil(shards, "000000.tar")
    assert list(preflight.shard_problems(config)) == []
    config.data.bad_sample_limit = 0.0
    (problem,) = preflight.shard_problems(config)
    assert problem.startswith("data.source: 2 of 5 samples tried cannot be used, first ")
    config.data.bad_sample_limit = 0.5
    (shards / "000000.tar").unlink()  # 5 of 12 samples
    assert list(preflight.shard_problems(config)) == []
    (shards / "000000.tar").write_bytes(b"")
    spoil(shards, "000001.tar", "000002.tar")
    (problem,) = preflight.shard_problems(config)
    assert problem.startswith("data.source: 5 of 5 samples tried cannot be used")


def test_a_shard_set_without_samples_is_told(scenes: Path, tmp_path: Path) -> None:
    config = shards_of(scenes, tmp_path / "scenes")
    manifest = tmp_path / "scenes" / "camera_train" / "dataset.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "shards": []}))
    (problem,) = preflight.shard_problems(config)
    assert problem == f"data.target: {manifest.parent} holds no samples: make the shards again"


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_checkpoint_that_is_not_seen_or_not_the_same_is_told(tmp_path: Path) -> None:
    assert preflight.write_probe(tmp_path / "run" / "probe") == []
    assert preflight.read_probe(tmp_path / "run" / "probe") == []
    student = tmp_path / "run" / "probe" / "step_00000000" / "student.safetensors"
    student.write_bytes(student.read_bytes()[:-1] + b"\7")
    (problem,) = preflight.read_probe(tmp_path / "run" / "probe")
    assert "student.safetensors differs from what was written" in problem


def test_a_device_that_multiplies_wrongly_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight_checks.device_problem(torch.device("cpu")) is None
    right = torch.Tensor.to

    def wrong(tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
        moved = right(tensor, *arguments).clone()
        moved[5, 7] += 1
        return moved

    monkeypatch.setattr(torch.Tensor, "to", wrong)
    told = preflight_checks.device_problem(torch.device("cpu"))
    assert told is not None
    assert told.startswith("multiplies wrongly (")


@pytest.mark.parametrize(
    ("answer", "told"), [(("0, 0", "1, 0"), []), (("0, 0", "1, 3"), ["GPU 1 had 3"]), (("0, [N/A]",), [])]
)
def test_memory_errors_of_a_gpu_are_told(
    answer: tuple[str, ...], told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"echo '{line}'\n" for line in answer)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = list(preflight.gpu_problems(Launch(1, 0, None)))
    assert [problem[: len(start)] for problem, start in zip(found, told, strict=True)] == told


def test_the_space_for_a_checkpoint_is_that_of_the_last(tmp_path: Path) -> None:
    config = RunConfig()
    config.run.folder = tmp_path
    assert preflight._space_needed(config) == preflight.PROBE
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    with (tmp_path / "checkpoints" / "step_00000001" / "student.safetensors").open("wb") as file:
        file.truncate(3 * preflight.PROBE)
    assert preflight._space_needed(config) == 3 * preflight.PROBE
