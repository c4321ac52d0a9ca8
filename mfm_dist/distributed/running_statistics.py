"""BatchNorm's running statistics, taken back where a step is not applied.

A forward moves them before anyone knows whether its step is sound, and one infinite activation would stay in them to
the end: training never reads them, but every later evaluation and the export would.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Return the running means and variances of a module's BatchNorm layers, each [channels], in a fixed order."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    return [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None]


class KeptStatistics:
    """The running statistics of a module, and what they were before the step."""

    def __init__(self, module: nn.Module) -> None:
        """Lay the module's statistics side by side in memory, so that one kernel copies all of them."""
        buffers = running_statistics(module)
        nothing = torch.zeros(0, device=next(module.parameters()).device)
        self._now = torch.cat([buffer.flatten() for buffer in buffers]) if buffers else nothing
        pieces = self._now.split([buffer.numel() for buffer in buffers])
        for buffer, piece in zip(buffers, pieces, strict=True):
            buffer.data = piece.view_as(buffer)
        self._before = torch.empty_like(self._now)

    def keep(self) -> None:
        """Remember them."""
        self._before.copy_(self._now)

    def put_back(self, *, unless: Tensor) -> None:
        """Make them again what they were, unless a scalar bool on their device says that the step was applied."""
        torch.where(unless, self._now, self._before, out=self._now)
