"""The networks of a run folder, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mfm_dist.build import build_train_module
from mfm_dist.checkpoint import find_latest, load_modules, load_student
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import ConfigError
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.report.run import Run
from mfm_dist.train_module import TrainModule


@dataclass(frozen=True)
class Networks:
    """Networks of a run on the CPU, as far as there are any."""

    config: RunConfig
    overlays: Path
    """Folder of the pictures saved by the evaluation of step 0."""
    first: Segmentor | None
    """The student as it was at step 0, if the seed and a file at hand say what that was."""
    trained: TrainModule | None
    """Everything in the newest checkpoint."""
    step: int
    absent: str
    """Why there is no checkpoint; empty if there is one."""
    notes: tuple[str, ...] = ()
    """Damaged checkpoints that were passed over."""


def load_networks(run: Run, config: RunConfig) -> Networks:
    """The networks of a run folder; what cannot be loaded is absent, with the reason."""
    overlays = run.path / "eval" / "step_00000000"
    first = first_student(config)
    # The checkpoint brings all weights.
    config = replace(config, model=replace(config.model, pretrained=False, weights=None))
    networks = Networks(config, overlays, first=first, trained=None, step=0, absent="")
    said: list[str] = []
    try:
        module = build_train_module(config).requires_grad_(False)
        checkpoint = find_latest(run.path / "checkpoints", report=said.append)
        if checkpoint is None:
            reason = f"There is no complete checkpoint, so nothing trained can be shown. {' '.join(said)}".strip()
            return replace(networks, absent=reason)
        load_modules(checkpoint, module)
        # Evaluation's statistics: the mean over ranks rather than those of rank 0.
        load_student(checkpoint, module.student)
    except Exception as error:  # a damaged or foreign folder raises nearly every kind; the page says what
        return replace(networks, absent=f"The networks of this run cannot be loaded: {first_line(error)}")
    return replace(networks, trained=module.eval(), step=checkpoint.progress.step, notes=tuple(said))


def first_student(config: RunConfig) -> Segmentor | None:
    """The student before its first step, or None if it started from weights that are not here any more."""
    weights = config.model.weights
    if config.model.pretrained or (weights is not None and not weights.is_file()):
        return None
    try:
        return build_train_module(config).student.requires_grad_(False).eval()
    except ConfigError:  # another file of that name by now; what else may be wrong shows with the checkpoint
        return None


def first_line(error: Exception) -> str:
    """What an error says, without the lines that follow."""
    return f"{error}".strip().split("\n")[0] or type(error).__name__
