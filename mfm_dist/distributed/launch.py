"""What the launcher decided: how many processes, on what, at which ZeRO stage. Everything mathematical is the run's.

``accelerate launch`` hands its decisions over in environment variables; what they say is read here alone (``train``
only looks whether there are any, beside which ``--zero`` means nothing). A launch that decides more, or what cannot
work, is refused: ``start.start_engine`` raises the problems that are found here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mfm_dist.config.schema import RunConfig
from mfm_dist.config.shipped import find_shipped
from mfm_dist.errors import CorruptFileError
from mfm_dist.storage import read_json

ZERO_SETTINGS = frozenset({
    "stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
    "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "zero_hpz_partition_size", "leaf_module",
})  # fmt: skip
"""What a DeepSpeed file of the launcher may set: how ZeRO exchanges and what it holds, never what it computes."""
NOT_THESE = {
    "round_robin_gradients": "it deals the parameters out to the ranks in another order than DeepSpeed's own map of "
    "them says (0.19.8), so checkpoints would hold the optimiser's state of other parameters"
}
"""Settings that look like those above and are not, with the reason."""


GPU_VARIABLES = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")
"""Set by Slurm for a job that has GPUs."""


@dataclass(frozen=True)
class Launch:
    """Facts of this process's start, before anything distributed is set up."""

    world_size: int
    rank: int
    zero_stage: int | None
    """DeepSpeed's ZeRO stage, None without DeepSpeed."""
    zero_settings: Mapping[str, Any] = field(default_factory=dict)
    """``zero_optimization`` of the launcher's DeepSpeed file, if there is one."""
    local_world_size: int = 1
    """Processes on this machine."""
    use_cpu: bool = False
    """Whether the launch file asks for the CPU."""
    launcher: Literal["torchrun", "accelerate"] | None = None
    """Who started this process: torchrun (which ``accelerate launch`` calls for several), or accelerate, for one."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read the variables that torchrun and ``accelerate launch`` set."""
        deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        settings = _zero_settings(environment)[0] if deepspeed else {}
        named = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        stage = int(settings.get("stage", named)) if deepspeed else None
        launcher: Literal["torchrun", "accelerate"] | None = None
        if "TORCHELASTIC_RUN_ID" in environment:
            launcher = "torchrun"
        elif "ACCELERATE_USE_CPU" in environment:
            launcher = "accelerate"
        return cls(
            world_size=int(environment.get("WORLD_SIZE", "1")),
            rank=int(environment.get("RANK", "0")),
            zero_stage=stage,
            zero_settings=settings,
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
            use_cpu=environment.get("ACCELERATE_USE_CPU", "false").lower() == "true",
            launcher=launcher,
        )


