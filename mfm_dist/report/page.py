"""From runs to the text of the page: the rows of its tables, and the templates filled with them."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mfm_dist.config.loader import to_tree
from mfm_dist.config.schema import RunConfig, Sets, names_of
from mfm_dist.errors import EXIT_DONE, EXIT_STOPPED
from mfm_dist.inference.probe import why_no_probe
from mfm_dist.inference.unlabelled import FIGURES
from mfm_dist.report.charts import Chart, compared_charts, draw, miou_chart, run_charts, spoken, unlabelled_charts
from mfm_dist.report.gallery import Gallery, compare_galleries, make_gallery
from mfm_dist.report.picture import RIGHT_COLOUR, WRONG_COLOUR, hexadecimal
from mfm_dist.report.run import Run, finite_or_nan

DASH = "\N{EN DASH}"
"""Stands for a figure that there is not."""
SHOWN_EVENTS = 20
"""Single events listed of each group."""
NOTABLE_POINTS = 1.0
"""Points of mIoU from which a change is coloured as a gain or a loss; seeds of one run differ by some tenths."""
LARGEST_MATRIX = 40
"""Classes of a confusion matrix that is shown whole."""
SHOWN_CONFUSIONS = 8
"""Pairs of classes that are listed as taken for one another."""
NOT_COMPARED = ("seed", "run.folder")
"""Settings in which repetitions of a run differ."""
REBUILT_BY: Mapping[str, str] = {
    "zero_fill": "nothing: they are 0",
    "diffusion": "averaging the neighbours",
    "rebuilder": "the Rebuilder",
    "other_image": "the Rebuilder, shown another image",
    "all_hidden": "the Rebuilder, with all hidden",
}
"""What rebuilds hidden features in a probe -> in words."""
EVENT_NAMES: Mapping[str, str] = {
    "skipped_step": "Step skipped",
    "bad_sample": "Sample left out",
    "too_many_bad_samples": "Stopped for bad samples",
    "signal": "Stopped by a signal",
    "hang": "A rank hung",
    "audit": "Weights differ",
    "tracker_failed": "A tracker failed",
}


class Setting(NamedTuple):
    """One line of the configuration."""

    key: str
    value: str
    default: str
    changed: bool


@dataclass(frozen=True)
class EventGroup:
    """Events of one kind and one cause."""

    name: str
    cause: str
    count: int
    first: int | None
    last: int | None
    examples: list[str]
    """The first ``SHOWN_EVENTS`` in words, where they say more than kind and cause."""


class Confusion(NamedTuple):
    """Which classes are taken for which, as shares of the labelled pixels of the true one in percent."""

    columns: list[tuple[str, str]]
    """Name and colour of the classes that are labelled or predicted; none where they are too many to show."""
    rows: list[tuple[str, str, list[float]]]
    """Name and colour of each class that is labelled, and what it is taken for, by column."""
    pairs: list[tuple[str, str, float]]
    """True class, predicted class and share, the largest first."""


class Probe(NamedTuple):
    """What the probe of the Rebuilder says, or why it says nothing."""

    absent: str
    """A sentence; empty if there are figures."""
    step: object = None
    agreement: Sequence[tuple[str, float, float]] = ()
    """How hidden features are rebuilt, and the agreement where visible and where hidden, in percent."""
    figures: Sequence[tuple[str, str, str]] = ()
    """Figures by name, in words, with what they mean."""


class Repeated(NamedTuple):
    """Runs that differ in the seed alone."""

    names: list[str]
    seeds: list[int]
    mean: float
    """Of the last evaluations, as are the three below."""
    mean_best: float
    """Of the best evaluation of each."""
    deviation: float
    lowest: float
    highest: float


def render(runs: Sequence[Run], *, images: int) -> str:
    """Return the whole page: of one run, or of several side by side.

    Args:
        images: validation images to show; 0 for none.
    """
    letters = [_letter(number) for number in range(len(runs))]
    single = len(runs) == 1
    gallery = Gallery(notes=["There are no pictures, because --images was 0."])
    if images:
        gallery = make_gallery(runs[0], images) if single else compare_galleries(runs, images)
    scores = miou_chart(runs, ["mIoU"], 300) if single else miou_chart(runs, letters, 236)
    context: dict[str, Any] = {
        "heads": [_headline(run, letter) for run, letter in zip(runs, letters, strict=True)],
        "classes": _classes(runs),
        "gallery": gallery,
        "right_and_wrong": (hexadecimal(RIGHT_COLOUR), hexadecimal(WRONG_COLOUR)),
        "events": [(run, group_events(run.events)) for run in runs],
        "environments": [environment(run) for run in runs],
        "made": datetime.now(timezone.utc),
        "miou_chart": _drawn([*scores, *unlabelled_charts(runs, letters)], "miou"),
    }
    if single:
        run = runs[0]
        context |= {
            "run": run,
            "charts": _drawn(run_charts(run), "curve"),
            "settings": settings(run.config) if run.config else [],
            "gains": _gains(run),
            "unlabelled": _unlabelled(run),
            "probe": probe_of(run),
            "confusion": confusion_of(run),
        }
    else:
        context |= {
            "charts": _drawn(compared_charts(runs, letters), "curve"),
            "differing": differing_settings([run.config for run in runs]),
            "readable": sum(run.config is not None for run in runs),
            "repeated": repeated(runs),
        }
    page = _templates().get_template("run.html" if single else "comparison.html").render(context)
    # JSON and file names can hold halves of characters, which no file can.
    return page.encode("utf-8", "replace").decode("utf-8")


def _classes(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return every class of the runs, each once, with its colour in the first run that has it."""
    colours: dict[str, str] = {}
    for run in runs:
        for name, colour in zip(run.classes.names, run.classes.palette, strict=True):
            colours.setdefault(name, hexadecimal(colour))
    return list(colours.items())


