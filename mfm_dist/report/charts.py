"""Line charts: which curves a page shows, for one run and for several, and how they are drawn.

A chart is inline SVG that follows the page's colours, light or dark, and loads nothing.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mfm_dist.inference.unlabelled import FIGURES
from mfm_dist.report.run import Floats, Run

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
BUCKETS = 240
"""Points of a drawn curve at most; a longer one is cut into this many buckets."""
WIDTH = 400
"""Width in SVG units, about the pixels a chart is shown at, so that its text is as large as the page's."""
SERIES_COLOURS = 8
"""Colours of style.css (--series-0 ...); further lines repeat them with other dashes."""
LABEL_LENGTH = 22
LABEL_GAP = 13.0
"""Smallest distance of two labels, in SVG units."""
SAME_END = 0.04
"""Share of the steps by which two lines may end apart and have their labels side by side."""
INK, GRID = "#010101", "#020202"
"""Stand-ins that become the page's variables; matplotlib wants real colours. A series' is "#0300" and its number."""
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: finite values or NaN by step."""

    label: str
    steps: Floats
    values: Floats
    colour: int
    """Number of its colour and dashes: the same run keeps them in every chart."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What to draw, and the words around it."""

    title: str
    caption: str
    lines: Sequence[Line]
    scale: str = "linear"
    """linear, from_zero, or log."""
    markers: bool = False
    height: int = 236
    """In SVG units; the width is ``WIDTH``."""


class Envelope(NamedTuple):
    """A curve in at most ``BUCKETS`` points, none of whose extremes are lost."""

    steps: Floats
    mean: Floats
    low: Floats
    high: Floats


def run_charts(run: Run) -> list[Chart]:
    """Return what was logged, one chart a quantity; a quantity that was not logged has none."""
    charts = []
    for prefix, title, caption, scale in QUANTITIES:
        charts += _chart(title, caption, _merged(run, prefix), scale)
    return charts


def compared_charts(runs: Sequence[Run], letters: Sequence[str]) -> list[Chart]:
    """Return one chart a logged name, one line a run, named by its letter, without learning rates that are equal."""
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
    """Return mIoU over steps, if there is any."""
    series = [
        (np.array([float(one.step) for one in run.evaluations]), np.array([one.miou for one in run.evaluations]))
        for run in runs
    ]
    charts = _chart("Target mIoU over training", "%, on the validation images", _by_run(series, labels), "from_zero")
    return [replace(chart, markers=True, height=height) for chart in charts]


def unlabelled_charts(runs: Sequence[Run], labels: Sequence[str]) -> list[Chart]:
    """Return what evaluations without target labels saw: one chart of one run, or one a figure of several."""

    def series(run: Run, name: str) -> tuple[Floats, Floats]:
        found = [(float(one.step), one.unlabelled[name]) for one in run.evaluations if name in one.unlabelled]
        return np.array([step for step, _ in found]), np.array([value for _, value in found])

    caption = "on target images without labels, 0 to 1; no accuracy"
    if len(runs) == 1:
        lines = _by_run([series(runs[0], name) for name in FIGURES], list(map(spoken, FIGURES)))
        charts = _chart("Without target labels", caption, lines, "from_zero")
    else:
        charts = []
        for name, words in FIGURES.items():
            lines = _by_run([series(run, name) for run in runs], labels)
            charts += _chart(f"Without target labels: {spoken(name)}", f"{words}; {caption}", lines, "from_zero")
    return [replace(chart, markers=True, height=300 if len(runs) == 1 else chart.height) for chart in charts]


def spoken(name: str) -> str:
    """Return the name of a figure for people."""
    return name.replace("_", "-")


def _by_run(series: Sequence[tuple[Floats, Floats]], labels: Sequence[str]) -> list[Line]:
    return [
        Line(label=label, steps=steps, values=values, colour=number)
        for number, (label, (steps, values)) in enumerate(zip(labels, series, strict=True))
    ]


