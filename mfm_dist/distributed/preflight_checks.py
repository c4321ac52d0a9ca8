"""What the processes of a launch can tell about one another before training: who is there, the network, the clocks.

They meet at a store, which asks nothing of devices and little of the network: whoever is missing is known by name, and
nobody waits for it without an end. Tensors are exchanged only after all have been found well.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mfm_dist.distributed.launch import Launch

ANSWER_SECONDS = 35.0
"""For every process to start, look at its node and say what it saw, counted from the start of the first process."""
EXCHANGE_SECONDS = 15.0
"""For the exchange of tensors."""
GRACE_SECONDS = 2.0
"""For what takes no time when all is well. The first process needs less than a minute, whatever the others do."""
ELEMENTS = 1 << 22
"""Of the all-reduce, float32: 16 MiB."""
ROUNDS = 4
NORMAL = 1 << 10
"""Side of the matrices multiplied on a device."""


class Peers:
    """All processes of the launch."""

    def __init__(self, launch: Launch, node: str) -> None:
        """Meet the first of them.

        Args:
            node: name of the node that this process is on.

        Raises:
            RuntimeError: torch's, if it is not to be found.
        """
        self.rank, self.world_size, self.node = launch.rank, launch.world_size, node
        on_gpu = not launch.use_cpu and 0 < launch.local_world_size <= torch.cuda.device_count()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
        self.token = uuid.uuid4().hex
        """The same on every process, and no other launch's."""
        if self.world_size > 1:
            self._store = _store(self.rank)
            self._store.set(f"node/{self.rank}", node)
            if self.rank == 0:
                self._store.set("token", self.token)
            self.token = self._store.get("token").decode()
        self._began = time.monotonic()

    def seconds_left(self) -> float:
        """Of ``ANSWER_SECONDS``."""
        return ANSWER_SECONDS - (time.monotonic() - self._began)

    def announce(self, what: str) -> None:
        """Tell the others that something is there now."""
        if self.world_size > 1:
            self._store.set(what, "true")

    def is_announced(self, what: str, seconds: float) -> bool:
        """Whether it is, or will be within that time."""
        return self.world_size == 1 or bool(self._hear(what, seconds))

    def node_of(self, rank: int) -> str | None:
        """Where a process runs, None if it has not come. For the first process to ask."""
        key = f"node/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def agree(self, stage: str, mine: Any, judge: Callable[[Sequence[Any]], Any], seconds: float) -> Any:
        """Every process says something, the first one judges, and all get its answer. Collective.

        Args:
            mine: anything that JSON holds, as is the answer.
            judge: called with what each process said, in order of rank, None for one that was silent until then.
            seconds: to wait for all of them.

        Raises:
            RuntimeError: torch's, if the first process gives no answer.
        """
        if self.world_size == 1:
            return judge([mine])
        if self.rank == 0:
            deadline = time.monotonic() + seconds
            others = [self._hear(f"{stage}/{rank}", deadline - time.monotonic()) for rank in range(1, self.world_size)]
            self._store.set(f"{stage}/answer", json.dumps(judge([mine, *others])))
        else:
            self._store.set(f"{stage}/{self.rank}", json.dumps(mine))
        answer = f"{stage}/answer"
        self._store.wait([answer], timedelta(seconds=seconds + EXCHANGE_SECONDS))
        return json.loads(self._store.get(answer))

    def exchange(self) -> dict[str, Any]:
        """Tensors between all processes: gloo, or NCCL where every process has a GPU of its own. Collective.

        Returns:
            ``clock``, in seconds since 1970, just after all had met; ``wrong``, what is with the sum of an all-reduce
            on this process, or None; ``gb_per_second``, its bus bandwidth, 2 (n - 1) / n times the bytes over the time,
            as NCCL's tests count it.

        Raises:
            RuntimeError: torch's, if some process is not reached.
        """
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        patience = timedelta(seconds=2 * EXCHANGE_SECONDS)  # the caller's ends first
        dist.init_process_group(
            backend, store=self._store, rank=self.rank, world_size=self.world_size, timeout=patience
        )
        dist.barrier()
        clock = time.time()
        wrong, speed = self._all_reduce()
        dist.destroy_process_group()
        return {"clock": clock, "wrong": wrong, "gb_per_second": speed}

    def _all_reduce(self) -> tuple[str | None, float]:
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

    def part(self) -> None:
        """Leave; the first process, which the others ask, last. Collective."""
        self.announce(f"left/{self.rank}")
        if self.rank == 0:
            deadline = time.monotonic() + GRACE_SECONDS
            for rank in range(1, self.world_size):
                self._hear(f"left/{rank}", deadline - time.monotonic())

    def _hear(self, key: str, seconds: float) -> Any:
        try:
            self._store.wait([key], timedelta(seconds=max(seconds, 0.001)))
            return json.loads(self._store.get(key))
        except RuntimeError:
            return None

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _store(rank: int) -> Any:
    """Kept by the launcher of the first node, or by the first process."""
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serves,
        timeout=timedelta(seconds=ANSWER_SECONDS),
        wait_for_workers=False,
    )
    return dist.PrefixStore("preflight", store)  # type: ignore[attr-defined]


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
