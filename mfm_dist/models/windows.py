"""Windows of an image: one cut out, or many that slide over all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A window, in positions of the map it belongs to: pixels of an image, or cells of a coarser map."""

    top: int
    left: int
    height: int
    width: int

    def crop(self, plane: Tensor) -> Tensor:
        """Cut the window out: [..., H, W] -> [..., height, width]."""
        return plane[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def paste(self, patch: Tensor, size: tuple[int, int]) -> Tensor:
        """Put a patch in its place: [..., height, width] -> [..., *size], 0 around it."""
        right, bottom = size[1] - self.left - self.width, size[0] - self.top - self.height
        return F.pad(patch, (self.left, right, self.top, bottom))

    def indices(self) -> dict[str, Tensor]:
        """Return rows and columns, which make a ``DrawnWindow``; on the CPU."""
        rows, columns = torch.arange(self.top, self.top + self.height), torch.arange(self.left, self.left + self.width)
        return {"rows": rows, "columns": columns}

    def scaled_down(self, stride: int) -> Window:
        """Return the same window of a map with one position for ``stride`` of these; all sides must be multiples."""
        sides = (self.top, self.left, self.height, self.width)
        assert all(side % stride == 0 for side in sides), f"{self} does not lie on a grid of {stride}"
        return Window(*(side // stride for side in sides))


@dataclass(frozen=True)
class DrawnWindow:
    """A window whose place only the device knows: its kernels are the same wherever it lies, as a graph needs them."""

    rows: Tensor
    """int64 [height], one after the other."""
    columns: Tensor
    """int64 [width], likewise."""

    def crop(self, plane: Tensor) -> Tensor:
        """Cut the window out: [..., H, W] -> [..., height, width]."""
        return laid_out_as(plane, plane.index_select(-2, self.rows).index_select(-1, self.columns))

    def paste(self, patch: Tensor, size: tuple[int, int]) -> Tensor:
        """Put a patch in its place: [..., height, width] -> [..., *size], 0 around it."""
        tall = patch.new_zeros(*patch.shape[:-2], size[0], patch.shape[-1]).index_copy(-2, self.rows, patch)
        whole = patch.new_zeros(*patch.shape[:-2], *size).index_copy(-1, self.columns, tall)
        return laid_out_as(patch, whole)

    def scaled_down(self, stride: int) -> DrawnWindow:
        """Return the same window of a map with one position for ``stride`` of these; its sides must be multiples."""
        return DrawnWindow(self.rows[::stride] // stride, self.columns[::stride] // stride)


def laid_out_as(pattern: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` with its channels innermost in memory if those of ``pattern`` are, as convolutions are fastest."""
    channels_last = pattern.ndim == 4 and pattern.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def sliding_boxes(size: tuple[int, int], window: tuple[int, int], step: tuple[int, int]) -> list[Window]:
    """Cover a map of ``size`` with windows, row by row; the last of each row and column is moved back inside.

    A side that is shorter than the window makes the window shorter (mmsegmentation's rule).
    """
    height, width = (min(side, full) for side, full in zip(window, size, strict=True))
    rows, columns = (_starts(*sides) for sides in zip(size, (height, width), step, strict=True))
    return [Window(top, left, height, width) for top in rows for left in columns]


def _starts(length: int, window: int, step: int) -> list[int]:
    count = max(length - window + step - 1, 0) // step + 1
    return [min(index * step, length - window) for index in range(count)]


def average_windows(patches: list[Tensor], boxes: list[Window], size: tuple[int, int]) -> Tensor:
    """Average, at each position, the patches [..., height, width] that cover it: fp32 [..., *size]."""
    total = patches[0].new_zeros(*patches[0].shape[:-2], *size, dtype=torch.float32)
    count = torch.zeros(size, device=total.device)
    for patch, box in zip(patches, boxes, strict=True):
        box.crop(total).add_(patch)
        box.crop(count).add_(1)
    return total / count