def _label(key: str, prefix: str) -> str:
    return key.removeprefix(prefix) if prefix.endswith("/") else {"pseudo_weight": "weight"}.get(key, "images/s")


def _merged(run: Run, prefix: str) -> list[Line]:
    """Return a line for each logged name; names with equal values share one, as the rates of some groups do."""
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


def envelope(steps: Floats, values: Floats) -> Envelope:
    """Return mean, minimum and maximum of the finite values of each bucket of consecutive points.

    A bucket without any finite value is NaN, which leaves a gap in the curve.
    """
    if len(steps) <= BUCKETS:
        return Envelope(steps, values, values, values)
    edges = np.linspace(0, len(steps), BUCKETS + 1).astype(int)
    parts = [(steps[a:b], values[a:b]) for a, b in pairwise(edges)]
    rows = []
    for at, part in parts:
        finite = part[np.isfinite(part)]
        middle = float(at[len(at) // 2])
        rows.append((middle, finite.mean(), finite.min(), finite.max()) if len(finite) else (middle, *[math.nan] * 3))
    rows[0] = (float(steps[0]), *rows[0][1:])
    rows[-1] = (float(steps[-1]), *rows[-1][1:])
    return Envelope(*(np.array(column) for column in zip(*rows, strict=True)))


def draw(chart: Chart, identity: str) -> str:
    """Draw the chart as an ``<svg>`` element. ``identity`` is a word that no other chart of the page has."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rc("svg", fonttype="none", hashsalt=identity)
        matplotlib.rc("text", parse_math=False)
        matplotlib.rc("font", size=11)
        warnings.simplefilter("ignore")  # letters that matplotlib's own font lacks; the reader's browser has them
        figure = Figure(figsize=(WIDTH / 72, chart.height / 72))
        labels = [_shortened(line.label) for line in chart.lines]
        right = 16 + 6.4 * max(map(len, labels), default=0)
        axes = figure.add_axes((46 / WIDTH, 30 / chart.height, 1 - (46 + right) / WIDTH, 1 - 40 / chart.height))
        for line in chart.lines:
            _draw_line(axes, line, chart)
        _dress(axes, chart)
        _label_ends(axes, chart, labels)
        buffer = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    return _inline(buffer.getvalue(), identity, describe(chart))


def describe(chart: Chart) -> str:
    """Put the chart in words, for those who do not see it."""
    parts = [f"{chart.title}."]
    for line in chart.lines:
        finite = line.values[np.isfinite(line.values)]
        if len(finite):
            steps = line.steps[np.isfinite(line.values)]
            parts.append(
                f"{line.label}: {short_number(finite[0])} at step {steps[0]:,.0f}, {short_number(finite[-1])} at step "
                f"{steps[-1]:,.0f}, lowest {short_number(finite.min())}, highest {short_number(finite.max())}."
            )
    return " ".join(parts)


def short_number(value: float) -> str:
    """Write about three digits: 1,234 and 0.25, but 2.5e-4."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _draw_line(axes: Axes, line: Line, chart: Chart) -> None:
    colour = _colour(line)
    points = envelope(line.steps, line.values)
    mean = points.mean
    if chart.scale == "log":  # what is not positive leaves a gap
        mean = np.where(mean > 0, mean, math.nan)
    if points.low is not points.high:
        axes.fill_between(points.steps, points.low, points.high, color=colour, alpha=0.22, linewidth=0)
    dashes = DASHES[line.colour // SERIES_COLOURS % len(DASHES)]
    # A value between two gaps would not show as a line.
    marker = "o" if chart.markers or np.isfinite(mean).sum() < 3 else ""
    axes.plot(
        points.steps, mean, color=colour, linewidth=1.9, linestyle=dashes, marker=marker, markersize=4.5,
        clip_on=chart.scale == "log",
    )  # fmt: skip


def _dress(axes: Axes, chart: Chart) -> None:
    """Draw axes without a box: a faint grid, few numbers, no ticks."""
    finite = np.concatenate([line.values[np.isfinite(line.values)] for line in chart.lines])
    positive = finite[finite > 0]
    if chart.scale == "log" and len(positive):
        axes.set_yscale("log")
        # A term that starts at nothing must not squeeze the others into a strip.
        usual = min(float(np.median(line.values[line.values > 0])) for line in chart.lines if (line.values > 0).any())
        bottom = max(positive.min(), usual / 10)
        axes.set_ylim(bottom / 1.25, positive.max() * 1.25)
        wide = positive.max() / bottom > 50
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if chart.scale == "from_zero":
            axes.set_ylim(0, max(finite.max(initial=0.0) * 1.08, 1e-9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    last = max(float(line.steps[-1]) for line in chart.lines)
    axes.set_xlim(0, max(last, 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value else "step 0"))
    axes.tick_params(length=0, labelcolor=INK, pad=6)
    axes.tick_params(axis="x", pad=8)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)


def _label_ends(axes: Axes, chart: Chart, labels: Sequence[str]) -> None:
    """Write each line's name where it ends, moved up or down where two would overlap."""
    ends = []
    to_axes = axes.transData + axes.transAxes.inverted()
    for number, line in enumerate(chart.lines):
        visible = np.isfinite(line.values) & ((line.values > 0) | (chart.scale != "log"))
        if visible.any():
            x, y = to_axes.transform((line.steps[visible][-1], line.values[visible][-1]))
            ends.append((1.0 if x > 1 - SAME_END else float(x), float(np.clip(y, 0, 1)), number))
    gap = LABEL_GAP / (axes.get_position().height * chart.height)
    for _, group in groupby(sorted(ends), key=lambda one: round(one[0] / SAME_END)):
        together = list(group)
        places = spread([y for _, y, _ in together], gap)
        for (x, _, number), place in zip(together, places, strict=True):
            axes.annotate(
                labels[number], (x, place), (9, 0), xycoords="axes fraction", textcoords="offset points", va="center",
                color=_colour(chart.lines[number]), fontweight="bold",
            )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move places on an axis from 0 to 1, lowest first, up so far that they are ``gap`` apart, then down if need be."""
    apart = list(places)
    for index in range(1, len(apart)):
        apart[index] = max(apart[index], apart[index - 1] + gap)
    if apart and apart[-1] > 1.02:
        apart[-1] = 1.02
        for index in range(len(apart) - 2, -1, -1):
            apart[index] = min(apart[index], apart[index + 1] - gap)
    return apart


def _colour(line: Line) -> str:
    return f"#0300{line.colour % SERIES_COLOURS:02x}"


def _shortened(label: str) -> str:
    """Keep at most ``LABEL_LENGTH`` letters, without the control characters that XML forbids."""
    printable = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in label)
    return printable if len(printable) <= LABEL_LENGTH else printable[: LABEL_LENGTH - 1] + "…"


def _inline(document: bytes, identity: str, description: str) -> str:
    """Turn matplotlib's file into an element: no prolog, no name spaces, ids of its own, the page's colours."""
    root = ElementTree.fromstring(document)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            value = re.sub(r"url\(#", f"url(#{identity}-", value)
            if name == "id":
                value = f"{identity}-{value}"
            if name.endswith("href"):
                name, value = "href", f"#{identity}-{value.removeprefix('#')}"
            if name == "style":
                value = _page_colours(value)
            element.set(name, value)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", description)
    return ElementTree.tostring(root, encoding="unicode")


def _page_colours(style: str) -> str:
    style = style.replace(INK, "var(--quiet)").replace(GRID, "var(--rule)")
    style = re.sub(r"#0300([0-9a-f]{2})", lambda found: f"var(--series-{int(found[1], 16)})", style)
    # The size stays matplotlib's; the face is the page's.
    return re.sub(r"font: ((?:bold |\d+ )?)([\d.]+px)[^;]*", lambda m: f"font: {m[1]}{m[2]} var(--face)", style)
