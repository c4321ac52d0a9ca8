"""Counts what a rank holds, on live tensors: each storage once, under the first role that claims it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mfm_dist.distributed.bf16_engine import BF16Engine
from mfm_dist.distributed.deepspeed_engine import DeepSpeedEngine
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.teacher import local_tensor
from mfm_dist.train_module import TrainModule


def state_tensors(engine: Engine, module: TrainModule) -> dict[str, list[Tensor]]:
    """Find this rank's tensors of the run's state, by role; DeepSpeed's gradients are read where it keeps them."""
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients = [g for p in trained for g in (p.grad, getattr(p, "grad_accum", None)) if g is not None]
    base: Any = engine.optimizer
    master: list[Tensor] = []
    if isinstance(engine, DeepSpeedEngine):
        zero: Any = engine.optimizer
        base = zero.optimizer
        master = engine._flat_shards()
        gradients += [m.grad for m in master if m.grad is not None]
        gradients += tensors_in(zero.averaged_gradients, depth=2)
        gradients += tensors_in(getattr(zero, "grad_partitions_flat_buffer", None), depth=0)
    teacher = [local_tensor(p) for _, p in module.teacher_pairs()]
    if isinstance(engine, BF16Engine):
        teacher += engine._average.values()
    return {
        "parameters": [local_tensor(p) for p in trained],
        "gradients": gradients,
        "optimiser": [t for state in base.state.values() for t in state.values() if isinstance(t, Tensor)],
        "master": master,
        "teacher": teacher,
    }


class StateCount:
    """Counts the state of one engine again and again.

    What a count has seen is remembered by weak reference: DDP keeps the memory of its gradients for reuse, but below
    Python, where no tensor shows it.
    """

    def __init__(self, engine: Engine, module: TrainModule) -> None:
        self.engine = engine
        self.module = module
        self._seen: dict[str, list[tuple[StorageWeakRef, int, int]]] = {}

    def now(self) -> dict[str, dict[str, int]]:
        """Count the bytes of ``state`` by role and of ``buffers`` by name."""
        gc.collect()
        counted: set[int] = set()
        state: dict[str, int] = {}
        for role, tensors in state_tensors(self.engine, self.module).items():
            state[role] = count_once(tensors, counted)
            remembered = self._seen.setdefault(role, [])
            for reference, place, size in remembered:
                if not reference.expired() and place not in counted:
                    counted.add(place)
                    state[role] += size
            known = {place for _, place, _ in remembered}
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    known.add(storage.data_ptr())
                    remembered.append((StorageWeakRef(storage), storage.data_ptr(), storage.nbytes()))
            self._seen[role] = [entry for entry in remembered if not entry[0].expired()]
        return {"state": state, "buffers": self._buffers(counted)}

    def _buffers(self, counted: set[int]) -> dict[str, int]:
        """Return everything else that is alive, by what holds it."""
        named: dict[str, Iterable[Tensor]] = {
            "gathered parameters": [p.data for p in self.module.parameters() if hasattr(p, "ds_tensor")],
            "module buffers": list(self.module.buffers()),
        }
        if isinstance(self.engine, DeepSpeedEngine):
            zero: Any = self.engine.optimizer
            named["reduction bucket"] = tensors_in([vars(b) for b in zero.ipg_buckets.values()], depth=3)
            for name, value in vars(zero).items():
                named.setdefault(name, list(tensors_in(value, depth=3)))
        # Not its other subclasses: what torch.compile traces with looks like a tensor and has no memory.
        named["other"] = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
        sizes = {name: count_once(tensors, counted) for name, tensors in named.items()}
        return {name: size for name, size in sizes.items() if size}


def count_once(tensors: Iterable[Tensor], counted: set[int]) -> int:
    """Count the bytes of the storages that were not counted yet; they are from now on."""
    total = 0
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_meta:
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def tensors_in(value: Any, *, depth: int) -> Iterator[Tensor]:
    """Return the tensors in nested lists and dictionaries, this many levels down."""
    if isinstance(value, Tensor):
        yield value
    elif depth > 0 and isinstance(value, (Mapping, list, tuple)):
        for one in list(value.values() if isinstance(value, Mapping) else value):
            yield from tensors_in(one, depth=depth - 1)


class GatheredPeak:
    """While entered, samples how much of ZeRO-3's parameters is gathered; ``bytes`` is the most that was seen."""

    def __init__(self, module: nn.Module, every: float = 0.005) -> None:
        self.bytes = 0
        self._parameters = [p for p in module.parameters() if hasattr(p, "ds_tensor")]
        self._every = every
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GatheredPeak:
        if self._parameters:
            self._ended.clear()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(self._every):
            gathered = sum(p.data.nbytes for p in self._parameters if p.data.numel() > 1)
            self.bytes = max(self.bytes, gathered)
