"""Forward, backward and step over one process or plain DDP; ``deepspeed_engine`` is the same over ZeRO."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from mfm_dist.batch import UDABatch
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.clipping import Ceilings, clip_factors, is_good, sum_of_squares
from mfm_dist.distributed.running_statistics import KeptStatistics
from mfm_dist.distributed.teacher import update_teacher
from mfm_dist.errors import UserError

Result = TypeVar("Result")
Piece = tuple[slice, Tensor]
"""A place in a flattened tensor, and the values that belong there."""


class HostCopy:
    """Numbers on their way from the device to the host. Reading them waits for what came before them alone."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._arrived = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """Return the numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers


@dataclass(frozen=True)
class StepResult:
    """What became of one optimiser step. All of it is on the device, but for what is on its way from there."""

    applied: Tensor
    """Bool; False when the loss or a gradient was not finite or above its ceiling: the weights are then as before."""
    verdict: HostCopy
    """[1 + n]: ``applied``, and how many ranks set each of the flags that ``step`` was given."""
    loss: Tensor
    """Mean over all micro-batches of the step, the same on every rank."""
    grad_norms: dict[str, Tensor]
    """Norm of the gradient before clipping, by part (encoder, decoder, Rebuilder) and ``total``."""
    map_norms: Tensor
    """[2], norm of the gradient at the encoder's last map, of the method's own terms and of lambda * L_mfm; 0 where the
    step did not measure it."""


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
        self._loss = torch.zeros((), device=self.device)
        """Sum over this rank's micro-batches of the step."""
        self._gradient_check: GradientCheck | None = None
        self.applied = torch.zeros((), dtype=torch.float64, device=self.device)
        """Updates applied so far, those before a resume included."""
        self._was_applied = torch.ones((), dtype=torch.bool, device=self.device)
        """Whether the last one was."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def prepare(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Wrap the module for training. Call once."""
        self.module = module.to(self.device)
        if self.device.type == "cuda":
            # As maps lie: cuDNN would turn every weight round at every call. Not under ZeRO, which keeps weights flat.
            self.module.to(memory_format=torch.channels_last)
        self.optimizer = optimizer
        self._wrapped: nn.Module = self._wrap(self.module)
        self._check_gradients()

    def _wrap(self, module: nn.Module) -> nn.Module:
        """Return what runs in the module's place: DDP around it, where there are several ranks."""
        wrapped: nn.Module = self.accelerator.prepare_model(module)
        return wrapped

    def forward_backward(self, batch: UDABatch, mfm_weight: float, measure: bool = False) -> dict[str, Tensor]:
        """Run forward and backward of one micro-batch, adding its gradients to those of the step.

        With ``memory.lean`` the terms of the loss follow one another, each with a backward of its own, which frees
        its activations before the next one starts.

        Args:
            measure: also measure what ``TrainModule.forward`` does then.

        Returns:
            the module's losses by name, ``total`` among them, and what was measured, detached.
        """
        if self._pending == 0:
            self._statistics.keep()
        self._pending += 1
        losses = self._micro_batch(batch, mfm_weight, measure)
        self._loss = self._loss + losses["total"]
        if self._gradient_check is not None:
            self._gradient_check.after_micro_batch()
        return losses

    def _micro_batch(self, batch: UDABatch, mfm_weight: float, measure: bool, inputs: Any = None) -> dict[str, Tensor]:
        """Run forward and backward of one micro-batch, or of what was prepared of it; return what is logged of it."""
        terms = cast(Sequence[str], self.module.term_names) if self.config.memory.lean else [None]
        losses: dict[str, Tensor] = {"total": torch.zeros((), device=self.device)}
        for term in terms:
            with self._sync_context(exchange=self._pending == self.accumulation and term == terms[-1]):
                with self._autocast():
                    output = self._wrapped(batch, mfm_weight, term, inputs, measure)
                self.backward(output.total)
            losses |= {**output.losses, **output.measured, "total": losses["total"] + output.total.detach()}
            inputs = output.inputs
        return losses

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to those of the step, which is the mean over its micro-batches."""
        (loss / self.accumulation).backward()

    def step(self, ceilings: Ceilings = Ceilings(), flags: Tensor | None = None) -> StepResult:  # noqa: B008 - frozen
        """Clip, update, clear. With a loss or gradient that is not finite or too large all stays as it was, BatchNorm's
        running statistics too.

        Clipped by ``train.clip_parts`` and ``train.clip_norm`` here, in the same way under every engine. On a GPU
        nothing here waits for the device, but for what DeepSpeed does itself.

        Args:
            flags: [n] float32 on the device, 1 for what this rank has to tell all others; exchanged with the norms. If
                the first one is set on any rank, the step is not applied.
        """
        assert self._pending == self.accumulation, "step() belongs after the last micro-batch of a step"
        self._finish_backward()
        parts = self._gradients_by_part()
        # A gradient that every rank holds whole is counted once.
        share = 1.0 / self.world_size if self.replicates_gradients else 1.0
        squares = [share * sum_of_squares(gradients, self.device) for gradients in parts.values()]
        mean_loss = self._loss / (self.accumulation * self.world_size)
        map_squares = cast(Any, self.module).pop_map_squares()
        flags = torch.zeros(1, device=self.device) if flags is None else flags
        exchanged = self.sum(torch.cat([torch.stack([*squares, mean_loss]), map_squares, flags]))
        norms, loss, map_squares, flags = exchanged.split([len(parts), 1, 2, len(flags)])
        norms, loss = norms.sqrt(), loss.squeeze()
        good = is_good(norms, loss, ceilings) & (flags[0] == 0)
        # A NaN reaches every gradient on every rank, and what is not finite no engine applies.
        factors = torch.where(good, clip_factors(norms, self._part_limits, self.config.train.clip_norm), math.nan)
        for gradients, factor in zip(parts.values(), factors, strict=True):
            if gradients:
                torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        self._pending, self._loss = 0, torch.zeros_like(self._loss)
        self._update(good, [gradient for gradients in parts.values() for gradient in gradients])
        self._statistics.put_back(unless=good)
        self._was_applied = good
        self.applied += good
        return StepResult(
            applied=good,
            verdict=HostCopy(torch.cat([good[None].float(), flags])),
            loss=loss,
            grad_norms={**dict(zip(parts, norms, strict=True)), "total": norms.norm()},
            map_norms=map_squares.sqrt(),
        )

    @cached_property
    def _part_limits(self) -> Tensor:
        """``train.clip_parts`` in the order of the parts; on the device, once."""
        parts = dict.fromkeys(group["part"] for group in self.optimizer.param_groups)
        limits = [float(self.config.train.clip_parts.get(part, 0.0)) or math.inf for part in parts]
        return torch.tensor(limits, device=self.device)

    def update_squares(self, part: str) -> Tensor:
        """Sum squares over what this rank holds of a part of the module, so that sums over ranks are of the whole.

        Returns:
            [3]: of Adam's last direction m / (sqrt(v) + eps), of that times the rate, and of the weights; 0 before the
            first step and under an optimiser without moments.
        """
        squares = torch.zeros(3, device=self.device)
        share = 1.0 / self.world_size if self.replicates_gradients else 1.0
        for group, weight, state in self._stepped():
            if group["part"] == part and "exp_avg_sq" in state:
                steps = float(state["step"])  # which waits for a GPU, where the fused AdamW keeps it
                beta1, beta2 = (1.0 - beta**steps for beta in group["betas"])
                direction = (state["exp_avg"] / beta1) / ((state["exp_avg_sq"] / beta2).sqrt() + group["eps"])
                each = [direction, group["lr"] * direction, weight.detach()]
                squares += share * torch.stack([x.float().square().sum() for x in each]).to(self.device)
        return squares

    def set_learning_rates(self, factor: float) -> None:
        """Give every parameter group its own base rate times ``factor``."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def mean(self, values: Tensor) -> Tensor:
        """Take the element-wise mean over ranks, the same on all."""
        return self._reduced(values, dist.ReduceOp.SUM) / self.world_size

    def maximum(self, values: Tensor) -> Tensor:
        """Take the element-wise maximum over ranks, the same on all."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def sum(self, values: Tensor) -> Tensor:
        """Take the element-wise sum over ranks, the same on all."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def gather(self, values: Tensor) -> Tensor:
        """Gather the values of every rank on every rank: [world size, *shape], in order of rank."""
        if self.world_size == 1:
            return values[None]
        everyone = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(everyone, values.contiguous())
        return torch.stack(everyone)

    def gather_objects(self, value: Any) -> list[Any]:
        """Gather a small Python object of every rank on every rank, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def run_collectively(self, work: Callable[[], Result]) -> Result:
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

    def from_main(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` on rank 0 and give all ranks what came out; a user's mistake is raised on all. Collective."""
        found: Result | None = self.run_collectively(lambda: work() if self.is_main else None)
        return cast(Result, self.gather_objects(found)[0])

    @property
    def environment(self) -> dict[str, Any]:
        """What environment.json says of the processes."""
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {
            "gpus": gpus,
            "world_size": self.world_size,
            "device": str(self.device),
            "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolution": torch.backends.cudnn.allow_tf32},
        }

    @property
    def place(self) -> str:
        """What trains, for people: a GPU that was expected and is not used shows here."""
        on = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        return f"{self.world_size} {'process' if self.world_size == 1 else 'processes'}, {on}"

    @property
    def arithmetic(self) -> str:
        """What training computes in, for people; on a GPU also what it makes of fp32."""
        settings = self.config.train
        of_gpu = "" if self.device.type == "cpu" else f", fp32 as {settings.fp32_math}"
        return settings.precision + of_gpu

    def exchanges(self) -> bytes:
        """Return torch's record of this rank's last exchanges with others, as JSON; nothing of a rank without any."""
        if self.world_size == 1:
            return b""
        recorded: Any = torch._C._distributed_c10d
        trace = recorded._dump_fr_trace_json() if self.device.type == "cpu" else recorded._dump_nccl_trace_json()
        return cast(bytes, trace)

    @contextmanager
    def inference_context(self) -> Iterator[None]:
        """Span forwards outside ``forward_backward``.

        They run uncompiled: each size of image would be compiled by itself, amid an evaluation that the watchdog takes
        to move on; and a score is then the one that mfm-evaluate gives.
        """
        with torch.compiler.set_stance("force_eager") if self.config.train.compile else nullcontext():
            yield

    def mean_on_main(self, values: Tensor) -> Tensor:
        """Take the element-wise mean over ranks, on rank 0 alone; what the others get means nothing."""
        if self.world_size > 1:
            values = values.clone()
            dist.reduce(values, dst=0)
        return values / self.world_size

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @torch.no_grad()
    def update_teacher(self, decay: Tensor) -> None:
        """Average: teacher <- decay * teacher + (1 - decay) * student, parameters only, in fp32.

        After a step that was not applied nothing moves.
        """
        update_teacher(self._teacher_pairs, self._new_share(decay))

    def _new_share(self, decay: Tensor) -> Tensor:
        """Return what the teacher takes from the student: a float32 scalar, 0 after a step that was not applied."""
        return ((1.0 - decay) * self._was_applied).float()

    def parameter_pieces(self, parameter: nn.Parameter) -> list[Piece]:
        """Return what this rank has to save of a parameter in full precision; those of all ranks cover it once.

        They may share memory with what is trained. Nothing is exchanged.
        """
        return self._even_share(parameter)

    def optimizer_pieces(self, parameter: nn.Parameter) -> dict[str, list[Piece]]:
        """Return likewise the optimiser's tensors of a parameter, not its step count; empty before step 1."""
        state = self.optimizer.state.get(parameter, {})
        tensors = {key: value for key, value in state.items() if key != "step" and isinstance(value, Tensor)}
        return {key: self._even_share(value) for key, value in tensors.items()}

    def _even_share(self, whole: Tensor) -> list[Piece]:
        """Return this rank's part of what every rank holds, none where there is less than one element for it."""
        length = -(-whole.numel() // self.world_size)
        place = slice(self.rank * length, min((self.rank + 1) * length, whole.numel()))
        return [(place, whole.detach().flatten()[place])] if place.start < place.stop else []

    @torch.no_grad()
    def set_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Set a parameter from its whole, in full precision, after ``prepare``."""
        parameter.copy_(whole)

    @property
    def replicates_parameters(self) -> bool:
        """Whether every rank holds every parameter whole."""
        return True

    def params_out_of_sync(self) -> list[str]:
        """List the parameters that differ from the copy of them that the optimiser steps, on this rank."""
        return []

    def reset_optimizer(self, keys: Iterable[str], applied: int) -> None:  # noqa: ARG002 - DeepSpeed's shards need both
        """Forget the optimiser's state, before ``set_optimizer_state`` puts another in its place.

        Args:
            keys: of the tensors that follow.
            applied: the optimiser's step count.
        """
        self.optimizer.state.clear()

    @torch.no_grad()
    def set_optimizer_state(self, parameter: nn.Parameter, key: str, whole: Tensor, applied: int) -> None:
        """Set one of the optimiser's tensors of a parameter from its whole."""
        state = self.optimizer.state[parameter]
        # Laid out in memory as the parameter is, which a fused optimiser takes for granted.
        state[key] = torch.empty_like(parameter).copy_(whole)
        if self._counts_steps:
            state["step"] = self._step_count(applied, parameter.device)

    @property
    def fuses_optimizer(self) -> bool:
        """Whether the optimiser's step should be one kernel: AdamW's, on a GPU that holds what it steps."""
        on_gpu = self.device.type == "cuda" and not self.config.memory.offload_optimizer
        return on_gpu and self.config.optim.name == "adamw"

    def _step_count(self, applied: int, device: torch.device) -> Tensor:
        """Return AdamW's count of steps, which lies beside the weights where it is fused and on the CPU otherwise."""
        return torch.tensor(float(applied), device=device if self._is_fused else None)

    @property
    def _is_fused(self) -> bool:
        """Whether it is, as whoever built the optimiser had it."""
        return bool(self.optimizer.param_groups[0].get("fused"))

    def _finish_backward(self) -> None:
        """Make sure, after the last backward of a step, that all gradients are exchanged."""

    def _gradients_by_part(self) -> dict[str, list[Tensor]]:
        """Sort what this rank holds of the step's gradient, by part of the module."""
        parts: dict[str, list[Tensor]] = {}
        for group in self.optimizer.param_groups:
            held = [p.grad for p in group["params"] if p.grad is not None]
            parts.setdefault(group["part"], []).extend(held)
        return parts

    def _stepped(self) -> Iterator[tuple[Mapping[str, Any], Tensor, Mapping[str, Tensor]]]:
        """Yield the tensors that the optimiser steps on this rank, each with its group and its state."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield group, parameter, self.optimizer.state.get(parameter, {})

    @property
    def replicates_gradients(self) -> bool:
        """Whether every rank holds every gradient whole, and so the optimiser's state."""
        return True

    def _update(self, good: Tensor, gradients: Sequence[Tensor]) -> None:  # noqa: ARG002 - DeepSpeed's are its own
        """Step the optimiser with the gradients as they are if they are good, and forget them."""
        if self._is_fused:
            # The kernel looks itself, and leaves all as it is where something was found.
            self.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(good):
            self.optimizer.step()
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @cached_property
    def _statistics(self) -> KeptStatistics:
        """The student's; made when the first step begins, where nothing moves them in memory any more."""
        return KeptStatistics(cast(Any, self.module).student)

    @cached_property
    def _teacher_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Each student parameter and the teacher's that follows it."""
        return list(cast(Any, self.module).teacher_pairs())

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
        """Span forward and backward: DDP decides in the forward whether its backward will exchange gradients."""
        if exchange or self.world_size == 1:
            return nullcontext()
        return self._wrapped.no_sync()  # type: ignore[operator]


class GradientCheck:
    """Watches which trainable parameters a backward reaches. For ``debug.check_gradients``; costs one call each.

    ZeRO-3 updates a parameter that is left out of a backward with its previous gradient.
    """

    def __init__(self, module: nn.Module) -> None:
        self._reached: set[str] = set()
        self._expected: list[str] = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self._expected.append(name)
                # The tensor's own hook, because every engine leaves it alone; .grad is not kept under ZeRO.
                parameter.register_hook(self._marker(name))

    def after_micro_batch(self) -> None:
        """Check the backward of one micro-batch and begin anew.

        Raises:
            RuntimeError: naming the parameters that have no gradient from it.
        """
        missing = [name for name in self._expected if name not in self._reached]
        self._reached.clear()
        if missing:
            raise RuntimeError(
                f"{len(missing)} trainable parameters have no gradient from this backward, e.g. "
                f"{', '.join(missing[:5])}: ZeRO-3 would update them with their previous gradient. Run their "
                "module in every step and multiply what is off by 0"
            )

    def _marker(self, name: str) -> Callable[[Tensor], None]:
        def mark(_gradient: Tensor) -> None:
            self._reached.add(name)

        return mark
