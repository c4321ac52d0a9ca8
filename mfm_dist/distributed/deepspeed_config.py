"""What DeepSpeed is told: the stage and the knobs of speed by the launcher, everything mathematical by the run."""

from __future__ import annotations

from typing import Any

import torch

from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.launch import Launch

BUCKET = 50_000_000
"""Elements exchanged at a time. DeepSpeed's default for reducing, ten times as many, holds 2 GB in fp32 (0.19.8)."""


def deepspeed_config(config: RunConfig, launch: Launch) -> dict[str, Any]:
    """The whole of DeepSpeed's configuration.

    Clipping is the engine's own, so DeepSpeed's is off; left out, it would clip at 1.0 (0.19.8).
    """
    # memory.lean and ZeRO-0: the engine adds up all backwards of a step, for DeepSpeed they are one micro-batch.
    adds_up_itself = config.memory.lean or launch.zero_stage == 0
    told: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": 1 if adds_up_itself else config.blocks_per_step // launch.world_size,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            # Overlapping the exchange with the backward pass needs several GPUs to be tried.
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            **launch.zero_settings,
            "stage": launch.zero_stage,
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }
    if config.train.precision == "bf16_weights":
        told["bf16"] = {"enabled": True}
        told["data_types"] = {"grad_accum_dtype": "fp32"}
    else:
        told["torch_autocast"] = {"enabled": config.train.precision == "bf16", "dtype": "bfloat16"}
    if config.memory.offload_optimizer:
        pinned = torch.cuda.is_available()
        told["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        told["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW, the same numbers as without offloading
    return told
