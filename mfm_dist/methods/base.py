"""What a UDA method is: named loss terms over one micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mfm_dist.methods.self_training import PseudoTarget, cross_entropy
from mfm_dist.models.segmentor import Segmentor


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """All that a loss term may look at, on the device."""

    source_image: Tensor
    """float32 [B, 3, H, W], normalised."""
    source_label: Tensor
    """uint8 [B, H, W]."""
    target_image: Tensor
    """float32 [B, 3, H, W], normalised, neither mixed nor augmented."""
    pseudo: PseudoTarget | None
    """The teacher's answer to ``target_image``; None where nothing asks for it."""
    seed: int
    """Seed of the run."""
    block: int
    """Index of the micro-batch: key of what is drawn once per micro-batch."""
    positions: range
    """Position of each sample: key of what is drawn once per sample."""


Term = Callable[[Segmentor, StepInputs], Tensor]
"""From the student and the inputs to one scalar loss. Every term is a forward of its own, because BatchNorm's batch
statistics are part of the published algorithms."""


class Method(ABC):
    """A UDA method. One file of this folder is one method and has a ``build(config)`` that returns it."""

    needs_teacher: ClassVar[bool]
    """Whether a term reads ``StepInputs.pseudo``."""
    supervised_on: ClassVar[Literal["source", "target"]] = "source"
    """The domain whose labels train the student."""

    @abstractmethod
    def terms(self) -> Mapping[str, Term]:
        """Loss terms by name, in the order they run. The total loss is their sum.

        The last one must reach every parameter of the student: under DDP with ``memory.lean`` it is in its backward
        that the ranks exchange gradients.
        """


def source_term(student: Segmentor, inputs: StepInputs) -> Tensor:
    """L_sup: supervised cross-entropy on labelled images."""
    return cross_entropy(student(inputs.source_image), inputs.source_label)
