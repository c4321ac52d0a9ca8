"""The engine over DeepSpeed without sharding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mfm_dist.distributed.engine import Engine


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
