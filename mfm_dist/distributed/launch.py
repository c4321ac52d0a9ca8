"""What the launcher decided: how many processes, on what, at which ZeRO stage. Everything mathematical is the run's.

``accelerate launch`` hands its decisions over in environment variables; this file is the only reader of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Launch:
    """Facts of this process's start, before anything distributed is set up."""

    world_size: int
    rank: int
    zero_stage: int | None
    """DeepSpeed's ZeRO stage, None without DeepSpeed."""
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
        stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")) if deepspeed else None
        launcher: Literal["torchrun", "accelerate"] | None = None
        if "TORCHELASTIC_RUN_ID" in environment:
            launcher = "torchrun"
        elif "ACCELERATE_USE_CPU" in environment:
            launcher = "accelerate"
        return cls(
            world_size=int(environment.get("WORLD_SIZE", "1")),
            rank=int(environment.get("RANK", "0")),
            zero_stage=stage,
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
            use_cpu=environment.get("ACCELERATE_USE_CPU", "false").lower() == "true",
            launcher=launcher,
        )


def launch_problems(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What a launch file says that the run's configuration decides, or that is known to train wrongly."""
    problems = []
    stands_in_config = {
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", ("no",), "train.precision"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "gradient_accumulation_steps",
            ("1",),
            "train.global_batch and train.micro_batch",
        ),
        "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", ("none",), "train.clip_norm"),
    }
    for variable, (field, neutral, key) in stands_in_config.items():
        value = environment.get(variable, neutral[0])
        if value.lower() not in neutral:
            problems.append(f"the launch file sets {field}: {value}; leave it out, {key} of the run decides it")
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environment:
        problems.append(
            "the launch file names a deepspeed_config_file; give zero_stage instead, the rest is written here"
        )
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if environment.get(variable, "false").lower() == "true":
            problems.append(f"{name} is not supported: use DDP (distributed_type: MULTI_GPU) or DeepSpeed ZeRO 1 to 3")
    if Launch.from_environment(environment).zero_stage == 0:
        problems.append(
            "zero_stage: 0 lets a non-finite gradient into the weights, reports no gradient norm and cannot put off "
            "its exchange of gradients, which memory.lean needs; it shards nothing, so use DDP "
            "(configs/accelerate/cpu_ddp.yaml) or ZeRO 1 to 3"
        )
    return problems
