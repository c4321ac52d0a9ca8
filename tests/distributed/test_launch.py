"""Launches that are refused, each with the reason; and bf16 under the real engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_dist.checkpoint.files import read_checkpoint
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.launch import Launch, combination_problems, device_problems, launch_problems
from mfm_dist.distributed.launcher import choose_zero, launch_environment
from mfm_dist.distributed.start import deepspeed_config
from mfm_dist.errors import ConfigError
from mfm_dist.train import main
from tests.helpers.runs import DEFAULTS, run_python, run_train, tiny_overrides

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def test_a_plain_start_has_no_problem() -> None:
    assert launch_problems({}) == []
    assert launch_problems({**DEEPSPEED, "ACCELERATE_MIXED_PRECISION": "no"}) == []
    assert launch_problems({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}) == []
    assert Launch.from_environment({**DEEPSPEED, "WORLD_SIZE": "4", "RANK": "3"}) == Launch(4, 3, 2)
    assert Launch.from_environment({}) == Launch(1, 0, None)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train.precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.global_batch"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "train.clip_norm"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "missing.json", "does not give zero_optimization with a stage"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "memory.offload_optimizer"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "parameters cannot be offloaded"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile"),
    ],
)
def test_what_a_launch_file_must_not_say(variable: str, value: str, told: str) -> None:
    (problem,) = launch_problems({**DEEPSPEED, variable: value})
    assert told in problem


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("num_processes: auto", "num_processes and num_machines have to be numbers"),
        ("num_processes:", "num_processes and num_machines have to be numbers"),
        ("num_machines: 0", "num_processes and num_machines have to be numbers"),
        ("{distributed_type: DEEPSPEED, deepspeed_config: zero2}", "has to hold zero_stage"),
        (
            "{distributed_type: DEEPSPEED, deepspeed_config: {zero_stage: two}}",
            "zero_stage=two, there are 0, 1, 2 and 3",
        ),
        ("dynamo_config: INDUCTOR", "leave dynamo_config out"),
    ],
)
def test_a_launch_file_that_is_none_is_told(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_text(content)
    with pytest.raises(ConfigError, match=told):
        launch_environment(tmp_path / "launch.yaml")


def test_a_launch_file_without_a_stage_has_the_one_of_accelerate(tmp_path: Path) -> None:
    for content in ("", "{zero_stage: , gradient_clipping: }"):
        (tmp_path / "launch.yaml").write_text(f"{{distributed_type: DEEPSPEED, deepspeed_config: {content}}}")
        environment = launch_environment(tmp_path / "launch.yaml")
        assert Launch.from_environment(environment).zero_stage == 2
        assert launch_problems(environment) == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("mixed_precision: bf16", "train.precision"),
        ("dynamo_backend: INDUCTOR", "train.compile"),
        ("dynamo_config: {dynamo_backend: INDUCTOR}", "train.compile"),
        ("distributed_type: FSDP", "FSDP is not supported"),
        ("distributed_type: MEGATRON_LM", "Megatron-LM is not supported"),
        ("{distributed_type: DEEPSPEED, deepspeed_config: {gradient_clipping: 1.0}}", "train.clip_norm"),
        ("{distributed_type: DEEPSPEED, deepspeed_config: {gradient_accumulation_steps: 4}}", "train.global_batch"),
        (
            "{distributed_type: DEEPSPEED, deepspeed_config: {offload_optimizer_device: cpu}}",
            "memory.offload_optimizer",
        ),
        ("{distributed_type: DEEPSPEED, deepspeed_config: {offload_param_device: cpu}}", "cannot be offloaded"),
        ("{distributed_type: DEEPSPEED, deepspeed_config: {deepspeed_config_file: no.json}}", "zero_optimization"),
    ],
)
def test_what_a_launch_file_must_not_say_is_found_before_any_process_starts(
    content: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "launch.yaml").write_text(content)
    (problem,) = launch_problems(launch_environment(tmp_path / "launch.yaml"))
    assert told in problem
    (tmp_path / "launch.yaml").write_text("{mixed_precision: no, distributed_type: MULTI_GPU, num_processes: 2}")
    assert launch_problems(launch_environment(tmp_path / "launch.yaml")) == []


@pytest.mark.parametrize("entry", ["{zero_stage: 3, gradient_clipping: 1.0}", "{deepspeed_config_file: ds.json}"])
def test_a_launch_file_is_read_as_accelerate_reads_it(entry: str, tmp_path: Path) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    file = tmp_path / "launch.yaml"
    file.write_text(
        f"compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\ndeepspeed_config: {entry}\n"
        "mixed_precision: bf16\nnum_processes: 2\nnum_machines: 1\nmachine_rank: 0\nuse_cpu: false\n"
    )
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, handed_over = prepare_deepspeed_cmd_env(arguments)
    ours = {name: value.lower() for name, value in launch_environment(file).items() if name in handed_over}
    assert {name: handed_over[name].lower() for name in ours} == ours
    assert {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"} < set(ours)


def test_a_deepspeed_file_may_say_how_fast_but_not_what(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "overlap_comm": True}}))
    assert launch_problems(environment) == []
    launch = Launch.from_environment(environment)
    assert launch.zero_stage == 3
    told = deepspeed_config(RunConfig(), launch)
    assert told["zero_optimization"]["overlap_comm"] is True
    assert told["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert told["gradient_clipping"] == 0.0, "left out, DeepSpeed would clip at 1.0"

    file.write_text(json.dumps({"bf16": {}, "zero_optimization": {"stage": 2, "offload_optimizer": {}}}))
    assert [problem.split(":")[0] for problem in launch_problems(environment)] == [
        f"{file} sets 'bf16'",
        f"{file} sets 'offload_optimizer'",
    ]
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    (problem,) = launch_problems(environment)
    assert "checkpoints would hold the optimiser's state of other parameters" in problem

    for stage, refused in ((2, ["leaf_module is of ZeRO-3"]), (3, [])):
        file.write_text(json.dumps({"zero_optimization": {"stage": stage, "leaf_module": {"classes": ["Block"]}}}))
        assert [problem.split(": ")[1].split(",")[0] for problem in launch_problems(environment)] == refused


def test_what_a_launch_cannot_do_right_is_refused_with_the_way_out() -> None:
    config = RunConfig()
    config.train.precision = "bf16_weights"
    config.memory.offload_optimizer = True
    for stage in (None, 0):
        bf16, offload = combination_problems(config, Launch(2, 0, stage))
        assert "bf16_weights needs ZeRO-2 or 3" in bf16
        assert "memory.offload_optimizer needs ZeRO 1 to 3" in offload
    assert len(combination_problems(config, Launch(2, 0, 1))) == 1
    assert combination_problems(config, Launch(2, 0, 3)) == []
    config.train.compile = True
    assert combination_problems(config, Launch(2, 0, 2)) == []
    (compiled,) = combination_problems(config, Launch(2, 0, 3))
    assert "train.compile under ZeRO-3" in compiled


@pytest.mark.parametrize(
    ("size", "world_size", "stage", "told"),
    [
        (2, 4, 3, None),
        (1, 3, 2, None),
        (2, 3, 3, r"does not divide the 3 processes .*\(1, 3 would do\)"),
        (8, 4, 3, r"does not divide the 4 processes"),
        (2, 4, 2, "needs ZeRO-3, this launch has 2"),
        (0, 4, 3, "is no number of processes"),
        ("2", 4, 3, "is no number of processes"),
    ],
)
def test_hpz_needs_a_stage_and_a_world_that_it_divides(
    size: Any, world_size: int, stage: int, told: str | None
) -> None:
    launch = Launch(world_size, 0, stage, {"stage": stage, "zero_hpz_partition_size": size})
    problems = combination_problems(RunConfig(), launch)
    assert bool(problems) == bool(told)
    assert all(re.search(told or "", problem) for problem in problems)


def test_a_gpu_that_cannot_be_used_is_no_reason_to_train_on_the_cpu(tmp_path: Path) -> None:
    def problems(
        visible: int = 0, *, world: int = 1, local: int = 1, use_cpu: bool = False, **environment: str
    ) -> list[str]:
        launch = Launch(world, 0, None, local_world_size=local, use_cpu=use_cpu)
        return device_problems(launch, visible, environment, tmp_path)

    assert problems() == []
    assert problems(SLURM_GPUS_ON_NODE="0") == []
    (of_slurm,) = problems(SLURM_GPUS_ON_NODE="8")
    assert "SLURM_GPUS_ON_NODE=8" in of_slurm
    assert "set CUDA_VISIBLE_DEVICES= (empty)" in of_slurm
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    (broken,) = problems()
    assert f"signs of a GPU ({tmp_path / 'nvidia0'})" in broken
    assert problems(1) == problems(use_cpu=True) == problems(CUDA_VISIBLE_DEVICES="") == []
    (tmp_path / "nvidia0").unlink()

    (of_gpu_single,) = problems(CUDA_VISIBLE_DEVICES="0")  # its gpu_ids
    assert "signs of a GPU (CUDA_VISIBLE_DEVICES=0)" in of_gpu_single
    (of_node8,) = problems(world=8, local=8)
    assert "starts 8 processes on this machine, one a GPU, and torch sees 0 GPUs" in of_node8
    assert "cpu_*.yaml" in of_node8
    (of_multinode,) = problems(world=2, local=1)
    assert "starts 1 process on this machine" in of_multinode
    (too_many,) = problems(1, world=2, local=2, SLURM_GPUS_ON_NODE="2")
    assert "torch sees 1 GPU: start as many" in too_many
    assert problems(2, world=2, local=2) == problems(8, world=16, local=8) == []
    assert problems(world=2, local=2, CUDA_VISIBLE_DEVICES="-1,-1") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_the_launch_file_for_a_gpu_is_refused_without_one(scenes: Path, tmp_path: Path) -> None:
    """Its ``gpu_ids`` reach the process, whatever was said before. Every test of several ranks starts a cpu_* file."""
    completed = run_train(["--launch", "configs/accelerate/gpu_single.yaml", *tiny_overrides(scenes, tmp_path / "run")])
    assert completed.returncode == 2
    assert "signs of a GPU (CUDA_VISIBLE_DEVICES=0), and torch sees none" in completed.stderr
    assert "Traceback" not in completed.stderr


def test_zero_exchanges_the_gradients_of_autocast_in_fp32() -> None:
    """Told of no module that may be exchanged in bf16, DeepSpeed marks none; told nothing, all layers."""
    config = RunConfig()
    config.train.precision = "bf16"
    told = deepspeed_config(config, Launch(1, 0, 2))["torch_autocast"]
    assert told == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def test_a_global_batch_that_does_not_fit_is_refused(scenes: Path, tmp_path: Path) -> None:
    """The launch file is the shipped one, for nothing is in the working folder; the exit code is the ranks' own."""
    started_with = ["--launch", "configs/accelerate/cpu_ddp.yaml"]
    settings = [*tiny_overrides(scenes, tmp_path / "run"), "train.global_batch=6"]
    completed = run_train([*started_with, *settings], cwd=tmp_path)
    assert completed.returncode == 2
    assert completed.stderr.count("which 2 processes cannot share evenly: use 1, 3 processes") == 1
    assert "Traceback" not in completed.stderr


