"""Which curves a page shows, for one run and for several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mfm_dist.report.run import Floats, Run
from mfm_dist.report.svg import Chart, Line

MOST_LINES = 8
"""Lines of one chart; what is beyond them is counted in the caption."""

LOG_FROM = 10
"""Largest over smallest value from which a logarithmic axis says more than one from 0."""

QUANTITIES = (
    ("loss/", "Loss by term", "unweighted terms; total is their weighted sum", "log"),
    ("pseudo_weight", "Pseudo-weight", "share of target pixels of which the teacher is sure", "from_zero"),
    ("grad_norm/", "Gradient norm", "global norm before clipping, of the last step before each line", "log"),
    ("lr/", "Learning rate", "by parameter group", "from_zero"),
    ("images_per_second", "Throughput", "source and target images a second, all processes", "from_zero"),
)
"""Prefix of the logged names, title, caption, scale."""


def run_charts(run: Run) -> list[Chart]:
    """What was logged, one chart a quantity; a quantity that was not logged has none."""
    charts = []
    for prefix, title, caption, scale in QUANTITIES:
        charts += _chart(title, caption, _merged(run, prefix), scale)
    return charts


def compared_charts(runs: Sequence[Run], letters: Sequence[str]) -> list[Chart]:
    """One chart a logged name, one line a run, named by its letter; equal learning rates are left out."""
    charts = []
    for prefix, title, caption, scale in QUANTITIES:
        keys = dict.fromkeys(key for run in runs for key in run.keys(prefix))
        for key in keys:
            lines = _by_run([run.series(key) for run in runs], letters)
            if prefix == "lr/" and all(_equal(lines[0], line) for line in lines if len(line.steps)):
                continue
            heading = f"{title.removesuffix(' by term')}: {_label(key, prefix)}" if len(keys) > 1 else title
            charts += _chart(heading, "" if prefix in ("loss/", "lr/") else caption, lines, scale)
    return charts


def miou_chart(runs: Sequence[Run], labels: Sequence[str], height: int) -> list[Chart]:
    """mIoU over steps, if there is any."""
    series = [
        (np.array([float(one.step) for one in run.evaluations]), np.array([one.miou for one in run.evaluations]))
        for run in runs
    ]
    charts = _chart("Target mIoU over training", "%, on the validation images", _by_run(series, labels), "from_zero")
    return [replace(chart, markers=True, height=height) for chart in charts]


def _by_run(series: Sequence[tuple[Floats, Floats]], labels: Sequence[str]) -> list[Line]:
    return [
        Line(label=label, steps=steps, values=values, colour=number)
        for number, (label, (steps, values)) in enumerate(zip(labels, series, strict=True))
    ]


def _label(key: str, prefix: str) -> str:
    return key.removeprefix(prefix) if prefix.endswith("/") else {"pseudo_weight": "weight"}.get(key, "images/s")


def _merged(run: Run, prefix: str) -> list[Line]:
    """A line for each logged name; names with equal values share one, as the rates of some groups do."""
    lines: list[Line] = []
    for key in run.keys(prefix):
        steps, values = run.series(key)
        line = Line(label=_label(key, prefix), steps=steps, values=values, colour=len(lines))
        twin = next((number for number, other in enumerate(lines) if _equal(line, other)), None)
        if twin is None:
            lines.append(line)
        # rebuilder and rebuilder_norm are told by the first name.
        elif not line.label.startswith(lines[twin].label):
            lines[twin] = replace(lines[twin], label=f"{lines[twin].label}, {line.label}")
    return lines


def _equal(one: Line, other: Line) -> bool:
    same_steps = np.array_equal(one.steps, other.steps)
    return same_steps and np.array_equal(one.values, other.values, equal_nan=True)


def _chart(title: str, caption: str, lines: Sequence[Line], scale: str) -> list[Chart]:
    drawable = [line for line in lines if np.isfinite(line.values).any()]
    if not drawable:
        return []
    words = [caption] if caption else []
    if scale == "log":
        values = np.concatenate([line.values[line.values > 0] for line in drawable])
        scale = "log" if len(values) and values.max() > LOG_FROM * values.min() else "from_zero"
        words += ["log scale"] if scale == "log" else []
    lost = sum(int(np.isnan(line.values).sum()) for line in lines)
    if lost:
        words.append(f"{lost:,} not finite and left out")
    if len(drawable) > MOST_LINES:
        words.append(f"the first {MOST_LINES} of {len(drawable)} lines")
    return [Chart(title=title, caption="; ".join(words), lines=drawable[:MOST_LINES], scale=scale)]
