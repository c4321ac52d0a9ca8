"""From runs to the text of the page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mfm_dist.classes import CLASS_NAMES, PALETTE
from mfm_dist.errors import EXIT_DONE, EXIT_STOPPED
from mfm_dist.report.curves import compared_charts, miou_chart, run_charts
from mfm_dist.report.gallery import Gallery, compare_galleries, make_gallery
from mfm_dist.report.picture import RIGHT_COLOUR, WRONG_COLOUR, hexadecimal
from mfm_dist.report.run import Run
from mfm_dist.report.svg import Chart, draw
from mfm_dist.report.tables import differing_settings, environment, group_events, repeated, settings
from mfm_dist.report.views import ALL_VIEWS, HIDDEN_CELLS, MISTAKES, PSEUDO_LABEL

DASH = "\N{EN DASH}"
"""Stands for a figure that there is not."""


@dataclass(frozen=True)
class Headline:
    """The figures that a page opens with."""

    run: Run
    letter: str
    method: str
    seeds: str
    steps: str
    status: str
    finished: bool
    machine: str
    processes: str
    revision: str


def render(runs: Sequence[Run], *, images: int) -> str:
    """The whole page: of one run, or of several side by side.

    Args:
        images: validation images to show; 0 for none.
    """
    letters = [_letter(number) for number in range(len(runs))]
    single = len(runs) == 1
    gallery = Gallery(notes=["There are no pictures, because --images was 0."])
    if images:
        gallery = make_gallery(runs[0], images, ALL_VIEWS) if single else compare_galleries(runs, images)
    context: dict[str, Any] = {
        "heads": [_headline(run, letter) for run, letter in zip(runs, letters, strict=True)],
        "classes": list(zip(CLASS_NAMES, map(hexadecimal, PALETTE), strict=True)),
        "gallery": gallery,
        "shown": {
            "hatched": gallery.shows(PSEUDO_LABEL),
            "hidden": gallery.shows(HIDDEN_CELLS),
            "mistakes": gallery.shows(MISTAKES),
        },
        "right_and_wrong": (hexadecimal(RIGHT_COLOUR), hexadecimal(WRONG_COLOUR)),
        "events": [(run, group_events(run.events)) for run in runs],
        "environments": [environment(run) for run in runs],
        "made": datetime.now(timezone.utc),
        "miou_chart": _drawn(miou_chart(runs, ["mIoU"], 300) if single else miou_chart(runs, letters, 236), "miou"),
    }
    if single:
        run = runs[0]
        context |= {
            "run": run,
            "charts": _drawn(run_charts(run), "curve"),
            "settings": settings(run.config) if run.config else [],
            "gains": _gains(run),
        }
        return _filled("run.html", context)
    context |= {
        "charts": _drawn(compared_charts(runs, letters), "curve"),
        "differing": differing_settings([run.config for run in runs]),
        "readable": sum(run.config is not None for run in runs),
        "repeated": repeated(runs),
    }
    return _filled("comparison.html", context)


def _filled(template: str, context: Mapping[str, Any]) -> str:
    page = _templates().get_template(template).render(context)
    # JSON and file names can hold halves of characters, which no file can.
    return page.encode("utf-8", "replace").decode("utf-8")


def _templates() -> Environment:
    """Everything that a template prints is escaped, but for the charts drawn here."""
    templates = Environment(
        loader=PackageLoader("mfm_dist.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    filters: dict[str, Callable[..., Any]] = {
        "score": lambda value: _or_dash(value, "{:.1f}"),
        "change": _change,
        "share": lambda value: 0.0 if not math.isfinite(value) else min(max(value, 0.0), 100.0),
        "grouped": lambda value: DASH if value is None else f"{value:,}",
        "breakable": _breakable,
        "moment": lambda value: f"{value.day} {value:%B %Y}, {value:%H:%M} UTC",
    }
    templates.filters |= filters
    return templates


def _drawn(charts: Sequence[Chart], word: str) -> list[tuple[Chart, Markup]]:
    # draw escapes every name that came from a file; see svg.py.
    return [(chart, Markup(draw(chart, f"{word}{number}"))) for number, chart in enumerate(charts)]


def _headline(run: Run, letter: str) -> Headline:
    config, place = run.config, run.environment
    gpus = place.get("gpus")
    device = (
        ", ".join(dict.fromkeys(map(str, gpus))) if isinstance(gpus, list) and gpus else str(place.get("device", ""))
    )
    world = place.get("world_size")
    processes = f"{world} process{'es' if world != 1 else ''}" if isinstance(world, int) else "unknown processes"
    done = f"{run.step:,}" if run.step is not None else "none yet"
    return Headline(
        run=run,
        letter=letter,
        method="unknown" if config is None else config.method.name + (" + MFM" if config.mfm.enabled else ""),
        seeds="unknown" if config is None else str(config.seed),
        steps=done if config is None or run.step == config.train.steps else f"{done} of {config.train.steps:,}",
        status=_status(run),
        finished=run.outcome.get("code") == EXIT_DONE,
        machine=str(place.get("machine", "unknown")),
        processes=f"{processes} on {device}" if device else processes,
        revision=str(place.get("revision") or "unknown"),
    )


def _status(run: Run) -> str:
    if not run.outcome:
        return "no outcome yet"
    if run.outcome.get("code") == EXIT_DONE:
        return "finished"
    if run.outcome.get("code") == EXIT_STOPPED:
        return f"{run.outcome.get('reason')}; the same command goes on"
    return f"ended with code {run.outcome.get('code')}: {run.outcome.get('reason')}"


def _gains(run: Run) -> list[tuple[str, float]]:
    """Classes with an IoU at both ends, by how much they gained, the most first."""
    first, last = run.first, run.last
    if first is None or last is None:
        return []
    changes = [
        (name, last.iou[name] - first.iou[name])
        for name in CLASS_NAMES
        if math.isfinite(last.iou[name] - first.iou[name])
    ]
    return sorted(changes, key=lambda one: -one[1])


def _letter(number: int) -> str:
    """A to Z, then A2, B2 ..."""
    return chr(ord("A") + number % 26) + (str(number // 26 + 1) if number >= 26 else "")


def _breakable(key: str) -> Markup:
    """A dotted key that may wrap after a dot or an underscore."""
    return Markup("<wbr>").join(re.split(r"(?<=[._])", key))


def _or_dash(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else DASH


def _change(value: float) -> str:
    """Points with a sign; a true minus, and none before what rounds to nothing."""
    if not math.isfinite(value):
        return DASH
    rounded = f"{value:+.1f}"
    return "0.0" if rounded in ("+0.0", "-0.0") else rounded.replace("-", "\N{MINUS SIGN}")