def launch_problems(environment: Mapping[str, str] = os.environ) -> list[str]:
    """List what a launch file says that the run's configuration decides, or that is known to train wrongly."""
    problems = []
    for variable, neutral, key in (
        ("MIXED_PRECISION", "no", "train.precision"),
        ("GRADIENT_ACCUMULATION_STEPS", "1", "train.global_batch and train.micro_batch"),
        ("GRADIENT_CLIPPING", "none", "train.clip_norm"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none", "memory.offload_optimizer"),
        ("DYNAMO_BACKEND", "no", "train.compile"),
    ):
        if (value := environment.get(f"ACCELERATE_{variable}", neutral)).lower() != neutral:
            entry = variable.removeprefix("DEEPSPEED_").lower()
            problems.append(f"the launch file sets {entry}: {value}; leave it out, {key} of the run decides it")
    problems += _zero_settings(environment)[1]
    if (device := environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")).lower() != "none":
        problems.append(
            f"the launch file sets offload_param_device: {device}; parameters cannot be offloaded: leave it out "
            "(memory.lean, memory.checkpoint_backbone and memory.offload_optimizer save memory, too)"
        )
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if environment.get(variable, "false").lower() == "true":
            problems.append(f"{name} is not supported: use DDP (distributed_type: MULTI_GPU) or DeepSpeed ZeRO 1 to 3")
    return problems


def device_problems(
    launch: Launch, visible: int, environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> list[str]:
    """Say so where GPUs are asked for or there, and not enough can be used: the CPU would train without a word.

    One process on a machine with no GPU and no sign of one trains on the CPU. Several have to be told: by a launch file
    that is for the CPU (``cpu_*.yaml``), or by ``CUDA_VISIBLE_DEVICES`` without a GPU in it.

    Args:
        visible: GPUs that torch sees.
        devices: where the driver shows them.
    """
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    none_wanted = chosen is not None and all(device.strip() in ("", "-1") for device in chosen.split(","))
    if launch.use_cpu or none_wanted or visible >= launch.local_world_size:
        return []
    signs = [str(path) for path in sorted(devices.glob("nvidia[0-9]*"))]
    signs += [f"{name}={environment[name]}" for name in GPU_VARIABLES if environment.get(name, "0") not in ("", "0")]
    signs += [f"CUDA_VISIBLE_DEVICES={chosen}"] if chosen else []
    if not visible and signs:
        return [
            f"there are signs of a GPU ({', '.join(signs)}), and torch sees none: look at nvidia-smi "
            "and at the driver. To train on the CPU, set CUDA_VISIBLE_DEVICES= (empty)"
        ]
    if launch.world_size == 1:
        return []
    here = f"{launch.local_world_size} process{'es' * (launch.local_world_size > 1)} on this machine"
    return [
        f"the launch starts {here}, one a GPU, and torch sees {visible} GPU{'s' * (visible != 1)}: start as many "
        "processes as there are GPUs (--num_processes N). To train on the CPU, launch with "
        "configs/accelerate/cpu_*.yaml, or set CUDA_VISIBLE_DEVICES= (empty)"
    ]


def combination_problems(config: RunConfig, launch: Launch) -> list[str]:
    """List what the run asks for and this launch cannot do right, each with what to use."""
    problems = []
    if config.train.precision == "bf16_weights" and launch.zero_stage not in (2, 3):
        problems.append(
            "train.precision=bf16_weights needs ZeRO-2 or 3, which keep the fp32 weights that a bf16 optimiser step "
            "would lose: launch with configs/accelerate/*_zero2.yaml or *_zero3.yaml, or use bf16, which is autocast"
        )
    if config.memory.offload_optimizer and launch.zero_stage not in (1, 2, 3):
        problems.append("memory.offload_optimizer needs ZeRO 1 to 3: choose such a launch file, or turn it off")
    if config.train.compile and launch.zero_stage == 3:
        problems.append(
            "train.compile under ZeRO-3: DeepSpeed's hooks on every layer would cut what is compiled into single "
            "layers, which takes minutes and gains nothing: launch with DDP, ZeRO-1 or 2, or set train.compile=false"
        )
    if config.train.cuda_graph and launch.zero_stage is not None:
        problems.append(
            "train.cuda_graph under ZeRO: DeepSpeed works in Python amid forward and backward, which a graph does not "
            "replay: launch without DeepSpeed (configs/accelerate/gpu_single.yaml), or set train.cuda_graph=false"
        )
    return [*problems, *_hpz_problems(launch)]


def graph_problems(config: RunConfig, launch: Launch, visible: int) -> list[str]:
    """Say so where ``train.cuda_graph`` has no GPU.

    Args:
        visible: GPUs that torch sees.
    """
    if config.train.cuda_graph and (launch.use_cpu or not visible):
        return ["train.cuda_graph needs a GPU, and this launch has none: set train.cuda_graph=false"]
    return []


def _hpz_problems(launch: Launch) -> list[str]:
    """Say what is wrong with the processes among which hpZ keeps a second copy of the weights, a node's as a rule."""
    size = launch.zero_settings.get("zero_hpz_partition_size", 1)
    if type(size) is not int or size < 1:
        return [f"zero_hpz_partition_size={size!r} is no number of processes: give those of one node"]
    if size > 1 and launch.zero_stage != 3:
        return [f"zero_hpz_partition_size={size} needs ZeRO-3, this launch has {launch.zero_stage}: leave it out"]
    if launch.world_size % size:
        fitting = [str(n) for n in range(1, launch.world_size + 1) if launch.world_size % n == 0]
        return [
            f"zero_hpz_partition_size={size} does not divide the {launch.world_size} processes of this launch: give as "
            f"many as each node has ({', '.join(fitting)} would do), or leave it out"
        ]
    return []


def _zero_settings(environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Read ``zero_optimization`` of the DeepSpeed file that a launch file names, and what is wrong with it."""
    name = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if name is None:
        return {}, []
    try:
        content = read_json(find_shipped(Path(name)))
        settings = dict(content.pop("zero_optimization"))
        stage = int(settings["stage"])
    except (OSError, CorruptFileError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        return {}, [f"deepspeed_config_file={name} does not give zero_optimization with a stage ({what})"]
    problems = [
        f"{name} sets {key!r}: leave it out, {NOT_THESE.get(key, 'the configuration of the run decides it')}"
        for key in (*content, *sorted(set(settings) - ZERO_SETTINGS))
    ]
    if "leaf_module" in settings and stage != 3:
        problems.append(f"{name}: leaf_module is of ZeRO-3, and the stage is {stage}: leave it out")
    if stage not in range(4):
        problems.append(f"{name}: zero_optimization.stage={stage}, there are 0, 1, 2 and 3")
    return settings, problems
