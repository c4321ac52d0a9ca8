"""The engine over DeepSpeed ZeRO 1 to 3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine, StepResult
from mfm_dist.distributed.launch import Launch
from mfm_dist.errors import ConfigError


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
        if applied == 0:  # the base optimiser makes its state at its first step, if it finds none
            return
        if self._is_stage_3:
            raise ConfigError(
                "a run cannot be resumed under ZeRO-3 yet (one rank fails in the first steps); its checkpoints go on "
                "under ZeRO 1 or 2, DDP or one process: choose another launch file"
            )
        states = list(states)
        keys = {key for _, tensors in states for key in tensors}
        for shard in self._flat_shards():
            state = {key: torch.zeros_like(shard.data) for key in keys}
            if self._counts_steps:
                state["step"] = torch.tensor(float(applied))
            self._base.state[shard] = state
        for parameter, tensors in states:
            for key, value in tensors.items():
                self._set_state(parameter, key, value.to(self.device))

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _sync_context(self) -> AbstractContextManager[Any]:
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
