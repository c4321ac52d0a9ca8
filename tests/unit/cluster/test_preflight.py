"""A look at every node before training: what is wrong is named, with the node and what to do."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch

from mfm_dist.cluster import preflight
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.launch import Launch
from mfm_dist.errors import DataError, StorageError, UserError
from tests.helpers.runs import DEFAULTS, run_train, tiny_overrides


def test_two_processes_find_nothing_wrong(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    completed = run_train(tiny_overrides(scenes, run), launch="cpu_ddp", module="mfm_dist.cluster.preflight")
    assert completed.returncode == 0, completed.stderr
    assert "preflight: all well, 1 node(s), 2 process(es) on cpu, all-reduce" in completed.stdout
    assert json.loads((run / "preflight.json").read_text()) == {"code": 0, "problems": [], "nodes": []}
    assert [path.name for path in run.iterdir()] == ["preflight.json"]


def wait(*_: Any) -> Any:
    time.sleep(20)


def freeze() -> None:
    """Have the process come, and stop before it has said anything."""
    run_checks = preflight.run_checks
    preflight.run_checks = lambda *arguments: wait() or run_checks(*arguments)


def miscount() -> None:
    """Have the process find wrong numbers where there are none."""
    all_reduce = preflight.all_reduce
    preflight.all_reduce = lambda *arguments: (3, all_reduce(*arguments)[1])


TROUBLE: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "slow disk": lambda: (setattr(preflight, "write_probe", wait), setattr(shutil, "rmtree", wait)),
    "hangs": freeze,
    "absent": lambda: os._exit(1),
    "no network": lambda: setattr(preflight, "all_reduce", wait),
    "wrong sums": miscount,
    "other torch": lambda: setattr(preflight, "version", lambda name: "0.1" if name == "torch" else version(name)),
    "gpu missing": lambda: os.environ.update(SLURM_GPUS_ON_NODE="1"),
    "clock": lambda: setattr(time, "time", lambda: 1000.0),
}


def node_of_two(rank: int, port: int, trouble: str, arguments: Sequence[str], output: Path) -> None:
    """One process on a node of its own, in a hurry."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", CUDA_VISIBLE_DEVICES="")
    os.environ.update(SLURMD_NODENAME=f"n{rank + 1}", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    preflight.LOOK_SECONDS, preflight.MEET_SECONDS = 6.0, 15.0
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
        ("slow disk", ["n2"], "preflight: n2: writing to run.folder="),
        ("hangs", ["n2"], "preflight: n2: process 1 of 2 said nothing in time: it is very slow, or hangs"),
        ("absent", [], "preflight: process 1 of 2 said nothing in time: it did not come; "),
        ("no network", [], "preflight: n1: the exchange of data failed ("),
        ("wrong sums", ["n2"], "preflight: n2: an all-reduce came out wrong in 3 numbers: "),
        ("other torch", [], "preflight: n2: torch is 0.1, elsewhere "),
        ("gpu missing", ["n2"], "preflight: n2: a look at the GPUs failed (0 can be used, Slurm gave 1; "),
        ("clock", [], "preflight: n2: its clock is -"),
    ],
)
def test_a_node_that_is_unwell_is_told_in_time(
    trouble: str, nodes: list[str], told: str, scenes: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    codes, printed, report = preflight_of_two_nodes(tmp_path, [f"data.root={scenes}"], trouble=trouble)
    assert time.monotonic() - began < 45
    assert codes[0] == 2
    if trouble == "slow disk":
        assert codes[1] == 2  # it does not wait for its disk
    assert told in printed
    assert report["nodes"] == nodes
    names_both = trouble in ("other torch", "clock")
    assert len(report["problems"]) == 1 + names_both
    blames_nobody = trouble in ("absent", "no network")
    assert report["code"] == (76 if blames_nobody else 2)
    assert ("MFM_NETWORK" in printed) == blames_nobody


def test_a_run_folder_that_the_nodes_do_not_share_is_told(scenes: Path, tmp_path: Path) -> None:
    alone = [f"run.folder={tmp_path / 'of n2 alone'}"]
    codes, printed, report = preflight_of_two_nodes(tmp_path, [f"data.root={scenes}"], of_second=alone)
    assert codes == [2, 2]
    assert "preflight: n2: reading what the first node wrote to run.folder=" in printed
    assert "it must be on a file system that all nodes share" in printed
    assert report["nodes"] == ["n2"]
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "preflight.json"]


def test_a_check_that_fails_or_hangs_does_not_hide_the_others() -> None:
    def fails() -> None:
        raise RuntimeError("connection refused\nin C++")

    hangs = threading.Event()
    checks = [
        ("a disk", hangs.wait, "mend it"),
        ("the network", fails, "try another"),
        ("a folder", lambda: 7, "free it"),
    ]
    found = preflight.run_checks(checks, 0.2)
    hangs.set()
    assert found == [
        "a disk failed (no answer in 0 s, it is very slow or hangs): mend it",
        "the network failed (connection refused in C++): try another",
    ]


def test_preflight_ends_within_a_minute_whatever_the_nodes_do() -> None:
    assert preflight.LOOK_SECONDS + preflight.MEET_SECONDS + 2 < 60


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
    for what in ("writing to data.scratch=", "reading data.source=", "reading data.target="):
        assert f"preflight: {os.uname().nodename}: {what}" in told
    assert "Traceback" not in told
    assert "comparing the classes" not in told, "the set that is not there was told already"


