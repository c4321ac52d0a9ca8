"""A CUDA graph without CUDA: the operators of a piece of work, run again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.cuda_graph import GraphEngine

Result = TypeVar("Result")


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """Notes every operator with its arguments: tensors by their place in memory, everything else as it is now.

    ``replay`` runs them again, each writing where it wrote before. What Python decided in between stays decided.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        read = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        written = [tensor for tensor in tensors(out) if tensor.untyped_storage()._cdata not in read]
        if written or func._schema.is_mutable:  # a view shows what it showed before
            self.calls.append((func, args, kwargs or {}, written))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, written in self.calls:
            out = func(*args, **kwargs)
            if written:
                for old, new in zip(written, tensors(out), strict=True):
                    old.copy_(new)


class RecordingEngine(GraphEngine):
    """Replays the operators of a micro-batch in the place of a CUDA graph, on a CPU."""

    def __init__(self, accelerator: Accelerator, config: RunConfig) -> None:
        super().__init__(accelerator, config, graphs=self)
        self.captures = self.replays = 0

    def warm_up(self, work: Callable[[], Result]) -> Result:
        return work()

    @torch.no_grad()
    def capture(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record the work and put back what that has changed: a capture does nothing."""
        self.captures += 1
        module: Any = self.module
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        changed = [*gradients, *module.buffers(), *tensors(module.map_gradients.squares)]
        before = [tensor.clone() for tensor in changed]
        with Recorder() as recorder, torch.enable_grad():
            result = work()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return result, replay
