"""Memory for blocks that worker processes fill and the training process reads, used again and again.

New memory for every block would cost its worker as much as a tenth of the decoding (the kernel clears every page), and
torch's way of sharing tensors needs room in /dev/shm, of which containers often have 64 MiB. This memory is made
before the workers are forked, so that both sides have it; a message between them is a number.
"""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mfm_dist.errors import ConfigError

_FREE, _IN_USE = 0, 1


class BlockPool:
    """Slots of equal size; each worker owns as many. A slot is free again when the last view of it is gone."""

    def __init__(self, *, workers: int, slots: int, size: int) -> None:
        """
        Args:
            workers: processes that will be forked; 0 is one, this process.
            slots: for each of them.
            size: bytes of a slot.

        Raises:
            ConfigError: this machine has no such memory.
        """
        self._slots = slots
        self._size = size
        count = max(workers, 1) * slots
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if count * size > memory:  # which may be promised all the same, and end the process when it is used
            raise ConfigError(
                f"the micro-batches of a step take {count * size / 2**30:,.1f} GiB in each process, and this machine "
                f"has {memory / 2**30:.1f} GiB: lower train.global_batch or data.workers, or train in more processes"
            )
        self._memory = mmap.mmap(-1, count * size)
        self._state = mmap.mmap(-1, count)  # one byte a slot, which nobody else writes at the same time
        self._owner = os.getpid()

    def take(self) -> int | None:
        """Take a free slot of this process, from now on in use; None where all are."""
        worker = get_worker_info()
        first = (worker.id if worker else 0) * self._slots
        for slot in range(first, first + self._slots):
            if self._state[slot] == _FREE:
                self._state[slot] = _IN_USE
                return slot
        return None

    def give_back(self, slot: int) -> None:
        self._state[slot] = _FREE

    def fill(self, slot: int) -> Tensor:
        """View a slot to write to: uint8 [size]."""
        return torch.from_numpy(self._view(slot))

    def lend(self, slot: int) -> Tensor:
        """View a slot to read: uint8 [size]; the slot is given back when this tensor and all views of it are gone."""
        view = self._view(slot)
        weakref.finalize(view, self._give_back_here, slot).atexit = False
        return torch.from_numpy(view)

    def _view(self, slot: int) -> np.ndarray:
        return np.frombuffer(self._memory, dtype=np.uint8, count=self._size, offset=slot * self._size)

    def _give_back_here(self, slot: int) -> None:
        """Give a slot back, but not when a process forked meanwhile is done with its copy of the view."""
        if os.getpid() == self._owner:
            self.give_back(slot)
