"""The engine that captures a micro-batch in a CUDA graph and replays it, over one process or several.

A micro-batch is thousands of kernels of a few microseconds, and launching one from Python takes longer than that. A
graph launches all of them at once: the teacher, forward and backward, recorded with the addresses that they read and
write and with every number that Python gave them. So whatever differs between two micro-batches has to lie in tensors
at fixed addresses (``StepInputs``, lambda included), to happen before (``Method.prepare``: jitter and blur), or to be
part of the key by which graphs are kept; a test replays the operators of one micro-batch with the tensors of another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from mfm_dist.batch import UDABatch, map_tensors, tensors_of
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import ConfigError

Result = TypeVar("Result")
WARM_UP = 3
"""Micro-batches of a kind that run as they are before one is captured: what libraries do when they are called first
must not be captured (torch's recipe: 3)."""


class Graphs(Protocol):
    """What captures work and replays it."""

    def warm_up(self, work: Callable[[], Result]) -> Result:
        """Do the work as it will be captured, on the same stream."""

    def capture(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record the work without doing it; return tensors that its replay fills, and the replay."""


class CudaGraphs:
    """torch's CUDA graphs. All share the memory of what they compute: one runs after the other, and each anew."""

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Result]) -> Result:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def capture(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's and those that write a checkpoint, may go on with what a capture forbids.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return result, graph.replay


class Captured(NamedTuple):
    """A micro-batch that can be replayed."""

    inputs: dict[str, Tensor]
    """What it reads; to be filled before a replay."""
    losses: dict[str, Tensor]
    """What the replay fills."""
    replay: Callable[[], None]


class GraphEngine(Engine):
    """Without DDP, whose exchange amid the backward NCCL would have to run in the graph: ranks average their gradients
    once a step.

    Gradients are added to tensors that stay, so they are set to 0 and not dropped.

    Args:
        graphs: None for torch's.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, graphs: Graphs | None = None) -> None:
        super().__init__(accelerator, config)
        self._graphs = graphs or CudaGraphs()
        self._captured: dict[Any, Captured] = {}
        self._seen: Counter[Any] = Counter()

    def _micro_batch(self, batch: UDABatch, mfm_weight: float, measure: bool, inputs: Any = None) -> dict[str, Tensor]:
        """Prepare the inputs, and replay what was captured of such a micro-batch.

        One that is measured, or has a lambda of 0 and does not count in BatchNorm, is another kind of micro-batch. So
        is one whose tensors lie otherwise in memory.
        """
        with self._autocast():
            prepared = inputs or cast(Any, self.module).prepare_inputs(batch, mfm_weight)
        given = tensors_of(prepared)
        layout = tuple((name, tensor.shape, tensor.stride()) for name, tensor in given.items())
        kind = (measure, mfm_weight > 0, layout)
        run = partial(super()._micro_batch, batch, mfm_weight, measure)
        if self._seen[kind] < WARM_UP:
            self._seen[kind] += 1
            return self._warm_up(partial(run, prepared))
        if kind not in self._captured:
            fixed = map_tensors(prepared, torch.clone)
            # Autocast is entered and left within: its cache of weights in bf16 is made anew by every replay.
            losses, replay = self._graphs.capture(partial(run, fixed))
            self._captured[kind] = Captured(tensors_of(fixed), losses, replay)
        captured = self._captured[kind]
        for name, tensor in captured.inputs.items():
            tensor.copy_(given[name])
        captured.replay()
        return {name: loss.clone() for name, loss in captured.losses.items()}  # read later, when the next has replayed

    def _warm_up(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run a micro-batch as it is.

        Raises:
            ConfigError: the networks draw random numbers themselves, which a replay would not key by its block.
        """
        before = self._random_state()
        losses = self._graphs.warm_up(run)
        if not torch.equal(before, self._random_state()):
            raise ConfigError(
                "train.cuda_graph replays what was captured, and these networks draw random numbers by torch's own "
                "generator, which it would not key by the data (dropout in attention or MLPs; drop-path of windows, or "
                "of a layer that runs twice): leave them out of model.backbone_options (attn_drop_rate, "
                "proj_drop_rate, ...; drop_path_rate=0), or set train.cuda_graph=false"
            )
        return losses

    def _random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    @torch.no_grad()
    def _wrap(self, module: nn.Module) -> nn.Module:
        """Start from the weights of rank 0, as DDP does."""
        if self.world_size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)
        return module

    def _sync_context(self, *, exchange: bool) -> AbstractContextManager[Any]:  # noqa: ARG002 - no backward exchanges
        return nullcontext()

    def _finish_backward(self) -> None:
        """Average the gradients of all ranks, in one exchange."""
        if self.world_size == 1:
            return
        gradients = [gradient for held in self._gradients_by_part().values() for gradient in held]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / self.world_size  # as DDP, before the sum
        dist.all_reduce(flat)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [piece.view_as(own) for piece, own in zip(pieces, gradients, strict=True)])

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
