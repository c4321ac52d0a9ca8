"""From what the launcher asked for to an engine.

Faults of accelerate and DeepSpeed that are avoided here, each measured:

* ``accelerator.backward`` under DeepSpeed also steps, so DeepSpeed's own ``backward`` and ``step`` are called.
* DeepSpeed clips at 1.0 when nothing is said, so it is told 0; clipping is the engine's own.
* DeepSpeed's step at ZeRO-0 does not refuse a non-finite gradient, so the engine steps there itself.
* A resident ZeRO-3 parameter would hide the teacher's update, so nothing is kept resident (threshold 0).
* DeepSpeed compiles a shared-memory kernel for inference at the first start, 55 s and a stale lock after a kill;
  it is switched off.
* Under torch_autocast DeepSpeed exchanges gradients in bf16 unless it is told of no module that may be, so it is.
* Several processes without a distributed type train apart in silence; that start is refused.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DeepSpeedPlugin

from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.arithmetic import set_fp32_math
from mfm_dist.distributed.bf16_engine import BF16Engine
from mfm_dist.distributed.cuda_graph import GraphEngine
from mfm_dist.distributed.deepspeed_engine import DeepSpeedEngine, Zero0Engine
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.launch import Launch, combination_problems, device_problems, graph_problems, launch_problems
from mfm_dist.distributed.trackers import tracker_problems
from mfm_dist.errors import ConfigError

BUCKET = 50_000_000
"""Elements exchanged at a time. DeepSpeed's default for reducing, ten times as many, holds 2 GB in fp32 (0.19.8)."""
EXCHANGES_RECORDED = 2000
"""Exchanges that torch's flight recorder keeps of each rank; in memory, some hundred bytes each."""


def start_engine(config: RunConfig, *, exchange_seconds: float = 0.0) -> Engine:
    """Set up this process as the launcher asked.

    Args:
        exchange_seconds: after which an exchange between ranks fails; 0 for the library's own limit, 10 minutes on
            GPUs. The watchdog names who hangs, so its own should come first.

    Raises:
        ConfigError: for a launch that is refused, a world size that the global batch does not fit, or a tracker that
            is not installed.
    """
    launch = Launch.from_environment()
    problems = [
        *launch_problems(),
        *combination_problems(config, launch),
        *config.world_problems(launch.world_size),
        *device_problems(launch, torch.cuda.device_count()),
        *graph_problems(config, launch, torch.cuda.device_count()),
        *tracker_problems(config),
    ]
    if problems:
        raise ConfigError(problems)
    on_cpu = launch.use_cpu or not torch.cuda.device_count()
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(config.train.threads)
    elif "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # images of several sizes leave holes that nothing fits into
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False

    set_fp32_math(config.train.fp32_math)
    # NCCL and gloo read this as they start: a rank that hangs leaves its last exchanges beside its stacks (watchdog).
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(EXCHANGES_RECORDED))

    exchange: dict[str, Any] = {"timeout": timedelta(seconds=exchange_seconds)} if exchange_seconds else {}
    if launch.zero_stage is None:
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        handlers: list[Any] = [ddp, InitProcessGroupKwargs(**exchange)]
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
        engine = (GraphEngine if config.train.cuda_graph else Engine)(accelerator, config)
    else:
        # The launcher lists the fields of its file here, and the plugin refuses a configuration beside any of them.
        # launch_problems has read what they say.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, launch))
        if on_cpu:
            import deepspeed  # not at the top: it looks at DS_ACCELERATOR, and takes seconds

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            exchange["backend"] = "gloo"
        handlers = [InitProcessGroupKwargs(**exchange)]
        accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no", kwargs_handlers=handlers)
        kind = BF16Engine if config.train.precision == "bf16_weights" else DeepSpeedEngine
        engine = (Zero0Engine if launch.zero_stage == 0 else kind)(accelerator, config)
    if engine.world_size != launch.world_size:
        raise ConfigError(
            f"the launcher started {launch.world_size} processes that do not know of each other (distributed_type NO "
            "or MULTI_CPU): use distributed_type MULTI_GPU, which is DDP on CPUs too, or DEEPSPEED"
        )
    return engine


def deepspeed_config(config: RunConfig, launch: Launch) -> dict[str, Any]:
    """Write DeepSpeed's whole configuration: stage and speed from the launcher, everything mathematical from the run.

    Clipping is the engine's own, so DeepSpeed's is off; left out, it would clip at 1.0 (0.19.8).
    """
    # memory.lean and ZeRO-0: the engine adds up all backwards of a step, for DeepSpeed they are one micro-batch.
    adds_up_itself = config.memory.lean or launch.zero_stage == 0
    ds_config: dict[str, Any] = {
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
        "timers": {"throughput": {"enabled": False}},  # on a GPU it waits for the device, twice a step
    }
    if config.train.precision == "bf16_weights":
        ds_config["bf16"] = {"enabled": True}
        ds_config["data_types"] = {"grad_accum_dtype": "fp32"}
    else:
        ds_config["torch_autocast"] = {
            "enabled": config.train.precision == "bf16",
            "dtype": "bfloat16",
            # DeepSpeed would reduce the gradients of every Linear and convolution in bf16, and gather them so (0.19.8).
            "lower_precision_safe_modules": [],
        }
    if config.memory.offload_optimizer:
        pinned = torch.cuda.is_available()
        ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        ds_config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW, the same numbers as without offloading
    return ds_config