def test_shards_of_other_classes_are_told_with_both_lists(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards_of(scenes, tmp_path / "scenes")
    manifest = tmp_path / "scenes" / "camera_val" / "dataset.json"
    tree = json.loads(manifest.read_text())
    tree["classes"]["names"].reverse()
    manifest.write_text(json.dumps(tree))
    assert preflight.main([*DEFAULTS, *tiny_overrides(tmp_path / "scenes", tmp_path / "run")]) == 2
    told = capsys.readouterr().out
    assert "comparing the classes of the shards failed (configuration error: game_train and camera_val do not" in told
    assert "19: road, sidewalk, " in told
    assert "19: bicycle, motorcycle, " in told
    assert told.count("\n") == 1


def test_a_node_with_other_versions_is_named_also_if_it_is_the_first() -> None:
    same, other = {"torch": "2.15.0", "numpy": "2.4.6"}, {"torch": "2.14.0", "numpy": "2.4.6"}

    def told(*facts: dict[str, str]) -> list[tuple[str | None, str]]:
        return list(preflight.unlike([(f"n{number}", one) for number, one in enumerate(facts, 1)]))

    problem = "torch is 2.14.0, elsewhere 2.15.0: it has to be the same on all nodes"
    assert told(same, other, same) == [("n2", problem)]
    assert told(other, same, same) == [("n1", problem)]
    assert [node for node, _ in told(other, same)] == ["n1", "n2"]
    assert told(same, same, same) == []


def test_a_full_folder_is_named_with_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.write_probe(tmp_path, "probe")
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    with (tmp_path / "checkpoints" / "step_00000001" / "rank_00000.safetensors").open("wb") as file:
        file.truncate(1 << 43)  # of zeros that take no room
    with pytest.raises(ValueError, match=r"GiB are free, 8192\.00 are needed"):
        preflight.write_probe(tmp_path, "probe")
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(OSError, match="No space left"):
        preflight.write_probe(tmp_path, "probe")


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
    shutil.rmtree(tmp_path / "scenes" / "camera_val")
    with pytest.raises(UserError):
        preflight.read_samples(config, "camera_val", Lock())
    config.data.render_scenes = True
    preflight.read_samples(config, "camera_val", Lock())


def test_single_bad_samples_are_left_to_the_limit_of_the_run(scenes: Path, tmp_path: Path) -> None:
    config = shards_of(scenes, tmp_path / "scenes")
    shards = tmp_path / "scenes" / "game_train"
    spoil(shards, "000000.tar")
    preflight.read_samples(config, "game_train", Lock())
    config.data.bad_sample_limit = 0.0
    with pytest.raises(ValueError, match=r"^2 of 5 samples tried cannot be used, first "):
        preflight.read_samples(config, "game_train", Lock())
    config.data.bad_sample_limit = 0.5
    (shards / "000000.tar").unlink()  # 5 of 12 samples
    preflight.read_samples(config, "game_train", Lock())
    (shards / "000000.tar").write_bytes(b"")
    spoil(shards, "000001.tar", "000002.tar")
    with pytest.raises(ValueError, match=r"^5 of 5 samples tried cannot be used"):
        preflight.read_samples(config, "game_train", Lock())


def test_a_shard_set_without_samples_is_told(scenes: Path, tmp_path: Path) -> None:
    config = shards_of(scenes, tmp_path / "scenes")
    manifest = tmp_path / "scenes" / "camera_train" / "dataset.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "shards": []}))
    with pytest.raises(DataError, match="counts no samples"):
        preflight.read_samples(config, "camera_train", Lock())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_that_gives_other_bytes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = preflight.write_checkpoint

    def damaged(final: Path, *arguments: Any, **more: Any) -> None:
        written(final, *arguments, **more)
        tensors = final / "rank_00000.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\7")

    monkeypatch.setattr(preflight, "write_checkpoint", damaged)
    with pytest.raises(StorageError, match=r"rank_00000\.safetensors differs from what was written"):
        preflight.write_probe(tmp_path, "probe")


def test_a_device_that_multiplies_wrongly_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.multiply(torch.device("cpu"))
    right = torch.Tensor.to

    def wrong(tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
        moved = right(tensor, *arguments).clone()
        moved[5, 7] += 1
        return moved

    monkeypatch.setattr(torch.Tensor, "to", wrong)
    with pytest.raises(ValueError, match=r"of 1024 rows are wrong"):
        preflight.multiply(torch.device("cpu"))


@pytest.mark.parametrize(
    ("answer", "told"), [(("0, 0", "1, 0"), ""), (("0, 0", "1, 3"), "[('1', '3')]"), (("0, [N/A]",), "")]
)
def test_memory_errors_of_a_gpu_are_told(
    answer: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"echo '{line}'\n" for line in answer)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = preflight.run_checks([("GPUs", lambda: preflight.inspect_gpus(Launch(1, 0, None)), "see")], 10)
    assert found == ([f"GPUs failed (uncorrected memory errors, GPU and how many: {told}): see"] if told else [])


def test_a_run_may_have_several_configuration_files(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"run: {{folder: {tmp_path / 'run'}}}\ndata: {{root: {scenes}}}\n")
    assert preflight.main([*DEFAULTS, "--config", str(tmp_path / "mine.yaml")]) == 0
    assert json.loads((tmp_path / "run" / "preflight.json").read_text())["problems"] == []