def test_a_launch_file_that_is_not_there_is_told_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--launch", "configs/accelerate/cpu_zero4.yaml"]) == 2
    told = capsys.readouterr().err
    assert "configs/accelerate/cpu_zero4.yaml: no such launch file" in told
    assert "configs/accelerate/cpu_zero3.yaml" in told


@pytest.mark.parametrize("launch", [None, "cpu_zero2"])
def test_bf16_trains_on_fp32_weights(launch: str | None, scenes: Path, tmp_path: Path) -> None:
    completed = run_train([*tiny_overrides(scenes, tmp_path / "run"), "train.precision=bf16"], launch=launch)
    assert completed.returncode == 0, completed.stderr[-3000:]
    student = read_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000004").tensors("student")
    assert {t.dtype for t in student.values() if t.is_floating_point()} == {torch.float32}
    losses = [json.loads(line)["loss/total"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < loss < 20 for loss in losses)


def test_bf16_weights_are_saved_in_fp32_and_go_on_at_another_stage(scenes: Path, tmp_path: Path) -> None:
    """Half a run under ZeRO-2, the rest under ZeRO-3: what is saved is the fp32 master, and nothing else is needed."""
    run = tmp_path / "run"
    arguments = [*tiny_overrides(scenes, run), "train.precision=bf16_weights"]
    for launch, steps in (("cpu_zero2", 4), ("cpu_zero3", 6)):
        completed = run_train([*arguments, f"train.steps={steps}", "checkpoint.keep=9"], launch=launch)
        assert completed.returncode == 0, completed.stderr[-3000:]
    for step in (4, 6):
        for part in ("student", "teacher", "rebuilder"):
            tensors = read_checkpoint(run / "checkpoints" / f"step_{step:08d}").tensors(part)
            weights = {name: t for name, t in tensors.items() if "running_" not in name and "num_batches" not in name}
            assert {t.dtype for t in weights.values()} == {torch.float32}
            rounded = sum(int((t.bfloat16().float() == t).sum()) for t in weights.values())
            assert rounded < 0.5 * sum(t.numel() for t in weights.values()), f"{part} went through bf16"
    losses = [json.loads(line)["loss/total"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert all(0 < loss < 20 for loss in losses)
    assert "eval mode, bf16," in json.loads((run / "eval" / "step_00000000.json").read_text())["protocol"]


def test_torchrun_starts_ranks_at_a_stage_and_the_first_record_says_what_the_start_took(
    scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [*DEFAULTS, *tiny_overrides(scenes, run), "train.steps=2"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = run_python([*torchrun, "-m", "mfm_dist.train", "--zero", "3", *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "training in 2 processes, CPU" in done.stdout
    first, second = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    told = {key.removeprefix("start_seconds/"): value for key, value in first.items() if "start_seconds/" in key}
    assert list(told) == ["imports", "rendezvous", "data and networks", "engine", "first_batch"]
    assert all(0 <= seconds < 240 for seconds in told.values())
    assert not any("start_seconds/" in key for key in second)


def test_a_stage_for_torchrun_is_read_like_that_of_a_launch_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    assert Launch.from_environment().zero_stage is None
    choose_zero(1)
    assert (Launch.from_environment().zero_stage, Launch.from_environment().zero_settings) == (1, {})
    choose_zero(3)
    assert Launch.from_environment().zero_stage == 3
    assert Launch.from_environment().zero_settings["stage3_prefetch_bucket_size"] == 50_000_000
    assert launch_problems() == []


def test_a_stage_beside_a_launch_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--zero", "2", "--launch", "configs/accelerate/cpu_zero2.yaml"])
    assert "the launch file says the ZeRO stage already" in capsys.readouterr().err
