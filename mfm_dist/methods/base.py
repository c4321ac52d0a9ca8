"""What a UDA method is: named loss terms over one micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from mfm_dist.classes import ClassSet
from mfm_dist.methods.losses import cross_entropy
from mfm_dist.methods.self_training import PseudoTarget
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.rng import Keyed


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """All that a loss term may look at, on the device."""

    source_image: Tensor
    """float32 [B, 3, H, W], normalised."""
    source_label: Tensor
    """uint8 [B, H, W]."""
    target_image: Tensor
    """float32 [B, 3, H, W], normalised, neither mixed nor augmented."""
    target_valid: Tensor
    """bool [B, H, W]; False on padding, where a pseudo-label means nothing."""
    labelled_target_image: Tensor | None = None
    """float32 [B, 3, H, W], normalised: of ``data.target_labelled``; None where there are none."""
    labelled_target_label: Tensor | None = None
    """uint8 [B, H, W], their label."""
    pseudo: PseudoTarget | None = None
    """The teacher's answer to ``target_image``; None where nothing asks for it, and before it was asked."""
    initial_feature: Tensor | None = None
    """The initial encoder's last map of ``source_image``, [B, C, h, w]; None likewise."""
    classes: ClassSet
    """Of the labels."""
    seed: int
    """Seed of the run."""
    block: int
    """Index of the micro-batch: key of what is drawn once per micro-batch."""
    positions: range
    """Position of each sample: key of what is drawn once per sample."""
    draws: Mapping[str, Tensor]
    """What MFM, dropout and HRDA's windows draw for this micro-batch and what ``Method.draws`` gave for it, or the
    images that ``Method.prepare`` made of that."""
    dropout: Tensor
    """Masks, 0 or 1 / (1 - p): [passes, images of a pass, 2 B, channels of all layers]."""
    mfm_weight: Tensor
    """Lambda, a float32 scalar: what a graph of the step reads anew at every replay."""
    mean: Tensor
    """[1, 3, 1, 1], of RGB in 0..255, what images were normalised with."""
    std: Tensor
    """[1, 3, 1, 1], likewise."""

    def drawn(self, name: str) -> dict[str, Tensor]:
        """Return the draws that were ``named`` so."""
        return {key.removeprefix(f"{name}/"): value for key, value in self.draws.items() if key.startswith(f"{name}/")}

    def with_made(self, name: str, made: Mapping[str, Tensor]) -> StepInputs:
        """Return the same with tensors of this name in the place of the draws that they were made of."""
        others = {key: value for key, value in self.draws.items() if not key.startswith(f"{name}/")}
        return replace(self, draws={**others, **named(name, made)})


def named(name: str, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put ``name/`` before what was drawn, for ``StepInputs.drawn`` to find."""
    return {f"{name}/{key}": value for key, value in draws.items()}


class ForwardKind(IntEnum):
    """The student forwards of a step. The value is part of the key of what a forward draws for itself."""

    SOURCE = 0
    MIXED = 1
    MASKED = 2
    MFM = 3
    MFM_SOURCE = 4
    MFM_DETAIL = 5
    MFM_SOURCE_DETAIL = 6
    TARGET_LABELLED = 7

    @property
    def label(self) -> str:
        """The name of its loss in metrics."""
        return self.name.lower()


class Loss(NamedTuple):
    """One summand of the total loss."""

    value: Tensor
    """Scalar with its graph; logged as it is."""
    weight: float | Tensor = 1.0
    """What it is multiplied with in the total."""


Maps = Iterator[list[Tensor]]
"""Encoder maps of each image of a pass, in order; those that nobody has encoded yet are encoded when they are taken."""


class Pass(NamedTuple):
    """One forward of the student: what its encoder is to see, and what is made of the answer.

    In two halves, so that the images of all passes of a step can be encoded in one call. Whatever normalises with the
    statistics of a batch sees a pass by itself, because these statistics are part of the published algorithms.
    """

    images: list[Tensor]
    """Each [B, 3, h, w], normalised."""
    losses: Callable[[Maps], dict[str, Loss]]
    """From the encoder maps of each of these images to losses by name."""

    def weighted(self, weight: float) -> Pass:
        """Return the same pass with all of its losses weighed by this, too."""

        def losses(maps: Maps) -> dict[str, Loss]:
            return {name: Loss(loss.value, weight * loss.weight) for name, loss in self.losses(maps).items()}

        return self._replace(losses=losses)


class Term(Protocol):
    """From the student and the inputs to the pass whose losses the term is."""

    def __call__(self, student: Segmentor, inputs: StepInputs, /) -> Pass: ...


class Classify(Protocol):
    """How images [B, 3, H, W] are classified and compared with labels [B, H, W], each pixel weighed by [B, H, W].

    The first image of the pass is the whole one as the encoder sees it.
    """

    def __call__(
        self,
        student: Segmentor,
        inputs: StepInputs,
        kind: ForwardKind,
        image: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        /,
    ) -> Pass: ...


def classify(
    student: Segmentor,
    inputs: StepInputs,  # noqa: ARG001 - where two resolutions are trained, it keys a draw
    kind: ForwardKind,
    image: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    /,
) -> Pass:
    """Compute cross-entropy at one resolution; the loss enlarges the decoder's logits, once and in fp32."""

    def losses(maps: Maps) -> dict[str, Loss]:
        return {kind.label: Loss(cross_entropy(student.decode(next(maps)), label, weight))}

    return Pass([image], losses)


class Method(ABC):
    """A UDA method. One file of this folder is one method and has a ``build(config)`` that returns it."""

    needs_teacher: bool
    """Whether a term reads ``StepInputs.pseudo``."""
    needs_initial_encoder: bool = False
    """Whether a term reads ``StepInputs.initial_feature``."""
    supervised_on: ClassVar[Literal["source", "target"]] = "source"
    """The domain whose labels train the student."""
    classify: Classify = staticmethod(classify)
    """How every term of the method classifies."""

    @abstractmethod
    def terms(self) -> Mapping[str, Term]:
        """Return loss terms by name, in the order they run. The total loss is their weighted sum.

        The last one must reach every parameter of the student: under DDP with ``memory.lean`` it is in its backward
        that the ranks exchange gradients.
        """

    def draws(self, key: Keyed, size: tuple[int, int]) -> dict[str, Tensor]:  # noqa: ARG002 - nothing to draw
        """Draw, on the CPU, the tensors that the terms need for a micro-batch.

        Args:
            key: what every draw depends on, and nothing else.
            size: height and width of the crop.
        """
        return {}

    def prepare(self, inputs: StepInputs) -> StepInputs:
        """Put images that the terms look at, such as mixed ones, in the place of what was drawn for them.

        No network is asked. What differs from one micro-batch to the next by more than the values of tensors, such as
        whether and how far to blur, belongs here; what follows can be captured in a graph and replayed.
        """
        return inputs

    def source_term(self, student: Segmentor, inputs: StepInputs) -> Pass:
        """Compute L_sup: supervised cross-entropy on labelled images."""
        return self.classify(student, inputs, ForwardKind.SOURCE, inputs.source_image, inputs.source_label)
