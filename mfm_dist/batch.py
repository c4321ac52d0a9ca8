"""The one type that the data pipeline and the training methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mfm_dist.errors import BadSample

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True)
class UDABatch:
    """One block: ``B`` source and ``B`` target samples at consecutive positions, a micro-batch.

    Images stay uint8 RGB until they are on the device, which costs a quarter of the copy.
    """

    source_image: Tensor
    """uint8 [B, 3, H, W], RGB."""
    source_label: Tensor
    """uint8 [B, H, W], indices of classes, ``IGNORE_INDEX`` where unlabelled."""
    target_image: Tensor
    """uint8 [B, 3, H, W], RGB."""
    target_valid: Tensor
    """bool [B, H, W]; False on padding, where a pseudo-label means nothing."""
    labelled_target_image: Tensor | None = None
    """uint8 [B, 3, H, W], RGB: as many labelled target images (``data.target_labelled``)."""
    labelled_target_label: Tensor | None = None
    """uint8 [B, H, W], their label."""
    block: int
    """Global index of this block; the key of every random draw that is made once per micro-batch."""
    draws: Mapping[str, Tensor] = field(default_factory=dict)
    """What its step draws (``TrainModule.draw``), which travels with it so that no step waits for a copy of its own."""
    flags: Tensor | None = None
    """float32 [n], what this rank tells all others in the step that ends with this block (``trainer.Flag``)."""
    bad_samples: tuple[BadSample, ...] = ()
    """Samples of this block that could not be used and were replaced by a neighbour."""

    @property
    def positions(self) -> range:
        """Global position of each sample in its endless stream; the same for the source and the target stream."""
        size = len(self.source_image)
        return range(self.block * size, (self.block + 1) * size)

    def to(self, device: torch.device) -> UDABatch:
        """Return the same block with every tensor on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> UDABatch:
        """Return the same block in page-locked memory, for ``to`` not to wait (``Trainer.next_batches``, on a GPU)."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> UDABatch:
        """Return the same block with every tensor changed."""
        return map_tensors(self, change)


Record = TypeVar("Record", bound="DataclassInstance")


def tensors_of(record: DataclassInstance) -> dict[str, Tensor]:
    """Return the tensors of a dataclass by name, those in its mappings too ("field/name")."""
    found: dict[str, Tensor] = {}
    for name, value in ((f.name, getattr(record, f.name)) for f in fields(record)):
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            found |= {f"{name}/{key}": tensor for key, tensor in value.items()}
    return found


def map_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """Return the same dataclass with every tensor changed, those in its mappings too."""
    changed: dict[str, Any] = {}
    for name, value in ((f.name, getattr(record, f.name)) for f in fields(record)):
        if isinstance(value, Tensor):
            changed[name] = change(value)
        elif isinstance(value, Mapping):
            changed[name] = {key: change(tensor) for key, tensor in value.items()}
    return replace(record, **changed)
