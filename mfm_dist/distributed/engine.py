"""Forward, backward and step over one process or plain DDP; ``deepspeed_engine`` is the same over ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from mfm_dist.batch import UDABatch
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.gradient_check import GradientCheck
from mfm_dist.errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class StepResult:
    """What became of one optimiser step."""

    applied: bool
    """False when a gradient was not finite: the weights are then as before."""
    grad_norm: float
    """Global norm of the gradient before clipping."""


class Engine:
    """One process or DDP. ``DeepSpeedEngine`` replaces what DeepSpeed does itself."""

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
        self._gradient_check: GradientCheck | None = None

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
        self._check_gradients()

    def micro_batch(self, batch: UDABatch, mfm_weight: float) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; its gradients are added to those of the step.

        With ``memory.lean`` the terms of the loss follow one another, each with a backward of its own, which frees
        its activations before the next one starts.

        Returns:
            the module's losses by name, ``total`` among them, detached.
        """
        self._pending += 1
        terms = cast(Sequence[str], self.module.term_names) if self.config.memory.lean else [None]
        losses: dict[str, Tensor] = {"total": torch.zeros((), device=self.device)}
        inputs = None
        for term in terms:
            with self._sync_context(exchange=self._pending == self.accumulation and term == terms[-1]):
                with self._autocast():
                    output = self._wrapped(batch, mfm_weight, term, inputs)
                self.backward(output.total)
            losses |= {**output.losses, "total": losses["total"] + output.total.detach()}
            inputs = output.inputs
        if self._gradient_check is not None:
            self._gradient_check.after_micro_batch()
        return losses

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to those of the step, which is the mean over its micro-batches."""
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

    def gather(self, values: Tensor) -> Tensor:
        """The values of every rank, on every rank: [world size, *shape], in order of rank."""
        if self.world_size == 1:
            return values[None]
        everyone = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(everyone, values.contiguous())
        return torch.stack(everyone)

    def gather_objects(self, value: Any) -> list[Any]:
        """A small Python object of every rank, on every rank, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def agreed(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` on this rank; if it fails for a user's mistake on any rank, fail on all. Collective."""
        own: UserError | None = None
        try:
            result = work()
        except UserError as error:
            own = error
        errors = [error for error in self.gather_objects(own) if error is not None]
        if errors:
            raise own or errors[0]
        return result

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

    @property
    def replicates_parameters(self) -> bool:
        """Whether every rank holds every parameter whole."""
        return True

    def unlike_master(self) -> list[str]:
        """Names of the parameters that differ from the copy of them that the optimiser steps, on this rank."""
        return []

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

    def _check_gradients(self) -> None:
        if self.config.debug.check_gradients:
            self._gradient_check = GradientCheck(self.module)

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

    def _sync_context(self, *, exchange: bool) -> AbstractContextManager[Any]:
        """DDP decides in the forward whether the backward that follows will exchange gradients: this spans both."""
        if exchange or self.world_size == 1:
            return nullcontext()
        return self._wrapped.no_sync()  # type: ignore[operator]
