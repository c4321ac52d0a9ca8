"""Several ranks as threads of this process, for what only exchanges values and writes files."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine

Result = TypeVar("Result")


class Meeting:
    """Where all ranks hand in a value and get everyone's."""

    def __init__(self, world_size: int) -> None:
        self._values: list[Any] = [None] * world_size
        self._barrier = Barrier(world_size, timeout=60)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        everyone = list(self._values)
        self._barrier.wait()
        return everyone

    def leave(self) -> None:
        """Let nobody wait for a rank that failed."""
        self._barrier.abort()


class ThreadEngine(Engine):
    """The engine of one rank, as under DDP; its exchanges are those of a meeting."""

    def __init__(self, rank: int, world_size: int, meeting: Meeting) -> None:
        accelerator: Any = SimpleNamespace(
            device=torch.device("cpu"),
            process_index=rank,
            num_processes=world_size,
            prepare_model=lambda module: module,
        )
        super().__init__(accelerator, RunConfig())
        self._meeting = meeting

    def gather_objects(self, value: Any) -> list[Any]:
        return self._meeting.gather(self.rank, value)

    def mean_on_main(self, values: Tensor) -> Tensor:
        return torch.stack(self.gather_objects(values)).mean(0)

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:  # noqa: ARG002 - sums alone are asked for
        return torch.stack(self.gather_objects(values)).sum(0, dtype=values.dtype)


def on_ranks(world_size: int, work: Callable[[ThreadEngine], Result]) -> list[Result]:
    """Do ``work`` on every rank, and return what each gives, in order."""
    meeting = Meeting(world_size)

    def in_thread(rank: int) -> Result:
        try:
            return work(ThreadEngine(rank, world_size, meeting))
        except BaseException:
            meeting.leave()
            raise

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(in_thread, range(world_size)))
