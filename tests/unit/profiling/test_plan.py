"""A plan of a run: what it prints, what it recommends, and where its figures come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.launch import Launch
from mfm_dist.distributed.launcher import launch_environment
from mfm_dist.distributed.memory import StateSizes
from mfm_dist.errors import ConfigError
from mfm_dist.profiling import plan as planning
from mfm_dist.profiling.plan import (
    Cluster,
    Work,
    calibrate,
    does_not_fit,
    memory,
    pays_up_to,
    recommended,
    scaled,
    stages_of,
)
from mfm_dist.profiling.plan_command import COMPONENTS, main, read_link
from tests.helpers.modules import SMALL, config_with

RUN = [*SMALL, "data.crop=64x64"]
TWO_NODES = Cluster(nodes=2, gpus=8, gpu="h100", gib=80, within=400, across=20)
SIZES = StateSizes(groups=[[10**6] * 1000], teacher=[10**6] * 100, frozen=[], buffer_bytes=0, moments=2)
WORK = Work(block_seconds=0.1, update_seconds=0.01, saved_bytes=10 * 2**30, cast_weight_bytes=2**30)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_command_takes_its_arguments_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {global_batch: 8, steps: 100}\n")
    first = planned(capsys, str(file), *RUN, "--gpus", "2", "--nodes", "2", "--link", "10")
    second = planned(capsys, "--link", "10", *RUN, "--nodes", "2", str(file), "--gpus", "2")
    assert first == second
    assert first["memory_gib"].keys() == {"0", "1", "2", "3", "3_hpz"}
    for held in first["memory_gib"].values():
        total = held.pop("total")
        assert sum(held.values()) == pytest.approx(total)
        assert held.keys() <= set(COMPONENTS)
    assert first["recommended_stage"] == "0"
    seconds = first["step_seconds"]
    assert seconds["total"] == pytest.approx(seconds["compute"] + seconds["exchange"])
    assert first["hours"] == pytest.approx(100 * seconds["total"] / 3600, rel=0.01)
    assert first["exchange_gib"] * 2**30 / 10e9 == pytest.approx(seconds["exchange"])
    assert first["checkpoint_gib"] > 0
    assert [row["gpus"] for row in first["scale"]] == [2**n for n in range(11)]


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--gpus", "3"]) == 2
    assert "3 processes cannot share" in capsys.readouterr().err
    assert main([*RUN, "--link", "nowhere.json"]) == 2
    assert "--link nowhere.json is neither GB/s nor" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*RUN, "--gpu", "abacus"])


def test_a_plan_for_people_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--plot", str(tmp_path / "plan.svg"), "--gpu-memory", "0.001", "memory.lean=true"]) == 0
    said = capsys.readouterr().out
    assert "nothing fits" in said
    assert "does not fit" in said
    assert "<svg" in (tmp_path / "plan.svg").read_text()


def test_a_link_file_has_both_bandwidths(tmp_path: Path) -> None:
    file = tmp_path / "link.json"
    file.write_text(json.dumps({"within_gb_s": 200, "across_gb_s": 12.5}))
    assert read_link(str(file)) == (200, 12.5)
    assert read_link("12.5") == (None, 12.5)
    for text in ("0", "-1"):
        with pytest.raises(ConfigError, match="above 0"):
            read_link(text)
    file.write_text(json.dumps({"within_gb_s": 0, "across_gb_s": 1}))
    with pytest.raises(ConfigError, match="no bandwidth"):
        read_link(str(file))


def test_the_stage_that_exchanges_least_and_fits_is_recommended() -> None:
    config = RunConfig()

    def best(gib: float, precision: str = "fp32", cluster: Cluster = TWO_NODES) -> str | None:
        there = replace(cluster, gib=gib)
        memories = {
            stage: memory(config, SIZES, WORK, there, stage, precision) for stage in stages_of(precision, there)
        }
        return recommended(memories, there)

    assert [best(gib) for gib in (80, 20, 5)] == ["0", "2", None]
    assert best(80, "bf16_weights") == "2"
    assert best(15.7) == "3_hpz"
    assert best(15.7, cluster=replace(TWO_NODES, nodes=1, gpus=16)) == "3"


def test_a_copy_of_the_checkpoint_lies_in_main_memory_and_may_be_left_out() -> None:
    config = RunConfig()
    held = memory(config, SIZES, WORK, TWO_NODES, "2", "fp32")
    assert held["checkpoint_copy"] == pytest.approx(4 * (3 * 10**9 + 10**8) / 16)
    cpu = replace(TWO_NODES, gpu="cpu")
    on_card, on_cpu = (planning.on_device(held, there) for there in (TWO_NODES, cpu))
    assert on_cpu - on_card == held["checkpoint_copy"]
    config.checkpoint.background = False
    assert memory(config, SIZES, WORK, TWO_NODES, "2", "fp32")["checkpoint_copy"] == 0


def test_more_gpus_pay_while_each_still_works() -> None:
    config = RunConfig()
    config.train.global_batch = 16
    rows = scaled(config, SIZES, WORK, replace(TWO_NODES, gpus=1, across=1e9))
    assert [row["global_batch"] for row in rows[:5]] == [16, 16, 16, 16, 32]
    assert rows[0]["hours"] == pytest.approx(8 * rows[3]["hours"], rel=0.1)
    for row in rows:
        assert row["steps"] * row["global_batch"] == pytest.approx(40_000 * 16, rel=0.01)
    assert pays_up_to(rows) == 1024
    slow = scaled(config, SIZES, WORK, replace(TWO_NODES, gpus=1, across=1))
    assert pays_up_to(slow) == 1


def test_a_cpu_is_timed() -> None:
    block, update = calibrate(config_with("data.crop=64x64", "train.micro_batch=1"), processes=1)
    assert 0 < update < block < 60


def test_a_run_that_will_hardly_fit_is_told() -> None:
    launch = Launch.from_environment(launch_environment(Path("configs/accelerate/multinode_zero3.yaml")))
    assert (launch.world_size, launch.local_world_size, launch.zero_stage) == (16, 8, 3)
    assert Launch.from_environment(launch_environment(Path("configs/accelerate/node8_ddp.yaml"))).zero_stage is None
    config = config_with("data.crop=64x64")
    assert does_not_fit(config, launch, gib=80) is None
    told = does_not_fit(config, launch, gib=0.1)
    assert told is not None
    assert "GiB a GPU (" in told
    assert "which has 0.1" in told