def _templates() -> Environment:
    """Return the templates. Everything that they print is escaped, but for the charts drawn here."""
    templates = Environment(
        loader=PackageLoader("mfm_dist.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    filters: dict[str, Callable[..., Any]] = {
        "score": lambda value: f"{value:.1f}" if math.isfinite(value) else DASH,
        "change": _change,
        "tone": lambda gain: "up" if gain >= NOTABLE_POINTS else "down" if gain <= -NOTABLE_POINTS else "",
        "of_one": lambda value: f"{value:.3f}" if math.isfinite(value) else DASH,
        "share": lambda value: 0.0 if not math.isfinite(value) else min(max(value, 0.0), 100.0),
        "grouped": lambda value: DASH if value is None else f"{value:,}",
        "breakable": _breakable,
        "sets": _sets,
        "moment": lambda value: f"{value.day} {value:%B %Y}, {value:%H:%M} UTC",
    }
    templates.filters |= filters
    return templates


def _sets(sets: Sets) -> str:
    """Name shard sets, with the shares that were given."""
    if not isinstance(sets, dict):
        return " + ".join(names_of(sets))
    return " + ".join(f"{name} ({100 * share / sum(sets.values()):.0f} %)" for name, share in sets.items())


def _drawn(charts: Sequence[Chart], word: str) -> list[tuple[Chart, Markup]]:
    # draw escapes every name that came from a file; see charts.py.
    return [(chart, Markup(draw(chart, f"{word}{number}"))) for number, chart in enumerate(charts)]


def _headline(run: Run, letter: str) -> dict[str, Any]:
    """Gather the figures that a page opens with."""
    config, place = run.config, run.environment
    gpus = place.get("gpus")
    device = (
        ", ".join(dict.fromkeys(map(str, gpus))) if isinstance(gpus, list) and gpus else str(place.get("device", ""))
    )
    world = place.get("world_size")
    processes = f"{world} process{'es' if world != 1 else ''}" if isinstance(world, int) else "unknown processes"
    done = f"{run.step:,}" if run.step is not None else "none yet"
    return {
        "run": run,
        "letter": letter,
        "method": "unknown" if config is None else config.method_label + (" + MFM" if config.mfm.enabled else ""),
        "seeds": "unknown" if config is None else str(config.seed),
        "steps": done if config is None or run.step == config.train.steps else f"{done} of {config.train.steps:,}",
        "status": _status(run.outcome),
        "finished": run.outcome.get("code") == EXIT_DONE,
        "machine": str(place.get("machine", "unknown")),
        "processes": f"{processes} on {device}" if device else processes,
        "revision": str(place.get("revision") or "unknown"),
    }


def _status(outcome: Mapping[str, Any]) -> str:
    if not outcome:
        return "no outcome yet"
    code, reason = outcome.get("code"), outcome.get("reason")
    if code == EXIT_DONE:
        return "finished"
    return f"{reason}; the same command goes on" if code == EXIT_STOPPED else f"ended with code {code}: {reason}"


def _gains(run: Run) -> list[tuple[str, float]]:
    """Return the classes with an IoU at both ends, by how much they gained, the most first."""
    first, last = run.first, run.last
    if first is None or last is None:
        return []
    changes = [(name, last.iou[name] - first.iou[name]) for name in run.classes.names]
    return sorted((one for one in changes if math.isfinite(one[1])), key=lambda one: -one[1])


def _unlabelled(run: Run) -> list[tuple[str, str, float, float]]:
    """Return what was seen without target labels: name, words, first and last value."""
    last = run.last.unlabelled if run.last else {}
    first = run.first.unlabelled if run.first else {}
    return [
        (spoken(name).capitalize(), words, first.get(name, math.nan), last[name])
        for name, words in FIGURES.items()
        if name in last
    ]


def confusion_of(run: Run) -> Confusion | None:
    """Return which classes the last evaluation takes for which; None if that is not known."""
    counts = run.last.confusion if run.last else None
    if counts is None or not counts.any():
        return None
    names = list(zip(run.classes.names, map(hexadecimal, run.classes.palette), strict=True))
    labelled = [index for index in range(len(names)) if counts[index].any()]
    occurring = [index for index in range(len(names)) if counts[index].any() or counts[:, index].any()]
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mistaken = [(names[i][0], names[j][0], float(shares[i, j])) for i in labelled for j in occurring if i != j]
    shown = len(occurring) <= LARGEST_MATRIX
    return Confusion(
        [names[index] for index in occurring] if shown else [],
        [(*names[index], shares[index, occurring].tolist()) for index in labelled] if shown else [],
        [pair for pair in sorted(mistaken, key=lambda pair: -pair[2])[:SHOWN_CONFUSIONS] if pair[2] > 0],
    )


def probe_of(run: Run) -> Probe | None:
    """Return what was measured of the Rebuilder; None for a run that has none, or none that classifies."""
    if run.config is None or why_no_probe(run.config):
        return None
    if not run.probe:
        return Probe(f"Not measured yet: python tools/probe_rebuilder.py --run {run.path}, then make this page again.")

    def at(*keys: str) -> float:
        found: object = run.probe
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return finite_or_nan(found)

    def cosine(place: str) -> str:
        value, low, high = (at("alignment", place, key) for key in ("cosine", "low", "high"))
        return f"{_signed(value)} [{_signed(low)}, {_signed(high)}]" if math.isfinite(value) else DASH

    agreement = [
        (words, 100 * at("agreement", key, "visible"), 100 * at("agreement", key, "hidden"))
        for key, words in REBUILT_BY.items()
    ]
    better = 100 * at("rebuilder_minus_diffusion")
    weight, accuracy = at("calibration", "pseudo_weight"), at("calibration", "accuracy")
    figures = [
        ("Rebuilder minus diffusion", f"{_change(better)} points", "at hidden pixels: what the Rebuilder has learned"),
        (
            "Gradient, visible pixels",
            cosine("visible"),
            "cosine to the gradient of the true labels: below 0 it points away from them",
        ),
        ("Gradient, hidden pixels", cosine("hidden"), "likewise"),
        ("Share through the Rebuilder", _plain(at("gradient_share")), "of the gradient that MFM sends to the encoder"),
        ("Change by one step", _plain(at("output_change")), "of what is rebuilt, at the full rate"),
        ("Teacher's calibration error", _plain(at("calibration", "expected_error")), "between confidence and accuracy"),
        ("Pseudo-weight minus accuracy", _signed(weight - accuracy), "above 0 the teacher is surer than it is right"),
    ]
    return Probe("", run.probe.get("step"), agreement, figures)


def settings(config: RunConfig) -> list[Setting]:
    """Return every setting beside its default."""
    default = _by_key(RunConfig())
    return [
        Setting(key, text(value), text(default[key]), value != default[key]) for key, value in _by_key(config).items()
    ]


def _by_key(config: RunConfig) -> dict[str, Any]:
    """Return the values of all sections by ``section.key``; a section within one counts as a value."""
    values: dict[str, Any] = {}
    for name, value in to_tree(config).items():
        values |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return values


def differing_settings(configs: Sequence[RunConfig | None]) -> list[tuple[str, list[str]]]:
    """Return the settings but for the folder that readable configurations do not share, with each one's value.

    A configuration that cannot be read has "?" everywhere.
    """
    found = [None if config is None else _by_key(config) for config in configs]
    known = [one for one in found if one is not None]
    keys = [key for key in (known[0] if known else {}) if any(one[key] != known[0][key] for one in known)]
    keys = [key for key in keys if key != "run.folder"]
    return [(key, ["?" if one is None else text(one[key]) for one in found]) for key in keys]


def group_events(events: Iterable[Mapping[str, Any]]) -> list[EventGroup]:
    """Return events out of the ordinary (saves and resumes are not) by kind and cause, the most frequent first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        kind = text(event.get("event", "unknown"))
        if kind not in ("checkpoint", "resume"):  # the ordinary course of a run
            groups[kind, text(event.get("signal", event.get("reason", "")))].append(event)
    found = []
    for (kind, cause), group in groups.items():
        name = EVENT_NAMES.get(kind, kind.replace("_", " "))
        steps = [event["step"] for event in group if isinstance(event.get("step"), int)]
        first, last = min(steps, default=None), max(steps, default=None)
        examples = [example for event in group if (example := _example(event))]
        found.append(EventGroup(name, cause, len(group), first, last, examples[:SHOWN_EVENTS]))
    return sorted(found, key=lambda group: -group.count)


def _example(event: Mapping[str, Any]) -> str:
    """Say in words what an event holds beside its kind, step and cause; nothing if that is all."""
    details = {key: one for key, one in event.items() if key not in ("event", "step", "reason", "signal")}
    place = f"step {event['step']:,}: " if isinstance(event.get("step"), int) else ""
    return place + text(details) if details else ""


def repeated(runs: Sequence[Run]) -> list[Repeated]:
    """Group two runs or more with a final mIoU that differ in nothing but ``NOT_COMPARED``, the best first."""
    groups: dict[str, list[tuple[str, int, float, float]]] = defaultdict(list)
    for run in runs:
        if run.config is not None and run.last is not None and math.isfinite(run.last.miou) and run.best is not None:
            same = {key: value for key, value in _by_key(run.config).items() if key not in NOT_COMPARED}
            groups[repr((same, run.last.step))].append((run.name, run.config.seed, run.last.miou, run.best.miou))
    found = []
    for group in groups.values():
        if len(group) > 1:
            names, seeds, scores, best = (list(column) for column in zip(*group, strict=True))
            mean, spread = statistics.mean(scores), statistics.stdev(scores)
            found.append(Repeated(names, seeds, mean, statistics.mean(best), spread, min(scores), max(scores)))
    return sorted(found, key=lambda one: -one.mean)


def environment(run: Run) -> list[tuple[str, str]]:
    """Return environment.json and what the run costs, as (name, text)."""
    rows = [(name.replace("_", " "), text(value)) for name, value in run.environment.items() if name != "command"]
    command = run.environment.get("command")
    if isinstance(command, list):
        rows.insert(0, ("command", " ".join(map(str, command))))
    memory = [value for value in run.series("memory_gib")[1] if math.isfinite(value)]
    waiting = run.median("data_wait_fraction")
    reserved = [value for value in run.series("memory_reserved_gib")[1] if math.isfinite(value)]
    if memory:
        of_allocator = f", {max(reserved):.2f} GiB reserved" if reserved else ""
        rows.append(("peak memory of a process", f"{max(memory):.2f} GiB{of_allocator}"))
    tflops, mfu, spread = (run.median(key) for key in ("tflops", "mfu", "rank_spread"))
    if math.isfinite(tflops):
        share = f", {mfu:.1%} of its highest rate (MFU)" if math.isfinite(mfu) else ""
        rows.append(("work of a GPU", f"{tflops:.1f} TFLOP/s of the networks' own{share} (median)"))
    if math.isfinite(spread):
        named = Counter(run.series("slowest_rank")[1].tolist()).most_common(1)
        slowest = f", slowest most often: rank {named[0][0]:g}" if named else ""
        rows.append(("spread of ranks", f"{spread:.1%} of their own time in a step (median){slowest}"))
    if math.isfinite(waiting):
        rows.append(("time waiting for data", f"{waiting:.1%} (median)"))
    return rows


def text(value: object) -> str:
    """Write a plain value as people do."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {text(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(text(one) for one in value) or "none"
    return str(value)


def _letter(number: int) -> str:
    """Return A to Z, then A2, B2 ..."""
    return chr(ord("A") + number % 26) + (str(number // 26 + 1) if number >= 26 else "")


def _breakable(key: str) -> Markup:
    """Let a dotted key wrap after a dot or an underscore."""
    return Markup("<wbr>").join(re.split(r"(?<=[._])", key))


def _plain(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else DASH


def _signed(value: float) -> str:
    """Write a number with a sign; a true minus."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else DASH


def _change(value: float) -> str:
    """Write points with a sign; a true minus, and none before what rounds to nothing."""
    if not math.isfinite(value):
        return DASH
    rounded = f"{value:+.1f}"
    return "0.0" if rounded in ("+0.0", "-0.0") else rounded.replace("-", "\N{MINUS SIGN}")
