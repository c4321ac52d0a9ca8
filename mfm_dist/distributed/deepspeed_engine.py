"""The engine over DeepSpeed ZeRO 1 to 3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfm_dist.batch import UDABatch
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.gradients import part_of


class DeepSpeedEngine(Engine):
    """ZeRO 1 to 3. DeepSpeed owns autocast, gradient exchange and the refusal of non-finite gradients."""

    def prepare(self, module: nn.Module, optimizer: Optimizer) -> None:
        base_rates = [group["base_lr"] for group in optimizer.param_groups]
        self.module = module
        self._exchange = ExitStack()
        self._wrapped, prepared = self.accelerator.prepare(self._to_wrap(module), optimizer)
        self.optimizer = prepared.optimizer  # DeepSpeed's own, below accelerate's wrapper
        for group, rate in zip(self.optimizer.param_groups, base_rates, strict=True):
            assert group["base_lr"] == rate, "DeepSpeed reordered the parameter groups"
        # ZeRO-3 would go on using a copy that it keeps resident, and never see what the EMA writes into the shard.
        resident = [name for name, p in module.named_parameters() if getattr(p, "ds_persist", False)]
        if resident:
            raise RuntimeError(f"DeepSpeed keeps parameters resident, e.g. {resident[0]}: the EMA would not reach them")
        self._check_gradients()

    def micro_batch(self, batch: UDABatch, mfm_weight: float) -> dict[str, Tensor]:
        if self.config.memory.lean and self._pending == 0:
            # One exchange of gradients for all backwards of the step. Without it every backward would exchange, and
            # ZeRO-3 would silently add to an old gradient where a later one is the first to touch a parameter.
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

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().clone()

    @torch.no_grad()
    def set_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        flat = whole.flatten()
        if self._is_stage_3:
            piece, place = self._local_piece(parameter)
            piece.copy_(flat[place])
        else:
            parameter.data.copy_(whole)
        for place, shard, start in self._own_piece(parameter):
            shard.data.narrow(0, start, place.stop - place.start).copy_(flat[place])

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
                if not torch.equal(own, master.to(own)):
                    unlike.append(name)
        return unlike

    def optimizer_state(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        keys = sorted({key for state in self._base.state.values() for key in state if key != "step"})
        return {key: self._assembled(parameter, key) for key in keys}

    def load_optimizer_state(self, states: Iterable[tuple[nn.Parameter, Mapping[str, Tensor]]], applied: int) -> None:
        if applied == 0:  # the base optimiser makes its state at its first step, if it finds none
            self._base.state.clear()
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
                for place, shard, start in self._own_piece(parameter):
                    own = self._base.state[shard][key].narrow(0, start, place.stop - place.start)
                    own.copy_(value.flatten()[place])

    def _to_wrap(self, module: nn.Module) -> nn.Module:
        """What DeepSpeed is given in the module's place."""
        return module

    def _finish_backward(self) -> None:
        self._exchange.close()

    def _gradients_by_part(self) -> dict[str, list[Tensor]]:
        zero: Any = self.optimizer
        parts: dict[str, list[Tensor]] = {part_of(group["name"]): [] for group in zero.param_groups}
        for index, shard in enumerate(self._flat_shards()):
            group = zero.param_groups[zero.sub_group_to_group_id[index] if self._is_stage_3 else index]
            held = [shard.grad] if self.config.memory.offload_optimizer else zero.averaged_gradients[index]
            parts[part_of(group["name"])].extend(gradient for gradient in held if gradient is not None)
        return parts

    @property
    def replicates_gradients(self) -> bool:
        return False

    def _update(self, factors: Tensor) -> bool:
        zero: Any = self.optimizer
        if self.config.memory.offload_optimizer and not bool(torch.isfinite(factors).all()):
            # With offloading DeepSpeed judges by notes taken during the backward, not by the gradients themselves.
            zero.local_overflow = True
            zero.norm_for_param_grads = {key: torch.tensor(torch.inf) for key in zero.norm_for_param_grads}
        self._wrapped.step()  # type: ignore[operator]
        return bool(self._wrapped.was_step_applied())  # type: ignore[operator]

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

    def _assembled(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """One optimiser tensor of one parameter, or with ``key=None`` its fp32 master, from all ranks' pieces."""
        whole = torch.zeros(parameter_shape(parameter).numel(), device=self.device)
        for place, shard, start in self._own_piece(parameter):
            held = shard.data if key is None else self._base.state[shard][key]
            whole[place] = held.narrow(0, start, place.stop - place.start).to(self.device)
        return self.sum(whole).view(parameter_shape(parameter))

    def _local_piece(self, parameter: nn.Parameter) -> tuple[Tensor, slice]:
        """ZeRO-3: this rank's piece of a parameter without its padding, and where in the flat whole it belongs."""
        shard: Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
        first = self.rank * shard.numel()
        count = max(0, min(shard.numel(), parameter_shape(parameter).numel() - first))
        return shard.narrow(0, 0, count), slice(first, first + count)

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
