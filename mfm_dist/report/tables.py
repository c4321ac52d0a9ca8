"""Settings, events and runs as rows that the page can print."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mfm_dist.config.loader import to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.report.run import Run

SHOWN_EVENTS = 20
"""Single events listed of each group."""
NOT_COMPARED = ("seed", "run.folder")
"""Settings in which repetitions of a run differ."""
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


@dataclass
class EventGroup:
    """Events of one kind and one cause."""

    name: str
    cause: str
    count: int = 0
    first: int | None = None
    last: int | None = None
    examples: list[str] = field(default_factory=list)
    """The first ``SHOWN_EVENTS`` in words, where they say more than kind and cause."""


class Repeated(NamedTuple):
    """Runs that differ in the seed alone."""

    names: list[str]
    seeds: list[int]
    mean: float
    deviation: float
    lowest: float
    highest: float


def settings(config: RunConfig) -> list[Setting]:
    """Every setting beside its default."""
    defaults = flatten(RunConfig())
    return [
        Setting(key, text(value), text(defaults[key]), value != defaults[key]) for key, value in flatten(config).items()
    ]


def flatten(config: RunConfig) -> dict[str, Any]:
    """``section.key`` -> plain value."""
    flat: dict[str, Any] = {}
    for name, value in to_tree(config).items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def differing_settings(configs: Sequence[RunConfig | None]) -> list[tuple[str, list[str]]]:
    """Settings but for the folder that are not the same in all readable configurations, with each one's value.

    A configuration that cannot be read has "?" everywhere.
    """
    flat = [None if config is None else flatten(config) for config in configs]
    known = [one for one in flat if one is not None]
    keys = [key for key in (known[0] if known else {}) if any(one[key] != known[0][key] for one in known)]
    keys = [key for key in keys if key != "run.folder"]
    return [(key, ["?" if one is None else text(one[key]) for one in flat]) for key in keys]


def group_events(events: Iterable[Mapping[str, Any]]) -> list[EventGroup]:
    """Events out of the ordinary (checkpoints are not) by kind and cause, the most frequent first."""
    groups: dict[tuple[str, str], EventGroup] = {}
    for event in events:
        kind = text(event.get("event", "unknown"))
        if kind == "checkpoint":  # the ordinary course of a run
            continue
        cause = text(event.get("signal", event.get("reason", "")))
        group = groups.setdefault((kind, cause), EventGroup(EVENT_NAMES.get(kind, kind.replace("_", " ")), cause))
        group.count += 1
        step = event.get("step")
        if isinstance(step, int):
            group.first = step if group.first is None else min(group.first, step)
            group.last = step if group.last is None else max(group.last, step)
        details = {key: one for key, one in event.items() if key not in ("event", "step", "reason", "signal")}
        if details and len(group.examples) < SHOWN_EVENTS:
            place = f"step {step:,}: " if isinstance(step, int) else ""
            group.examples.append(place + text(details))
    return sorted(groups.values(), key=lambda group: -group.count)


def repeated(runs: Sequence[Run]) -> list[Repeated]:
    """Groups of two runs or more with a final mIoU that differ in nothing but ``NOT_COMPARED``, the best first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.config is not None and run.last is not None and math.isfinite(run.last.miou):
            same = {key: value for key, value in flatten(run.config).items() if key not in NOT_COMPARED}
            groups.setdefault(repr((same, run.last.step)), []).append(run)
    found = []
    for group in groups.values():
        scores = [run.last.miou for run in group if run.last is not None]
        seeds = [run.config.seed for run in group if run.config is not None]
        if len(group) > 1:
            spread = statistics.stdev(scores)
            found.append(
                Repeated([r.name for r in group], seeds, statistics.mean(scores), spread, min(scores), max(scores))
            )
    return sorted(found, key=lambda one: -one.mean)


def environment(run: Run) -> list[tuple[str, str]]:
    """environment.json and what it costs, as (name, text)."""
    rows = [(name.replace("_", " "), text(value)) for name, value in run.environment.items() if name != "command"]
    command = run.environment.get("command")
    if isinstance(command, list):
        rows.insert(0, ("command", " ".join(map(str, command))))
    memory = [value for value in run.series("memory_gib")[1] if math.isfinite(value)]
    waiting = run.median("data_wait_fraction")
    if memory:
        rows.append(("peak memory of a process", f"{max(memory):.2f} GiB"))
    if math.isfinite(waiting):
        rows.append(("time waiting for data", f"{waiting:.1%} (median)"))
    return rows


def text(value: object) -> str:
    """A plain value as people write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {text(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(text(one) for one in value) or "none"
    return str(value)
