"""The engine over DeepSpeed ZeRO 1 to 3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfm_dist.batch import UDABatch
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine, StepResult
from mfm_dist.distributed.launch import Launch


class DeepSpeedEngine(Engine):
    """ZeRO 1 to 3. DeepSpeed owns autocast, gradient exchange, clipping and the check for non-finite gradients."""

    def prepare(self, module: nn.Module, optimizer: Optimizer) -> None:
        base_rates = [group["base_lr"] for group in optimizer.param_groups]
        self.module = module
        self._exchange = ExitStack()
        self._wrapped, prepared = self.accelerator.prepare(module, optimizer)
        self.optimizer = prepared.optimizer  # DeepSpeed's own, below accelerate's wrapper
        for group, rate in zip(self.optimizer.param_groups, base_rates, strict=True):
            assert group["base_lr"] == rate, "DeepSpeed reordered the parameter groups"
        self._check_gradients()

    def micro_batch(self, batch: UDABatch, mfm_weight: float) -> dict[str, Tensor]:
        if self.config.memory.lean and self._pending == 0:
            # One exchange of gradients for all backwards of the step. Without it every backward would exchange, and
            # ZeRO-3 would silently keep the last gradient alone of a parameter that some of them do not touch.
            self._exchange.enter_context(self._wrapped.coalesce_grad_reduction())  # type: ignore[operator]
        try:
            losses = super().micro_batch(batch, mfm_weight)
        except BaseException:
            # Python leaves the block above on the way out, and with gradients to exchange it would wait there for the
            # other ranks, which do not come: the process could not end.
            self.module.zero_grad(set_to_none=True)
            raise
        if not self.config.memory.lean and self._pending < self.accumulation:
            self._wrapped.step()  # type: ignore[operator] # counts micro-batches, and so finds the last one
        return losses

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the accumulation that it was told.
        self._wrapped.backward(loss / self.accumulation if self.config.memory.lean else loss)  # type: ignore[operator]

    def step(self) -> StepResult:
        assert self._pending == self.accumulation, "step() belongs after the last micro-batch of a step"
        self._pending = 0
        self._exchange.close()
        self._wrapped.step()  # type: ignore[operator]
        norm = self._wrapped.get_global_grad_norm()  # type: ignore[operator]
        return StepResult(applied=self._wrapped.was_step_applied(), grad_norm=float(norm))  # type: ignore[operator]

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().clone()

    @property
    def replicates_parameters(self) -> bool:
        return not self._is_stage_3

    def unlike_master(self) -> list[str]:
        unlike = []
        for name, parameter in self.module.named_parameters():
            for place, shard, start in self._own_piece(parameter):
                master = shard.data.narrow(0, start, place.stop - place.start)
                whole = self.replicates_parameters
                own = parameter.data.flatten()[place] if whole else self._local_piece(parameter)[0]
                if not torch.equal(own.float(), master):
                    unlike.append(name)
        return unlike

    def _local_piece(self, parameter: nn.Parameter) -> tuple[Tensor, slice]:
        """ZeRO-3: this rank's piece of a parameter without its padding, and where in the flat whole it belongs."""
        shard: Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
        first = self.rank * shard.numel()
        count = max(0, min(shard.numel(), parameter_numel(parameter) - first))
        return shard.narrow(0, 0, count), slice(first, first + count)

    def optimizer_state(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        keys = sorted({key for state in self._base.state.values() for key in state if key != "step"})
        return {key: self._full_state(parameter, key) for key in keys}

    def load_optimizer_state(self, states: Iterable[tuple[nn.Parameter, Mapping[str, Tensor]]], applied: int) -> None:
        if applied == 0:  # the base optimiser makes its state at its first step, if it finds none
            return
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

    def _sync_context(self, *, exchange: bool) -> AbstractContextManager[Any]:  # noqa: ARG002 - DeepSpeed decides
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
        whole = torch.zeros(parameter_numel(parameter), device=self.device)
        for place, shard, start in self._own_piece(parameter):
            whole[place] = self._base.state[shard][key].narrow(0, start, place.stop - place.start)
        return self.sum(whole).view(parameter_shape(parameter))

    def _set_state(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        for place, shard, start in self._own_piece(parameter):
            self._base.state[shard][key].narrow(0, start, place.stop - place.start).copy_(whole.flatten()[place])

    def _own_piece(self, parameter: nn.Parameter) -> Iterator[tuple[slice, Tensor, int]]:
        """Where in the flat whole this rank's piece of a parameter belongs, its fp32 shard and place in it; or nothing.

        Not by DeepSpeed's ``safe_*_full_optimizer_state`` (0.19.8). At ZeRO 1 and 2 it links the state of all groups
        after the first group's first step, when the others have none yet, and fails for them. At ZeRO-3 setting a
        parameter that the world size does not divide reads past its end on the last rank, which dies there.
        """
        zero: Any = self.optimizer
        if not parameter.requires_grad:
            return
        if self._is_stage_3:
            index, start, _ = zero.grad_position[zero.get_param_id(parameter)]
            _, place = self._local_piece(parameter)
            if place.stop > place.start:
                yield place, zero.fp32_partitioned_groups_flat[index], start
        elif (fragment := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            inside, flat = fragment.lp_fragment_address, fragment.hp_fragment_address
            shard = zero.single_partition_of_fp32_groups[fragment.param_group_index]
            yield slice(inside.start, inside.start + inside.numel), shard, flat.start


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter; under ZeRO-3 the tensor itself is empty between uses."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def parameter_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter."""
    return parameter_shape(parameter).numel()


def deepspeed_config(config: RunConfig, launch: Launch) -> dict[str, Any]:
    """The whole of DeepSpeed's configuration; the stage is the launcher's, the rest follows from the run's."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        # memory.lean: the engine adds up all backwards of a step by itself, for DeepSpeed they are one micro-batch.
        "gradient_accumulation_steps": 1 if config.memory.lean else config.blocks_per_step // launch.world_size,
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
