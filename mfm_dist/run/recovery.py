"""When a step must not be applied, and when a run must go back to its last checkpoint."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mfm_dist.checkpoint.progress import Progress
from mfm_dist.config.schema import RecoverySection
from mfm_dist.distributed.clipping import Ceilings
from mfm_dist.distributed.engine import Engine, StepResult
from mfm_dist.run.folder import RunFolder


def ceilings(progress: Progress, settings: RecoverySection) -> Ceilings:
    """Return loss and gradient norm above which the next step is a spike; none while too little is known."""
    if not settings.spike_factor or len(progress.losses) < settings.spike_window:
        return Ceilings()
    return Ceilings(
        loss=settings.spike_factor * statistics.median(progress.losses),
        grad_norm=settings.spike_factor * statistics.median(progress.grad_norms),
    )


def record_applied(progress: Progress, settings: RecoverySection, result: StepResult, step: int) -> None:
    """Count the step that ends with ``step`` as applied."""
    progress.applied += 1
    progress.skipped = 0
    if step > progress.furthest_failed_step:
        progress.rollbacks = 0
    if settings.spike_factor:
        progress.losses = [*progress.losses, float(result.loss)][-settings.spike_window :]
        progress.grad_norms = [*progress.grad_norms, float(result.grad_norms["total"])][-settings.spike_window :]


def why_skipped(loss: float, grad_norms: Mapping[str, float], limits: Ceilings, ranks: Sequence[int]) -> str:
    """Say in one line why a step was not applied.

    Args:
        loss: mean over the global batch.
        grad_norms: by part, and ``total``.
        ranks: those whose own loss is not finite.
    """
    if not math.isfinite(loss):
        return f"loss not finite on rank {', '.join(map(str, ranks))}"
    broken = [part for part, norm in grad_norms.items() if part != "total" and not math.isfinite(norm)]
    if broken or not math.isfinite(grad_norms["total"]):
        return f"gradient of {', '.join(broken) or 'all parts together'} not finite (loss {loss:.4g})"
    if loss > limits.loss:
        return f"loss {loss:.4g} above {limits.loss:.4g}, recovery.spike_factor times the median of the last steps"
    norm, limit = grad_norms["total"], limits.grad_norm
    return f"gradient norm {norm:.4g} above {limit:.4g}, recovery.spike_factor times the median of the last steps"


class SkippedSteps:
    """Names every step that was not applied, once for all ranks."""

    def __init__(self, engine: Engine, run: RunFolder) -> None:
        self.engine = engine
        self.run = run
        self.reason = ""
        """Of the last one."""

    def record(self, result: StepResult, limits: Ceilings, own_losses: Sequence[Tensor], step: int) -> None:
        """Say why the step that ends with ``step`` was not applied. Collective.

        Args:
            limits: what the step was held to.
            own_losses: of this rank's micro-batches.
        """
        finite = all(bool(torch.isfinite(loss)) for loss in own_losses)
        ranks = [rank for rank, fine in enumerate(self.engine.gather_objects(finite)) if not fine]
        norms = {part: float(norm) for part, norm in result.grad_norms.items()}
        self.reason = why_skipped(float(result.loss), norms, limits, ranks)
        self.run.event("skipped_step", step=step, reason=self.reason)


def must_roll_back(progress: Progress, settings: RecoverySection) -> bool:
    """Tell whether so many steps in a row were not applied that the weights are no place to go on from."""
    return bool(settings.rollback_after) and progress.skipped >= settings.rollback_after


def gone_back(progress: Progress, saved: Progress) -> Progress:
    """Return progress after going back to ``saved``: its step and its memory, but the data goes on from where it is."""
    return replace(
        saved,
        block=progress.block,
        skipped=0,
        rollbacks=progress.rollbacks + 1,
        furthest_failed_step=max(progress.step, progress.furthest_failed_step),
        rollback_step=saved.step,
    )


def diagnosis(progress: Progress, reason: str) -> str:
    """Tell the person whose run ends that going back does not help, and what to try."""
    return (
        f"step {progress.step}: {progress.skipped} steps in a row could not be applied, the last because: {reason}. "
        f"The run went back {progress.rollbacks} times, further each time as far as there were checkpoints, at last to "
        f"step {progress.rollback_step}, and came here again, each time with other data. Try a lower optim.lr or "
        "optim.rebuilder_lr, train.clip_norm or train.clip_parts, a smaller mfm.loss_weight or a ramp, or "
        "train.precision=fp32; then start the same command again"
    )
