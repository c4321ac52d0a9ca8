"""Student, teacher and Rebuilder in one module, whose forward is the paper's training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mfm_dist.batch import UDABatch
from mfm_dist.config.schema import RunConfig
from mfm_dist.methods.augment import normalise
from mfm_dist.methods.base import Method, StepInputs, Term
from mfm_dist.methods.mfm import mfm_term
from mfm_dist.methods.self_training import PseudoTarget, pseudo_target
from mfm_dist.models.rebuilder import Rebuilder
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.rng import Stream, keyed_seed


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gives: the scalar to run backward from, and the numbers to log."""

    total: Tensor
    """Sum of the weighted terms that ran, with its graph."""
    losses: dict[str, Tensor]
    """Each of them by name, unweighted and detached; ``pseudo_weight`` stands among them where there is a teacher."""
    inputs: StepInputs
    """What the terms looked at, teacher targets included; a later call for the same batch takes it."""


class TrainModule(nn.Module):
    """The only module the engine wraps, and ``forward`` its only way in, so that no gradient bypasses DDP or ZeRO."""

    def __init__(self, *, student: Segmentor, rebuilder: Rebuilder | None, method: Method, config: RunConfig) -> None:
        super().__init__()
        self.student = student
        self.teacher = Teacher(student) if method.needs_teacher or rebuilder is not None else None
        self.rebuilder = rebuilder
        self.method = method
        self.config = config

    @property
    def term_names(self) -> tuple[str, ...]:
        """The terms of the loss, in the order they run."""
        return tuple(self.terms(mfm_weight=0.0))

    def forward(
        self, batch: UDABatch, mfm_weight: float, only: str | None = None, inputs: StepInputs | None = None
    ) -> StepOutput:
        """One micro-batch: L = L_sup + L_uda + lambda * L_mfm (MFM, section 3).

        The terms may also run one by one, in their order, each in a call of its own: the same numbers, draws and
        BatchNorm statistics, but a graph that the engine can free before the next term.

        Args:
            batch: one block, on the device.
            mfm_weight: lambda at this step; at 0 the term still runs, because ZeRO-3 would update an unused
                parameter with its previous gradient.
            only: name of the one term to run, None for all.
            inputs: of the previous term's output, so that the teacher is asked once for a batch.
        """
        inputs = inputs or self.step_inputs(batch)
        losses: dict[str, Tensor] = {}
        weighted: list[Tensor] = []
        for index, (name, (weight, term)) in enumerate(self.terms(mfm_weight).items()):
            if only in (None, name):
                # Dropout and drop-path depend on block and term alone, never on a rank or on what ran before.
                torch.manual_seed(keyed_seed(self.config.seed, Stream.FORWARD, batch.block, index))
                losses[name] = term(self.student, inputs)
                weighted.append(weight * losses[name])

        logged = {name: loss.detach() for name, loss in losses.items()}
        if inputs.pseudo is not None:
            logged["pseudo_weight"] = inputs.pseudo.weight.amax()
        return StepOutput(total=torch.stack(weighted).sum(), losses=logged, inputs=inputs)

    def terms(self, mfm_weight: float) -> dict[str, tuple[float, Term]]:
        """Weight and function of each term: those of the method, L_sup + L_uda, then L_mfm."""
        terms = {name: (1.0, term) for name, term in self.method.terms().items()}
        if self.rebuilder is not None:
            counts_in_bn = self.config.mfm.update_bn and mfm_weight > 0
            terms["mfm"] = (mfm_weight, partial(self.masked_features_term, counts_in_bn=counts_in_bn))
        return terms

    def masked_features_term(self, student: Segmentor, inputs: StepInputs, *, counts_in_bn: bool) -> Tensor:
        """L_mfm, which leaves the student's running statistics alone unless it ``counts_in_bn``."""
        assert self.rebuilder is not None
        with nullcontext() if counts_in_bn else batch_norm_untracked(student):
            return mfm_term(student, self.rebuilder, inputs, self.config.mfm)

    def step_inputs(self, batch: UDABatch) -> StepInputs:
        """What the terms look at, the teacher's targets included."""
        target_image = normalise(batch.target_image)
        return StepInputs(
            source_image=normalise(batch.source_image),
            source_label=batch.source_label,
            target_image=target_image,
            pseudo=self.pseudo_target(target_image, batch.target_valid),
            seed=self.config.seed,
            block=batch.block,
            positions=batch.positions,
        )

    def pseudo_target(self, image: Tensor, valid: Tensor) -> PseudoTarget | None:
        """The teacher's label and weight for a clean target image, without gradients."""
        if self.teacher is None:
            return None
        with torch.no_grad():
            return pseudo_target(self.teacher(image), valid, self.config.self_training.pseudo_threshold)


class Teacher(nn.Module):
    """A frozen copy of the student, later its exponential moving average (``distributed.teacher``).

    Dropout and drop-path are off, BatchNorm normalises with the statistics of the batch it sees, and its running
    statistics are neither read nor written: so does the published code (UDA_FACTS 2.1).
    """

    def __init__(self, student: Segmentor) -> None:
        super().__init__()
        self.segmentor = deepcopy(student).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Teacher:
        """Set the one mode a teacher has, whatever ``mode`` the modules around it are put in."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.train()
                module.track_running_stats = False
        self.training = mode
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, C, H, W] of a normalised image [B, 3, H, W]."""
        logits: Tensor = self.segmentor(image)
        return logits


@contextmanager
def batch_norm_untracked(module: nn.Module) -> Iterator[None]:
    """BatchNorm layers go on normalising with batch statistics, but leave their running statistics alone."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
