"""The training step without this package's engine: plain PyTorch, torch's own DDP, and DeepSpeed by hand.

The twins that the engine is timed against, no example to follow: they keep no norms, let a non-finite gradient pass
where torch or DeepSpeed does, and know nothing of resume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mfm_dist.batch import UDABatch
from mfm_dist.build import build_train_module, classes_without_data
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.launch import Launch
from mfm_dist.distributed.start import deepspeed_config
from mfm_dist.distributed.teacher import local_tensor
from mfm_dist.optim import build_optimizer
from mfm_dist.schedules import ema_decay_at, mfm_weight
from mfm_dist.train_module import TrainModule


@dataclass(frozen=True)
class Loop:
    """One way to train."""

    step: Callable[[Sequence[UDABatch]], None]
    """One optimiser step of this rank's micro-batches."""
    save: Callable[[Path, int], None]
    """Saves all weights and the optimiser's state below a folder, under a number. Collective."""


def bare_loop(config: RunConfig, device: torch.device, world_size: int) -> Loop:
    """Build plain PyTorch's loop; for several processes below torch's DDP, set up as the engine does it."""
    module = build_train_module(config, classes_without_data(config)).to(device)
    optimizer = build_optimizer(module, config.optim)
    parameters = [p for p in module.parameters() if p.requires_grad]
    limit = config.train.clip_norm or float("inf")
    weight = mfm_weight(0, config.mfm)
    average = ema(module, config)
    wrapped: Any = module
    if world_size > 1:
        wrapped = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    def step(batches: Sequence[UDABatch]) -> None:
        for batch in batches:
            with nullcontext() if world_size == 1 or batch is batches[-1] else wrapped.no_sync():
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16"):
                    output = wrapped(batch.to(device), weight)
                (output.total / len(batches)).backward()
        nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average()

    def save(folder: Path, number: int) -> None:
        if world_size == 1 or dist.get_rank() == 0:
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / f"bare_{number}.pt")

    return Loop(step, save)


def deepspeed_loop(config: RunConfig, device: torch.device) -> Loop:
    """Call DeepSpeed by hand, told the same as by the engine but for the clipping, which is its own here."""
    import deepspeed

    module = build_train_module(config, classes_without_data(config))
    told = deepspeed_config(config, Launch.from_environment()) | {"gradient_clipping": config.train.clip_norm}
    wrapped, *_ = deepspeed.initialize(model=module, optimizer=build_optimizer(module, config.optim), config=told)
    weight = mfm_weight(0, config.mfm)
    average = ema(module, config)

    def step(batches: Sequence[UDABatch]) -> None:
        for batch in batches:
            wrapped.backward(wrapped(batch.to(device), weight).total)
            wrapped.step()
        average()

    def save(folder: Path, number: int) -> None:
        wrapped.save_checkpoint(str(folder), tag=f"deepspeed_{number}")

    return Loop(step, save)


def ema(module: TrainModule, config: RunConfig) -> Callable[[], None]:
    """Move the teacher after a step."""
    updates = count(1)
    pairs = list(module.teacher_pairs())

    def update() -> None:
        decay = float(ema_decay_at(next(updates), config.self_training.ema_decay))
        # Asked for each time: DeepSpeed may have moved the tensors.
        torch._foreach_lerp_([local_tensor(t) for _, t in pairs], [local_tensor(s) for s, _ in pairs], 1.0 - decay)

    return update if pairs else lambda: None
