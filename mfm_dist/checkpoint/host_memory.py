"""Where a checkpoint's tensors are copied to, so that training goes on while they are written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: each copy begins at a multiple, a line of the processor's cache."""


class HostMemory:
    """Memory of the CPU that one checkpoint after another is copied to.

    It is kept between them: the system gives memory page by page as it is first touched, which takes longer than the
    copy itself, and pages that a GPU copies to at full speed have to be pinned first.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copies(self, tensors: Sequence[tuple[Tensor, torch.dtype]]) -> list[Tensor]:
        """Return a copy of each tensor in the given type. The next call overwrites them."""
        sizes = [dtype.itemsize * tensor.numel() for tensor, dtype in tensors]
        starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        on_gpu = any(tensor.is_cuda for tensor, _ in tensors)
        if len(self._bytes) < starts[-1]:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # freed before there is more
            self._bytes = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=on_gpu)
        copies = [
            self._bytes[start : start + size].view(dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
            for (tensor, dtype), start, size in zip(tensors, starts, sizes, strict=False)
        ]
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies
