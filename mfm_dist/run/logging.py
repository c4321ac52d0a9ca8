"""The numbers of the steps since the last logged one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mfm_dist.distributed.engine import Engine
from mfm_dist.inference.metrics import RunningMean, peak_memory_gib


class StepLog:
    """Collects what every rank knows of its steps, and gives one record of them all."""

    def __init__(self, engine: Engine, *, step: int, images_per_step: int) -> None:
        """
        Args:
            step: global batches consumed so far.
            images_per_step: source and target images of a global batch.
        """
        self.engine = engine
        self.images_per_step = images_per_step
        self.grad_norms: Mapping[str, Tensor] = {}
        """Of the last step, by part."""
        self.begin(step)

    def begin(self, step: int) -> None:
        """Forget what was collected, and count from ``step`` and now on."""
        self._losses = RunningMean()
        self._waited = 0.0
        self._step, self._since = step, time.perf_counter()

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count the losses of one micro-batch."""
        self._losses.add(losses)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def no_training(self) -> Iterator[None]:
        """Leave the time spent inside, an evaluation's, out of the throughput."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def record(self, step: int) -> dict[str, Any]:
        """Means over the steps since the last record and over ranks, in one all-reduce. Collective."""
        names, losses = self._losses.pop()
        seconds = time.perf_counter() - self._since
        waited = torch.tensor([self._waited / seconds], device=losses.device)
        *means, data_wait_fraction = self.engine.mean(torch.cat([losses, waited])).tolist()
        record: dict[str, Any] = {"step": step}
        record |= {
            name if name == "pseudo_weight" else f"loss/{name}": value for name, value in zip(names, means, strict=True)
        }
        record |= {f"grad_norm/{part}": float(norm) for part, norm in self.grad_norms.items()}
        record |= {f"lr/{group['name']}": group["lr"] for group in self.engine.optimizer.param_groups}
        record["images_per_second"] = self.images_per_step * (step - self._step) / seconds
        record["data_wait_fraction"] = data_wait_fraction
        record["memory_gib"] = peak_memory_gib(self.engine.device)
        self.begin(step)
        return record
