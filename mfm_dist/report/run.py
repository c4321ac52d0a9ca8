"""What a run folder says, as plain values. Nothing in it is trusted to be whole, or to be of the expected kind."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mfm_dist.classes import ClassSet
from mfm_dist.config.class_files import DEFAULT, load_class_set
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import ConfigError, CorruptFileError, StorageError
from mfm_dist.run.folder import CLASSES, PROBE, read_config
from mfm_dist.storage import JsonLines, read_json

Floats = npt.NDArray[np.float64]


class Evaluation(NamedTuple):
    """One file of eval/."""

    step: int
    miou: float
    """Percent; NaN if unknown."""
    iou: dict[str, float]
    """Percent by class name; NaN for a class that does not occur."""
    images: int | None
    source_miou: float
    """Percent; NaN if no labelled source images were scored."""
    unlabelled: dict[str, float]
    """What there is to say of target images without labels, by name; empty where they have some."""
    boundary_miou: float
    """Percent; NaN if unknown."""
    boundary_iou: dict[str, float]
    """Percent by class name; NaN where unknown."""
    confusion: Floats | None
    """Pixels by true class (row) and predicted class (column), [C, C]; None if unknown."""

    def score(self, name: str) -> float:
        """Return the IoU of a class; NaN for one that is none of the run's."""
        return self.iou.get(name, math.nan)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder, read."""

    path: Path
    name: str
    config: RunConfig | None
    classes: ClassSet
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl with a step, by step."""
    evaluations: list[Evaluation]
    """By step."""
    events: list[dict[str, Any]]
    environment: dict[str, Any]
    outcome: dict[str, Any]
    probe: dict[str, Any]
    """What tools/probe_rebuilder.py measured; empty if it was not run."""
    written: datetime
    """When the newest of the small files was last changed, UTC."""
    problems: list[str] = field(default_factory=list)
    """What is missing or could not be read, a sentence each."""

    @property
    def unlabelled(self) -> bool:
        """True where the target has no labels, by the last evaluation, or by the settings before there is one."""
        if self.last is not None:
            return bool(self.last.unlabelled)
        return self.config is not None and self.config.data.validation is None

    @property
    def first(self) -> Evaluation | None:
        """The evaluation at the lowest step, if there are two at least to tell apart."""
        return self.evaluations[0] if len(self.evaluations) > 1 else None

    @property
    def last(self) -> Evaluation | None:
        """The evaluation at the highest step."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the highest mIoU, the first of equals."""
        return max((one for one in self.evaluations if one.miou == one.miou), key=lambda one: one.miou, default=None)

    @property
    def gain(self) -> float:
        """Change of the mIoU from the first to the last evaluation, in points; NaN if there are not two."""
        return self.last.miou - self.first.miou if self.first and self.last else math.nan

    @property
    def step(self) -> int | None:
        """The last step that left a trace."""
        steps = [*(line["step"] for line in self.metrics[-1:]), *(one.step for one in self.evaluations[-1:])]
        return max(steps, default=None)

    def keys(self, prefix: str) -> list[str]:
        """Return the names of logged values that begin with ``prefix``, in the order they first occur."""
        return [key for key in dict.fromkeys(key for line in self.metrics for key in line) if key.startswith(prefix)]

    def series(self, key: str) -> tuple[Floats, Floats]:
        """Return steps and values of the lines that have ``key``; NaN where the value was not finite."""
        lines = [line for line in self.metrics if key in line]
        return np.array([float(line["step"]) for line in lines]), np.array([finite_or_nan(line[key]) for line in lines])

    def median(self, key: str) -> float:
        """Return the median of the finite values logged under ``key``; NaN if there are none."""
        values = self.series(key)[1]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else math.nan


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs, each named by as much of the end of its path as tells it from the others.

    Raises:
        ConfigError: naming every folder that is none of a run, or that is given twice.
    """
    no_runs = [folder for folder in folders if not (folder / "config.yaml").is_file()]
    problems = [f"{folder}: no run folder (it has no config.yaml)" for folder in no_runs]
    resolved = [folder.resolve() for folder in folders]
    problems += [f"{folder}: given twice" for folder in dict.fromkeys(folders) if resolved.count(folder.resolve()) > 1]
    if problems:
        raise ConfigError(problems)
    return [_read(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]


def _names(resolved: list[Path]) -> list[str]:
    deepest = max(len(path.parts) for path in resolved)
    # A folder that is called by its seed alone says little without the one it lies in.
    first = 2 if any(re.fullmatch(r"(seed[_-]?)?\d+", path.name) for path in resolved) else 1
    for depth in range(first, deepest):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]


def _read(folder: Path, name: str) -> Run:
    problems: list[str] = []
    config = None
    try:
        config = read_config(folder)
    except ConfigError as error:
        problems.append(f"config.yaml does not fit this version, so settings and pictures are missing: {error}")
    classes = _class_set(folder / CLASSES, problems)
    lines = _objects(folder / "metrics.jsonl", problems)
    metrics = {line["step"]: line for line in lines if _is_step(line.get("step"))}
    small_files = [path for path in (*folder.glob("*.json*"), *folder.glob("eval/*.json")) if path.is_file()]
    return Run(
        path=folder,
        name=name,
        config=config,
        classes=classes,
        metrics=[metrics[step] for step in sorted(metrics)],
        evaluations=_evaluations(folder / "eval", classes, problems),
        events=_objects(folder / "events.jsonl", problems),
        environment=next(iter(_objects(folder / "environment.json", problems)), {}),
        outcome=next(iter(_objects(folder / "outcome.json", problems)), {}),
        probe=next(iter(_objects(folder / PROBE, problems)), {}),
        written=datetime.fromtimestamp(
            max(path.stat().st_mtime for path in (folder / "config.yaml", *small_files)), tz=timezone.utc
        ),
        problems=problems,
    )


def _class_set(path: Path, problems: list[str]) -> ClassSet:
    """Read the classes of a run; those of runs from before they were a matter of the data are ``DEFAULT``."""
    try:
        return ClassSet.from_tree(read_json(path), path.name)
    except FileNotFoundError:
        problems.append(f"{path.name} is not there: the classes are taken for those of {DEFAULT}.")
    except (OSError, CorruptFileError, ConfigError) as error:
        problems.append(f"{path.name} cannot be read, so the classes are taken for those of {DEFAULT}: {error}")
    return load_class_set(DEFAULT)


def _objects(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Return the objects that the lines of a file hold, or the one of a whole file; none where there are none."""
    if not path.is_file():
        problems += _ABSENT.get(path.name, [])
        return []
    try:
        found = JsonLines(path) if path.suffix == ".jsonl" else [read_json(path)]
        return list(found)
    except (OSError, StorageError, CorruptFileError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return []


_ABSENT = {
    "metrics.jsonl": ["metrics.jsonl is not there yet: nothing has been logged."],
    "environment.json": ["environment.json is not there: machine, versions and revision are unknown."],
    "outcome.json": ["outcome.json is not there: the run goes on, or was killed."],
}


def _evaluations(folder: Path, classes: ClassSet, problems: list[str]) -> list[Evaluation]:
    found = []
    for path in sorted(folder.glob("step_*.json")):
        try:
            content = read_json(path)
            step, miou, iou, images = (content[key] for key in ("step", "miou", "iou", "images"))
            if not _is_step(step) or not isinstance(iou, dict):
                raise ValueError("step or iou is of the wrong kind")
        except (OSError, ValueError, KeyError, CorruptFileError) as error:
            problems.append(f"eval/{path.name} cannot be read ({type(error).__name__}: {error}).")
            continue
        by_class = {name: finite_or_nan(iou.get(name)) for name in classes.names}
        seen = content.get("unlabelled")
        unlabelled = {name: finite_or_nan(value) for name, value in seen.items()} if isinstance(seen, dict) else {}
        counted = images if isinstance(images, int) else None
        of_source, of_boundary = (finite_or_nan(content.get(key)) for key in ("source_miou", "boundary_miou"))
        listed = content.get("boundary_iou")
        boundary = listed if isinstance(listed, dict) else {}
        found.append(
            Evaluation(
                step,
                finite_or_nan(miou),
                by_class,
                counted,
                of_source,
                unlabelled,
                of_boundary,
                {name: finite_or_nan(boundary.get(name)) for name in classes.names},
                _confusion(content.get("confusion"), len(classes)),
            )
        )
    if not found:
        problems.append("There is no evaluation yet, so there is no mIoU.")
    return sorted(found, key=lambda one: one.step)


def _confusion(value: object, classes: int) -> Floats | None:
    """Return a matrix of counts, or None for anything else."""
    try:
        counts = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return counts if counts.shape == (classes, classes) and np.isfinite(counts).all() and (counts >= 0).all() else None


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12


def finite_or_nan(value: object) -> float:
    """Return a finite float, or NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return math.nan
    return float(value)
