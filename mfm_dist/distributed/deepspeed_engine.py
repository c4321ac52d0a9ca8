"""The engine over DeepSpeed ZeRO 1 to 3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfm_dist.batch import UDABatch
from mfm_dist.distributed.engine import Engine, Piece
from mfm_dist.errors import ConfigError


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
        self._leaf_check = LeafCheck(module)
        self._check_gradients()

    def forward_backward(self, batch: UDABatch, mfm_weight: float, measure: bool = False) -> dict[str, Tensor]:
        if self.config.memory.lean and self._pending == 0:
            # One exchange of gradients for all backwards of the step. Without it every backward would exchange, and
            # ZeRO-3 would silently add to an old gradient where a later one is the first to touch a parameter.
            self._exchange.enter_context(self._wrapped.coalesce_grad_reduction())  # type: ignore[operator]
        try:
            losses = super().forward_backward(batch, mfm_weight, measure)
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
        self._leaf_check.after_backward()

    def parameter_pieces(self, parameter: nn.Parameter) -> list[Piece]:
        return _filled([self._local_piece(parameter)]) if self._is_stage_3 else super().parameter_pieces(parameter)

    def optimizer_pieces(self, parameter: nn.Parameter) -> dict[str, list[Piece]]:
        keys = sorted({key for state in self._base.state.values() for key in state if key != "step"})
        return {key: self._local_shards(parameter, key) for key in keys}

    def update_teacher(self, decay: Tensor) -> None:
        super().update_teacher(decay)
        self._drop_copies(teacher for _, teacher in self._teacher_pairs)

    @torch.no_grad()
    def set_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        flat = whole.flatten()
        if self._is_stage_3:
            place, piece = self._local_piece(parameter)
            piece.copy_(flat[place])
        else:
            parameter.data.copy_(whole)
        for place, master in self._local_shards(parameter):
            master.copy_(flat[place])
        self._drop_copies([parameter])

    @property
    def replicates_parameters(self) -> bool:
        return not self._is_stage_3

    def params_out_of_sync(self) -> list[str]:
        unlike = []
        for name, parameter in self.module.named_parameters():
            for place, master in self._local_shards(parameter):
                whole = self.replicates_parameters
                own = parameter.data.flatten()[place] if whole else self._local_piece(parameter)[1]
                if not torch.equal(own, master.to(own)):
                    unlike.append(name)
        return unlike

    def reset_optimizer(self, keys: Iterable[str], applied: int) -> None:
        self._base.state.clear()
        if applied == 0:  # the base optimiser makes its state at its first step, if it finds none
            return
        for shard in self._flat_shards():
            state = {key: torch.zeros_like(shard.data) for key in keys}
            if self._counts_steps:
                state["step"] = self._step_count(applied, shard.device)
            self._base.state[shard] = state

    @torch.no_grad()
    def set_optimizer_state(self, parameter: nn.Parameter, key: str, whole: Tensor, applied: int) -> None:  # noqa: ARG002
        for place, own in self._local_shards(parameter, key):
            own.copy_(whole.flatten()[place])

    def _to_wrap(self, module: nn.Module) -> nn.Module:
        """Return what DeepSpeed is given in the module's place."""
        return module

    def _finish_backward(self) -> None:
        self._exchange.close()

    def _gradients_by_part(self) -> dict[str, list[Tensor]]:
        zero: Any = self.optimizer
        parts: dict[str, list[Tensor]] = {group["part"]: [] for group in zero.param_groups}
        for index, (group, shard, _) in enumerate(self._stepped()):
            held = [shard.grad] if self.config.memory.offload_optimizer else zero.averaged_gradients[index]
            parts[group["part"]].extend(gradient for gradient in held if gradient is not None)
        return parts

    def _stepped(self) -> Iterator[tuple[Mapping[str, Any], Tensor, Mapping[str, Tensor]]]:
        zero: Any = self.optimizer
        for index, shard in enumerate(self._flat_shards()):
            group = zero.param_groups[zero.sub_group_to_group_id[index] if self._is_stage_3 else index]
            yield group, shard, self._base.state.get(shard, {})

    @property
    def replicates_gradients(self) -> bool:
        return False

    def _update(self, good: Tensor, gradients: Sequence[Tensor]) -> None:
        zero: Any = self.optimizer
        if self.config.memory.offload_optimizer and not bool(good):
            # With offloading DeepSpeed judges by notes taken during the backward, not by the gradients themselves.
            zero.local_overflow = True
            zero.norm_for_param_grads = {key: torch.tensor(torch.inf) for key in zero.norm_for_param_grads}
        self._wrapped.step()  # type: ignore[operator]
        if not self._wrapped.was_step_applied():  # type: ignore[operator]
            # Its buffers are used again, and their padding is never written: no NaN may stay there.
            torch._foreach_zero_(list(gradients))

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
        """Return the fp32 tensors that the base optimiser steps: one a group at ZeRO 1 and 2, one a sub-group at 3."""
        if self._is_stage_3:
            return list(self.optimizer.fp32_partitioned_groups_flat)  # type: ignore[attr-defined]
        return list(self.optimizer.single_partition_of_fp32_groups)  # type: ignore[attr-defined]

    @property
    def _is_stage_3(self) -> bool:
        return hasattr(self.optimizer, "fp32_partitioned_groups_flat")

    def _drop_copies(self, parameters: Iterable[nn.Parameter]) -> None:
        """Have the second copies that hpZ keeps within a node made again from the shards, which were written to.

        DeepSpeed gathers a parameter from such a copy where there is one, and renews it for what its own optimiser
        stepped alone (0.19.8): a teacher would stay where it was without a word.
        """
        for parameter in parameters:
            if getattr(parameter, "ds_secondary_tensor", None) is not None:
                parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]

    def _local_piece(self, parameter: nn.Parameter) -> Piece:
        """Return ZeRO-3's piece of a parameter: its place in the flat whole, and the piece without padding."""
        shard: Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
        first = self.rank * shard.numel()
        count = max(0, min(shard.numel(), parameter_shape(parameter).numel() - first))
        return slice(first, first + count), shard.narrow(0, 0, count)

    def _local_shards(self, parameter: nn.Parameter, key: str | None = None) -> list[Piece]:
        """Return this rank's piece of a trained parameter: its place in the flat whole and its fp32 master, if any.

        With a key the optimiser's tensor of that name instead of the master.

        Not by DeepSpeed's ``safe_*_full_optimizer_state`` (0.19.8). At ZeRO 1 and 2 it links the state of all groups
        after the first group's first step, when the others have none yet, and fails for them. At ZeRO-3 setting a
        parameter that the world size does not divide reads past its end on the last rank, which dies there.
        """
        zero: Any = self.optimizer
        if not parameter.requires_grad:
            return []
        if self._is_stage_3:
            index, start, _ = zero.grad_position[zero.get_param_id(parameter)]
            place, _ = self._local_piece(parameter)
            shard = zero.fp32_partitioned_groups_flat[index]
        elif (fragment := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            inside, start = fragment.lp_fragment_address, fragment.hp_fragment_address.start
            place = slice(inside.start, inside.start + inside.numel)
            shard = zero.single_partition_of_fp32_groups[fragment.param_group_index]
        else:
            return []
        count = place.stop - place.start
        if count == 0:
            return []
        held = shard.data if key is None else self._base.state[shard][key]
        return [(place, held.narrow(0, start, count))]


def _filled(pieces: Iterable[Piece]) -> list[Piece]:
    """Leave out pieces of nothing."""
    return [(place, values) for place, values in pieces if values.numel()]


class LeafCheck:
    """Watches that what a launch file names as leaf modules can be such: ZeRO-3 then gathers the weights of all layers
    in them at once, with one hook for many, and exchanges their gradients when it has seen the gradient of their input.

    DeepSpeed itself fails, or waits for ever, where a leaf runs twice before a backward, and where no gradient comes to
    its input (0.19.8).
    """

    def __init__(self, module: nn.Module) -> None:
        self._ran: set[str] = set()
        for name, leaf in module.named_modules():
            if getattr(leaf, "_z3_leaf", False) and any(p.requires_grad for p in leaf.parameters()):
                leaf.register_forward_pre_hook(partial(self._look, name), prepend=True)

    def after_backward(self) -> None:
        """Let every leaf run once more."""
        self._ran.clear()

    def _look(self, name: str, leaf: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Look at a leaf that is about to run.

        Raises:
            ConfigError: on every rank, for all run alike.
        """
        if not torch.is_grad_enabled():
            return
        kind = f"leaf_module of the launch's DeepSpeed file: {name} ({type(leaf).__name__})"
        if name in self._ran:
            raise ConfigError(
                f"{kind} runs twice before a backward. That suits blocks of an encoder whose images are encoded in one "
                "call (train.encode_once) and of the Rebuilder where it runs once, or memory.lean=true; take its class "
                "out of leaf_module"
            )
        if not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            raise ConfigError(
                f"{kind} is the first that trains: without a gradient of its input ZeRO-3 exchanges none of it; take "
                "its class out of leaf_module, or train what comes before it (model.freeze, model.lora)"
            )
        self._ran.add(name)


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter; under ZeRO-3 the tensor itself is empty between uses."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


class Zero0Engine(Engine):
    """ZeRO-0: DeepSpeed exchanges the gradients, and the update is this engine's own.

    DeepSpeed's own step at this stage lets a non-finite gradient into the weights and reports no norm (0.19.8).
    """

    def prepare(self, module: nn.Module, optimizer: Optimizer) -> None:
        self.module, self.optimizer = module, optimizer
        self._wrapped, _ = self.accelerator.prepare(module, optimizer)
        self._check_gradients()

    def backward(self, loss: Tensor) -> None:
        self._wrapped.backward(loss / self.accumulation)  # type: ignore[operator]

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # DeepSpeed's

    def _sync_context(self, *, exchange: bool) -> AbstractContextManager[Any]:
        self._wrapped.set_gradient_accumulation_boundary(exchange)  # type: ignore[operator]
        return nullcontext()
