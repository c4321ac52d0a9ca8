"""A few validation images of a run, or of several, in rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import BadSample
from mfm_dist.report.networks import Networks, first_line, load_networks
from mfm_dist.report.run import Run
from mfm_dist.report.views import Panel, Subject, View, image_and_truth, last_prediction


@dataclass(frozen=True)
class Row:
    """One validation image in several views."""

    key: str
    panels: list[Panel]

    @property
    def columns(self) -> int:
        """Panels side by side on a wide screen: at most five, lines as equal as can be."""
        lines = -(-len(self.panels) // 5)
        return -(-len(self.panels) // max(lines, 1))


@dataclass
class Gallery:
    """Rows, and a sentence for everything that they cannot show."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Say something once; nothing if it is empty."""
        if sentence and sentence not in self.notes:
            self.notes.append(sentence)

    def shows(self, title: str) -> bool:
        """Whether any row has a panel of this title."""
        return any(panel.title == title for row in self.rows for panel in row.panels)


def make_gallery(run: Run, count: int, views: Sequence[View]) -> Gallery:
    """``count`` validation images, evenly spread over the set, seen through ``views``; says what cannot be read."""
    gallery = Gallery()
    if run.config is None:
        gallery.note("There are no pictures, because the configuration of the run cannot be read.")
        return gallery
    try:
        reader = ShardReader(run.config.data.root / run.config.data.validation)
    except Exception as error:  # nor is a foreign shard set trusted to be whole
        gallery.note(f"There are no pictures, because the validation images cannot be read: {error}")
        return gallery
    networks = load_networks(run, run.config)
    for sentence in (networks.absent, *networks.notes):
        gallery.note(sentence)
    count = min(count, len(reader))
    for number in np.linspace(0, len(reader) - 1, count).round().astype(int).tolist():
        sample = reader.read(number)
        if isinstance(sample, BadSample):
            gallery.note(f"One image is left out: {sample}")
            continue
        gallery.rows.append(Row(sample.key, _panels(gallery, networks, Subject(number, sample), views)))
    reader.close()
    return gallery


def _panels(gallery: Gallery, networks: Networks, subject: Subject, views: Sequence[View]) -> list[Panel]:
    panels: list[Panel] = []
    for view in views:
        try:
            seen = view(networks, subject)
        except Exception as error:  # networks and picture files of others raise nearly every kind
            seen = f"The {view.__name__.replace('_', ' ')} cannot be shown: {first_line(error)}"
        if isinstance(seen, str):
            gallery.note(seen)
        else:
            panels += seen
    return panels


def compare_galleries(runs: Sequence[Run], count: int) -> Gallery:
    """Rows of the first run's images: the image, its truth, and each run's last prediction."""
    combined = make_gallery(runs[0], count, (image_and_truth,))
    # What the first run lacks is said once more, with its name, below.
    combined.notes = [] if combined.rows else combined.notes
    for run in runs if combined.rows else ():
        own = make_gallery(run, count, (last_prediction,))
        panels = {row.key: row.panels for row in own.rows}
        for row in combined.rows:
            if row.key in panels:
                row.panels.extend(replace(panel, title=run.name) for panel in panels[row.key])
            elif own.rows:
                own.note(f"{row.key} is not among the images of this run.")
        for note in own.notes:
            combined.note(f"{run.name}: {note}")
    return combined
