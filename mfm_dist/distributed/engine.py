"""Forward, backward and step over one process, DDP or DeepSpeed ZeRO: the only user of accelerate and deepspeed.

Faults of these libraries that are avoided here, each measured:

* ``accelerator.backward`` under DeepSpeed also steps, so DeepSpeed's own ``backward`` and ``step`` are called.
* DeepSpeed clips at 1.0 when nothing is said, so the clip is always said.
* A resident ZeRO-3 parameter would hide the teacher's update, so nothing is kept resident (threshold 0).
* DeepSpeed compiles a shared-memory kernel for inference at the first start, 55 s and a stale lock after a kill;
  it is switched off.
* Several processes without a distributed type train apart in silence; that start is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from torch.optim import Optimizer

from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.launch import Launch, launch_problems
from mfm_dist.errors import ConfigError


@dataclass(frozen=True)
class StepResult:
    """What became of one optimiser step."""

    applied: bool
    """False when a gradient was not finite: the weights are then as before."""
    grad_norm: float
    """Global norm of the gradient before clipping."""


class Engine:
    """Runs one process. ``DeepSpeedEngine`` below replaces what DeepSpeed does itself."""

    def __init__(self, accelerator: Accelerator, config: RunConfig) -> None:
        self.config = config
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.accumulation = config.blocks_per_step // self.world_size
        """Micro-batches that this rank runs in one step."""
        self.module: nn.Module
        self.optimizer: Optimizer
        self._pending = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def prepare(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Wrap the module for training. Call once."""
        self.module = module.to(self.device)
        self.optimizer = optimizer
        self._wrapped: nn.Module = self.accelerator.prepare_model(self.module)
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]

    def forward(self, *inputs: Any) -> Any:
        """The wrapped module's forward, under the precision of the run."""
        self._pending += 1
        with self._autocast():
            return self._wrapped(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch; ranks exchange them after the last one of the step."""
        with self._sync_context():
            (loss / self.accumulation).backward()

    def step(self) -> StepResult:
        """Clip, update, clear. A gradient that is not finite on any rank leaves the weights alone on all."""
        assert self._pending == self.accumulation, "step() belongs after the last micro-batch of a step"
        self._pending = 0
        limit = self.config.train.clip_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self._parameters, limit, foreach=True))
        applied = norm < float("inf")
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(applied=applied, grad_norm=norm)

    def set_learning_rates(self, factor: float) -> None:
        """Give every parameter group its own base rate times ``factor``."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def mean(self, values: Tensor) -> Tensor:
        """Element-wise mean over ranks, the same on all."""
        return self._reduced(values, dist.ReduceOp.SUM) / self.world_size

    def maximum(self, values: Tensor) -> Tensor:
        """Element-wise maximum over ranks, the same on all."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks, the same on all."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def gather_objects(self, value: Any) -> list[Any]:
        """A small Python object of every rank, on every rank, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """A whole parameter, wherever its pieces are. Collective."""
        return parameter.detach()

    def optimizer_state(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        """The optimiser's whole tensors for one parameter (not its step count); empty before step 1. Collective."""
        state = self.optimizer.state.get(parameter, {})
        return {key: value for key, value in state.items() if key != "step" and isinstance(value, Tensor)}

    def load_optimizer_state(self, states: Iterable[tuple[nn.Parameter, Mapping[str, Tensor]]], applied: int) -> None:
        """Put back what ``optimizer_state`` gave, after ``prepare``. ``applied`` is the optimiser's step count."""
        for parameter, tensors in states:
            state: dict[str, Any] = {key: value.to(parameter.device) for key, value in tensors.items()}
            if self._counts_steps:
                state["step"] = torch.tensor(float(applied))
            self.optimizer.state[parameter] = state

    @property
    def _counts_steps(self) -> bool:
        return self.config.optim.name == "adamw"

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        values = values.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(values, op=operation)
        return values

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.train.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _sync_context(self) -> AbstractContextManager[Any]:
        last = self._pending == self.accumulation
        if last or self.world_size == 1:
            return nullcontext()
        return self._wrapped.no_sync()  # type: ignore[operator]


class DeepSpeedEngine(Engine):
    """ZeRO 1 to 3. DeepSpeed owns autocast, gradient exchange, clipping and the check for non-finite gradients."""

    def prepare(self, module: nn.Module, optimizer: Optimizer) -> None:
        base_rates = [group["base_lr"] for group in optimizer.param_groups]
        self.module = module
        self._wrapped, prepared = self.accelerator.prepare(module, optimizer)
        self.optimizer = prepared.optimizer  # DeepSpeed's own, below accelerate's wrapper
        for group, rate in zip(self.optimizer.param_groups, base_rates, strict=True):
            assert group["base_lr"] == rate, "DeepSpeed reordered the parameter groups"

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the accumulation itself and notices the last micro-batch by counting steps.
        self._wrapped.backward(loss)  # type: ignore[operator]
        if self._pending < self.accumulation:
            self._wrapped.step()  # type: ignore[operator]

    def step(self) -> StepResult:
        assert self._pending == self.accumulation, "step() belongs after the last micro-batch of a step"
        self._pending = 0
        self._wrapped.step()  # type: ignore[operator]
        norm = self._wrapped.get_global_grad_norm()  # type: ignore[operator]
        return StepResult(applied=self._wrapped.was_step_applied(), grad_norm=float(norm))  # type: ignore[operator]

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().clone()

    def optimizer_state(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        keys = sorted({key for state in self._base.state.values() for key in state if key != "step"})
        return {key: self._full_state(parameter, key) for key in keys}

    def load_optimizer_state(self, states: Iterable[tuple[nn.Parameter, Mapping[str, Tensor]]], applied: int) -> None:
        for shard in self._flat_shards():
            # The base optimiser would make its state at its first step only.
            self._base.state[shard] = {"step": torch.tensor(float(applied))} if self._counts_steps else {}
        for parameter, tensors in states:
            for key, value in tensors.items():
                self._set_state(parameter, key, value.to(self.device))

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @property
    def _base(self) -> Optimizer:
        """torch's optimiser below ZeRO's, which steps flat shards."""
        base: Optimizer = self.optimizer.optimizer  # type: ignore[attr-defined]
        return base

    def _flat_shards(self) -> list[Tensor]:
        """The fp32 tensors that the base optimiser steps: one a group at ZeRO 1 and 2, one a sub-group at 3."""
        if self._is_stage_3:
            return list(self.optimizer.fp32_partitioned_groups_flat)  # type: ignore[attr-defined]
        return list(self.optimizer.single_partition_of_fp32_groups)  # type: ignore[attr-defined]

    @property
    def _is_stage_3(self) -> bool:
        return hasattr(self.optimizer, "fp32_partitioned_groups_flat")

    def _full_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """One optimiser tensor of one parameter, put together from the ranks' pieces. Collective."""
        if self._is_stage_3:
            from deepspeed.utils import safe_get_full_optimizer_state

            whole: Tensor = safe_get_full_optimizer_state(parameter, key)
            return whole
        whole = torch.zeros(parameter.numel(), device=self.device)
        for place, piece in self._own_piece(parameter, key):
            whole[place] = piece
        return self.sum(whole).view_as(parameter)

    def _set_state(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        for shard in self._flat_shards():
            self._base.state[shard].setdefault(key, torch.zeros_like(shard.data))
        if self._is_stage_3:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(parameter, whole, key)
            return
        for place, piece in self._own_piece(parameter, key):
            piece.copy_(whole.flatten()[place])

    def _own_piece(self, parameter: nn.Parameter, key: str) -> Iterator[tuple[slice, Tensor]]:
        """Where in the flat parameter this rank's piece of an optimiser tensor belongs, and the piece; or nothing.

        Not by ``safe_get_full_optimizer_state``: at ZeRO 1 and 2 it links the state of all parameter groups after the
        first group's first step, when the others have none yet, and then fails for them (DeepSpeed 0.19.8).
        """
        fragment = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is None:
            return
        shard = self.optimizer.single_partition_of_fp32_groups[fragment.param_group_index]  # type: ignore[attr-defined]
        inside, flat = fragment.lp_fragment_address, fragment.hp_fragment_address
        piece = self._base.state[shard][key].narrow(0, flat.start, flat.numel)
        yield slice(inside.start, inside.start + inside.numel), piece


def start_engine(config: RunConfig) -> Engine:
    """Set up this process as the launcher asked.

    Raises:
        ConfigError: for a launch that is refused, or a world size that the global batch does not fit.
    """
    launch = Launch.from_environment()
    problems = [*launch_problems(), *config.world_problems(launch.world_size)]
    if problems:
        raise ConfigError(problems)
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(config.train.threads)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False

    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if launch.zero_stage is None:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
        engine = Engine(accelerator, config)
    else:
        # The launcher lists the fields of its file here, and the plugin refuses a configuration beside any of them.
        # launch_problems has read what they say.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, launch))
        _switch_off_inference_kernel()
        backend = [InitProcessGroupKwargs(backend="gloo")] if on_cpu else []
        accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no", kwargs_handlers=backend)
        engine = DeepSpeedEngine(accelerator, config)
    if engine.world_size != launch.world_size:
        raise ConfigError(
            f"the launcher started {launch.world_size} processes that do not know of each other (distributed_type NO "
            "or MULTI_CPU): use distributed_type MULTI_GPU, which is DDP on CPUs too, or DEEPSPEED"
        )
    return engine


def deepspeed_config(config: RunConfig, launch: Launch) -> dict[str, Any]:
    """The whole of DeepSpeed's configuration; the stage is the launcher's, the rest follows from the run's."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.blocks_per_step // launch.world_size,
        "gradient_clipping": config.train.clip_norm,
        "zero_optimization": {
            "stage": launch.zero_stage,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": config.train.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**12,
    }


def _switch_off_inference_kernel() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
