"""A look at every node before training: what is wrong is named, with the node and what to do."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_dist.cluster import preflight
from mfm_dist.cluster import preflight as node_checks
from mfm_dist.cluster import preflight as preflight_checks
from mfm_dist.cluster.preflight import Peers
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.launch import Launch
from tests.conftest import DEFAULTS, run_train, tiny_overrides


def test_two_processes_find_nothing_wrong(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    completed = run_train(tiny_overrides(scenes, run), launch="cpu_ddp", module="mfm_dist.cluster.preflight")
    assert completed.returncode == 0, completed.stderr
    assert "preflight: all well, 1 node(s), 2 process(es) on cpu, all-reduce" in completed.stdout
    assert json.loads((run / "preflight.json").read_text()) == {"code": 0, "problems": [], "nodes": []}
    assert [path.name for path in run.iterdir()] == ["preflight.json"]


def wait(*_: Any) -> Any:
    time.sleep(20)
    return []


TROUBLE: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "slow disk": lambda: setattr(preflight, "folder_problems", wait),
    "hangs": lambda: setattr(preflight, "look", wait),
    "absent": lambda: os._exit(1),
    "no network": lambda: setattr(Peers, "exchange", wait),
    "other torch": lambda: setattr(preflight, "versions", lambda: node_checks.versions() | {"torch": "0.1"}),
    "gpu missing": lambda: os.environ.update(SLURM_GPUS_ON_NODE="1"),
}


def node_of_two(rank: int, port: int, trouble: str, arguments: Sequence[str], output: Path) -> None:
    """One process on a node of its own, in a hurry."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", CUDA_VISIBLE_DEVICES="")
    os.environ.update(SLURMD_NODENAME=f"n{rank + 1}", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    preflight_checks.ANSWER_SECONDS = preflight.ANSWER_SECONDS = 6.0
    preflight_checks.EXCHANGE_SECONDS = preflight.EXCHANGE_SECONDS = 4.0
    preflight.LOOK_SECONDS, node_checks.SEEN_SECONDS = 3.0, 1.0
    TROUBLE[trouble]()
    with output.open("w") as file, redirect_stdout(file):
        code = preflight.main([*DEFAULTS, *arguments])
    os._exit(code)


def preflight_of_two_nodes(
    folder: Path, arguments: Sequence[str], *, trouble: str = "nothing", of_second: Sequence[str] = ()
) -> tuple[list[int | None], str, dict[str, Any]]:
    """Nodes n1 and n2, of which the second has the trouble.

    Returns:
        exit codes, what the first node printed, and the report.
    """
    arguments, port = [f"run.folder={folder / 'run'}", *arguments], free_port()
    fork = multiprocessing.get_context("fork")  # imports are done
    nodes = [
        fork.Process(target=node_of_two, args=(0, port, "nothing", arguments, folder / "n1")),
        fork.Process(target=node_of_two, args=(1, port, trouble, [*arguments, *of_second], folder / "n2")),
    ]
    for node in nodes:
        node.start()
    for node, seconds in zip(nodes, (60, 5), strict=True):
        node.join(seconds)
        node.kill()
    report = json.loads((folder / "run" / "preflight.json").read_text())
    return [node.exitcode for node in nodes], (folder / "n1").read_text(), report


@pytest.mark.parametrize(
    ("trouble", "nodes", "told"),
    [
        ("slow disk", ["n2"], "preflight: n2: run.folder="),
        ("hangs", ["n2"], "preflight: n2: began and said nothing for 6 s"),
        ("absent", [], "preflight: process(es) 1 of 2 did not come within 6 s: "),
        ("no network", [], "preflight: the processes cannot exchange data (n1: the exchange of data with the others "),
        ("other torch", [], "preflight: n2: torch is 0.1, on n1 it is "),
        ("gpu missing", ["n2"], "preflight: n2: 0 GPUs can be used, Slurm gave 1"),
    ],
)
def test_a_node_that_is_unwell_is_told_in_time(
    trouble: str, nodes: list[str], told: str, scenes: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    codes, printed, report = preflight_of_two_nodes(tmp_path, [f"data.root={scenes}"], trouble=trouble)
    assert time.monotonic() - began < 30
    assert codes[0] == 2
    assert told in printed
    assert report["nodes"] == nodes
    assert len(report["problems"]) == 1 + (trouble == "other torch")
    blames_nobody = trouble in ("absent", "no network")
    assert report["code"] == (76 if blames_nobody else 2)
    assert ("MFM_NETWORK" in printed) == blames_nobody


def test_a_run_folder_that_the_nodes_do_not_share_is_told(scenes: Path, tmp_path: Path) -> None:
    alone = [f"run.folder={tmp_path / 'of n2 alone'}"]
    codes, printed, report = preflight_of_two_nodes(tmp_path, [f"data.root={scenes}"], of_second=alone)
    assert codes == [2, 2]
    assert "preflight: n2: does not see what the first node wrote to run.folder=" in printed
    assert report["nodes"] == ["n2"]
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "preflight.json"]


def test_a_check_that_fails_or_hangs_does_not_hide_the_others() -> None:
    def fails() -> list[str]:
        raise RuntimeError("connection refused\nin C++")

    checks = {"a": lambda: ["a is wrong"], "the network": fails, "a disk": wait, "b": lambda: ["never"]}
    assert node_checks.run_checks(checks, 0.2) == [
        "a is wrong",
        "the network failed (RuntimeError: connection refused)",
        "a disk gave no answer within 0 s: it is very slow there, or hangs",
    ]


def test_preflight_ends_within_a_minute_whatever_the_nodes_do() -> None:
    checks = preflight_checks
    assert checks.ANSWER_SECONDS + checks.EXCHANGE_SECONDS + 2 * checks.GRACE_SECONDS < 60
    assert preflight.LOOK_SECONDS < checks.ANSWER_SECONDS


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


def test_a_node_with_other_versions_is_named_also_if_it_is_the_first() -> None:
    same, other = {"torch": "2.15.0", "numpy": "2.4.6"}, {"torch": "2.14.0", "numpy": "2.4.6"}
    nodes = ["n1", "n2", "n3"]
    assert list(preflight.unlike(nodes, [same, other, same])) == [
        ("n2", "torch is 2.14.0, on n1 it is 2.15.0: it has to be the same on all nodes")
    ]
    assert list(preflight.unlike(nodes, [other, same, same])) == [
        ("n1", "torch is 2.14.0, on n2 it is 2.15.0: it has to be the same on all nodes")
    ]
    assert [node for node, _ in preflight.unlike(["n1", "n2"], [other, same])] == ["n1", "n2"]
    assert list(preflight.unlike(nodes, [same] * 3)) == []
    assert set(node_checks.versions()) >= {"python", "torch", "CUDA", "deepspeed"}


def test_a_node_with_another_time_is_named() -> None:
    assert list(preflight.wrong_clocks(["n1", "n2", "n3"], [100.0, 100.2, 99.9])) == []
    ((node, problem),) = preflight.wrong_clocks(["n1", "n2", "n3"], [100.0, 63.5, 100.1])
    assert (node, "-36.5 s" in problem) == ("n2", True)
    assert [node for node, _ in preflight.wrong_clocks(["n1", "n2"], [100.0, 63.5])] == ["n1", "n2"]


def test_a_full_folder_is_named_with_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(node_checks.folder_problems("run.folder", tmp_path, 1)) == []
    (problem,) = node_checks.folder_problems("run.folder", tmp_path, 1 << 60)
    assert "GiB free, 1073741824.00 are needed: free some space" in problem
    monkeypatch.setattr(os, "fsync", _no_space)
    (problem,) = node_checks.folder_problems("data.scratch", tmp_path, 1)
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
    assert len(list(node_checks.shard_problems(config))) == 2
    config.data.render_scenes = True
    assert list(node_checks.shard_problems(config)) == []


def test_single_bad_samples_are_left_to_the_limit_of_the_run(scenes: Path, tmp_path: Path) -> None:
    config = shards_of(scenes, tmp_path / "scenes")
    shards = tmp_path / "scenes" / "game_train"
    spoil(shards, "000000.tar")
    assert list(node_checks.shard_problems(config)) == []
    config.data.bad_sample_limit = 0.0
    (problem,) = node_checks.shard_problems(config)
    assert problem.startswith("data.source: 2 of 5 samples tried cannot be used, first ")
    config.data.bad_sample_limit = 0.5
    (shards / "000000.tar").unlink()  # 5 of 12 samples
    assert list(node_checks.shard_problems(config)) == []
    (shards / "000000.tar").write_bytes(b"")
    spoil(shards, "000001.tar", "000002.tar")
    (problem,) = node_checks.shard_problems(config)
    assert problem.startswith("data.source: 5 of 5 samples tried cannot be used")


def test_a_shard_set_without_samples_is_told(scenes: Path, tmp_path: Path) -> None:
    config = shards_of(scenes, tmp_path / "scenes")
    manifest = tmp_path / "scenes" / "camera_train" / "dataset.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "shards": []}))
    (problem,) = node_checks.shard_problems(config)
    assert problem == f"data.target: {manifest.parent} holds no samples: make the shards again"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_checkpoint_that_is_not_seen_or_not_the_same_is_told(tmp_path: Path) -> None:
    assert node_checks.write_probe(tmp_path / "run" / "probe") == []
    assert node_checks.read_probe(tmp_path / "run" / "probe") == []
    student = tmp_path / "run" / "probe" / "step_00000000" / "student.safetensors"
    student.write_bytes(student.read_bytes()[:-1] + b"\7")
    (problem,) = node_checks.read_probe(tmp_path / "run" / "probe")
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
    found = list(node_checks.gpu_problems(Launch(1, 0, None)))
    assert [problem[: len(start)] for problem, start in zip(found, told, strict=True)] == told


def test_the_space_for_a_checkpoint_is_that_of_the_last(tmp_path: Path) -> None:
    config = RunConfig()
    config.run.folder = tmp_path
    assert node_checks.space_needed(config) == node_checks.PROBE
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    with (tmp_path / "checkpoints" / "step_00000001" / "student.safetensors").open("wb") as file:
        file.truncate(3 * node_checks.PROBE)
    assert node_checks.space_needed(config) == 3 * node_checks.PROBE
