"""Find where a step waits for the device: each such place costs a GPU its lead, and forbids to capture the step.

A real step of the trainer runs on a CPU, where all of this is free, under a mode that sees every function of torch. It
follows which tensors would be on the device: what was moved there, and what was computed from that. Reading one on the
host is a wait; so is a tensor that is made of Python's numbers amid the step, and one that is moved in other ways than
with the batch, from page-locked memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import mfm_dist
from mfm_dist.batch import UDABatch
from mfm_dist.build import Readers, classes_without_data
from mfm_dist.config.schema import RunConfig
from mfm_dist.profiling.counting import without_weights
from mfm_dist.profiling.step import build_trainer

READS = {
    *("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__complex__", "numpy", "cpu", "nonzero"),
    *("argwhere", "is_nonzero", "equal", "allclose", "masked_select", "unique", "unique_consecutive", "bincount"),
}
"""Functions whose result has to be on the host, or whose size has."""
FACTORIES = {
    *("zeros", "ones", "full", "empty", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "tensor"),
}
"""Functions that make a tensor, on the host unless told otherwise."""
PACKAGE = Path(mfm_dist.__file__).parent
OURS, DEEPSPEED, OPTIMIZER = "ours", "deepspeed", "optimizer"


class HostSync(NamedTuple):
    """A place where the host waits for the device."""

    kind: str
    """The function of torch, or what was done."""
    place: str
    """File and line, in this package if it is called from there."""
    whose: str
    """``ours``; ``deepspeed``; or ``optimizer``: torch's on a CPU, which is told there whether to step, and counts."""


class HostSyncs(TorchFunctionMode):
    """Collects them while it is active, in ``found``: how often each was met."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[HostSync] = Counter()
        self._on_host = WeakIdKeyDictionary()
        """Tensors that are there; all others are on the device."""

    def of(self, whose: str) -> int:
        """Count those of one origin."""
        return sum(number for sync, number in self.found.items() if sync.whose == whose)

    def arrived(self, batch: UDABatch) -> None:
        """Say that a batch is on the host."""
        batch.map(self._put_on_host)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        held = [tensor in self._on_host for tensor in tensors]
        device = next((a for a in (kwargs.get("device"), *args[1:2]) if isinstance(a, torch.device)), None)
        if kind := self._kind(name, args, kwargs, held, device):
            self._note(kind)
        out = func(*args, **kwargs)
        made_on_host = all(held) if tensors else name in FACTORIES and device is None
        if name == "to" and device is not None:
            made_on_host = False
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                if made_on_host:
                    self._put_on_host(leaf)
                elif name == "to":  # on a CPU the very same tensor
                    self._on_host.pop(leaf, None)
        return out

    def _kind(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], held: list[bool], device: torch.device | None
    ) -> str | None:
        """Say what is waited for; None where nothing is."""
        on_device = bool(held) and not all(held)
        if name in ("tensor", "as_tensor", "asarray") and not held:
            return name
        if name in READS and on_device:
            return name
        if name == "to" and not kwargs.get("non_blocking"):
            if device is not None and held and held[0]:
                return "moved to the device"
            if "cpu" in (*args[1:], *kwargs.values()) and on_device:
                return "moved to the host"
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                return "index made of Python's numbers"
            masks = [part for part in index if isinstance(part, Tensor) and part.dtype == torch.bool]
            filled = name == "__setitem__" and not isinstance(args[2], Tensor)  # by a kernel that takes the mask
            if masks and on_device and not filled:
                return "boolean index"
        return None

    def _put_on_host(self, tensor: Tensor) -> Tensor:
        self._on_host[tensor] = True
        return tensor

    def _note(self, kind: str) -> None:
        place, whose, frame = "", OURS, sys._getframe(2)
        walk: FrameType | None = frame
        while walk is not None:
            path = Path(walk.f_code.co_filename)
            if PACKAGE in path.parents:
                drawn = (path.name, walk.f_code.co_name) == ("train_module.py", "draw")
                told = (path.name, walk.f_code.co_name) == ("trainer.py", "next_batches")
                if (drawn or told) and kind in ("tensor", "as_tensor", "asarray"):
                    return  # it travels with the batch
                if not place and (path.name, walk.f_code.co_name, kind) == ("engine.py", "_update", "__bool__"):
                    whose = OPTIMIZER  # asked on a CPU alone: the fused kernel of a GPU looks itself
                place = place or f"{path.relative_to(PACKAGE)}:{walk.f_lineno}"
            elif not place and "deepspeed" in path.parts:
                whose = DEEPSPEED
            elif not place and "optim" in path.parts:
                whose = OPTIMIZER
            walk = walk.f_back
        self.found[HostSync(kind, place or f"{frame.f_code.co_filename}:{frame.f_lineno}", whose)] += 1


def count_host_syncs(config: RunConfig, batches: list[UDABatch]) -> HostSyncs:
    """Run two steps of the trainer in this process, and collect what the second one waits for.

    Args:
        batches: of two steps, as the data pipeline gives them; their size does not matter to what is counted.
    """
    config = without_weights(config)
    config.train.cuda_graph = False  # which needs a GPU, and changes nothing about what waits
    config.self_training.blur_prob = config.self_training.jitter_prob = 1.0
    no_data: Any = ()
    trainer = build_trainer(config, Readers(no_data, no_data, None, None, None, classes_without_data(config)))
    blocks = iter(batches)
    trainer.train_step(trainer.next_batches(blocks))
    syncs = HostSyncs()
    for batch in batches:
        syncs.arrived(batch)
    with syncs:
        trainer.train_step(trainer.next_batches(blocks))
        trainer.settle(leave=1)
    trainer.settle()
    trainer.writer.close()
    trainer.engine.close()
    return syncs
