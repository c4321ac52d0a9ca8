"""What the processes of a launch can tell about one another before training: the network, the clocks, who is there."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mfm_dist.distributed.launch import Launch

JOIN_SECONDS = 60
"""For all processes to find one another."""
ELEMENTS = 1 << 22
"""Of the all-reduce, float32: 16 MiB."""
ROUNDS = 4
NORMAL = 1 << 10
"""Side of the matrices multiplied on a device."""


class Peers:
    """All processes of the launch: gloo for objects, and for tensors NCCL where every process has a GPU of its own."""

    def __init__(self, launch: Launch) -> None:
        """Join them.

        Raises:
            RuntimeError: torch's, if some process does not come.
        """
        self.rank, self.world_size = launch.rank, launch.world_size
        on_gpu = not launch.use_cpu and 0 < launch.local_world_size <= torch.cuda.device_count()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=JOIN_SECONDS))

    def gather(self, value: Any) -> list[Any]:
        """A small object of every process, on every process, in order of rank. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def clocks(self) -> list[float]:
        """What the clock of every process showed just after all had met, in seconds since 1970. Collective."""
        if self.world_size > 1:
            dist.barrier()
        return [float(now) for now in self.gather(time.time())]

    def all_reduce(self) -> tuple[str | None, float]:
        """Sum tensors whose sum is known. Collective.

        Returns:
            what is wrong with the sum on this process, if anything; and the bus bandwidth in 1e9 bytes a second,
            2 (n - 1) / n times the bytes over the time, as NCCL's tests count it; 0 for one process.
        """
        if self.world_size == 1:
            return None, 0.0
        pattern = torch.arange(ELEMENTS, device=self.device, dtype=torch.float32) % 1024
        expected = pattern * self.world_size + sum(range(self.world_size))
        seconds, problem = [], None
        for _ in range(ROUNDS):
            values = pattern + self.rank
            self._synchronise()
            began = time.perf_counter()
            dist.all_reduce(values)
            self._synchronise()
            seconds.append(time.perf_counter() - began)
            if wrong := int((values != expected).sum()):
                problem = f"an all-reduce came out wrong in {wrong} of {ELEMENTS} numbers"
        share = 2 * (self.world_size - 1) / self.world_size
        return problem, share * expected.nbytes / min(seconds) / 1e9

    def close(self) -> None:
        """Part again."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def device_problem(device: torch.device) -> str | None:
    """Whether a device multiplies two matrices as another way of computing does."""
    generator = torch.Generator().manual_seed(0)
    # Small whole numbers: every product and sum is exact in float32, so that one wrong bit shows.
    a, b = (torch.randint(-8, 9, (NORMAL, NORMAL), generator=generator).float() for _ in range(2))
    try:
        product = (a.to(device) @ b.to(device)).cpu()
    except RuntimeError as error:
        return f"cannot multiply two matrices ({' '.join(str(error).split())[:200]})"
    expected = a @ b.sum(1)  # of the rows of the product, at a thousandth of the cost
    wrong = int((product.sum(1) != expected).sum())
    return f"multiplies wrongly ({wrong} of {NORMAL} rows)" if wrong else None
