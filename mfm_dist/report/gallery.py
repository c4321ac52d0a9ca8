"""Rows of validation images: what each shows, and what the networks of a run, or of several, make of it.

Where the target has no labels, they are the images of its training set that evaluation looks at.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mfm_dist.build import build_train_module
from mfm_dist.checkpoint.contents import load_modules
from mfm_dist.checkpoint.files import find_latest
from mfm_dist.classes import IGNORE_INDEX, ClassSet
from mfm_dist.config.schema import RunConfig, names_of
from mfm_dist.data.geometry import fitted, resize_box, resize_label
from mfm_dist.data.reader import Sample, ShardReader
from mfm_dist.errors import BadSample, ConfigError, first_line
from mfm_dist.inference.open_run import without_training
from mfm_dist.inference.predict_labels import predict_labels
from mfm_dist.inference.unlabelled import twice
from mfm_dist.methods.mfm import mask_of, rebuild
from mfm_dist.models.layers import resize
from mfm_dist.models.preprocessing import normalise
from mfm_dist.models.rebuilder import hidden_places
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.report.picture import Mask, Pixels, greyed, label_map, mistakes, overlay_prediction, photograph
from mfm_dist.report.run import Run
from mfm_dist.rng import Stream, torch_generator
from mfm_dist.storage import read_whole
from mfm_dist.train_module import TrainModule

CPU = torch.device("cpu")
PSEUDO_LABEL, HIDDEN_CELLS, MISTAKES = "Teacher's pseudo-label", "Hidden cells", "Mistakes"
"""Titles by which the templates tell what has to be explained."""


class AbsentError(Exception):
    """Why a run has no such picture: a sentence for the page, or nothing if the page has it already."""


@dataclass(frozen=True)
class Networks:
    """Networks of a run on the CPU, as far as there are any."""

    config: RunConfig
    classes: ClassSet
    overlays: Path
    """Folder of the pictures saved by the evaluation of step 0."""
    first: Segmentor | None
    """The student as it was at step 0, if the seed and a file at hand say what that was."""
    module: TrainModule | None = None
    """Everything in the newest checkpoint."""
    step: int = 0
    notes: Sequence[str] = ()
    """Damaged checkpoints that were passed over, or why there is none at all."""

    @property
    def trained(self) -> TrainModule:
        """``module``, for who cannot do without. Raises AbsentError if there is none; ``notes`` have the reason."""
        if self.module is None:
            raise AbsentError
        return self.module


@dataclass(frozen=True)
class Subject:
    """One image."""

    number: int
    sample: Sample

    @property
    def photo(self) -> Pixels:
        """RGB [H, W, 3]."""
        return self.sample.image.permute(1, 2, 0).numpy()

    @property
    def truth(self) -> Pixels | None:
        """Indices of classes [H, W]; None where it has no label."""
        return None if self.sample.label is None else self.sample.label.numpy().astype(np.uint8)

    def as_trained(self, box: tuple[int, int] | None) -> Subject:
        """Return the same at the size that training sees: fitted into ``data.target_resize``."""
        image, label = self.sample.image, self.sample.label
        if box is None:
            return self
        size = fitted((image.shape[1], image.shape[2]), box)
        image = resize_box(image, size, (slice(0, size[0]), slice(0, size[1])))
        label = None if label is None else resize_label(label, size)
        return replace(self, sample=replace(self.sample, image=image, label=label))


@dataclass(frozen=True)
class Panel:
    """One picture of a row."""

    title: str
    address: str
    """Its ``data:`` address; empty if only this image lacks the picture, which ``note`` then says."""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One image in several views."""

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

    @property
    def titles(self) -> set[str]:
        """Titles of all panels."""
        return {panel.title for row in self.rows for panel in row.panels}


View = Callable[[Networks, Subject], list[Panel]]
"""Panels of one image. Raises AbsentError where the run has none of them."""


def make_gallery(run: Run, count: int, views: Sequence[View] | None = None) -> Gallery:
    """Show ``count`` images, evenly spread over those that evaluation sees, in these views or all.

    Say what cannot be read.
    """
    if run.config is None:
        return Gallery(notes=["There are no pictures, because the configuration of the run cannot be read."])
    try:
        into = run.classes if run.config.data.classes else None
        data = run.config.data
        reader = ShardReader(data.root / (data.validation or names_of(data.target)[0]), classes=into)
    except Exception as error:  # nor is a foreign shard set trusted to be whole
        return Gallery(notes=[f"There are no pictures, because the validation images cannot be read: {error}"])
    networks = load_networks(run, run.config)
    gallery = Gallery(notes=list(dict.fromkeys(networks.notes)))
    labelled = data.validation is not None
    seen = len(reader) if labelled else min(len(reader), run.config.eval.unlabelled_images)
    for number in np.linspace(0, seen - 1, min(count, seen)).round().astype(int).tolist():
        sample = reader.read(number, with_label=labelled)
        if isinstance(sample, BadSample):
            gallery.note(f"One image is left out: {sample}")
            continue
        gallery.rows.append(Row(sample.key, _panels(gallery, networks, Subject(number, sample), views or ALL_VIEWS)))
    reader.close()
    return gallery


def _panels(gallery: Gallery, networks: Networks, subject: Subject, views: Sequence[View]) -> list[Panel]:
    panels: list[Panel] = []
    for view in views:
        try:
            panels += view(networks, subject)
        except AbsentError as reason:
            gallery.note(str(reason))
        except Exception as error:  # networks and picture files of others raise nearly every kind
            gallery.note(f"The {view.__name__.replace('_', ' ')} cannot be shown: {first_line(error)}")
    return panels


def compare_galleries(runs: Sequence[Run], count: int) -> Gallery:
    """Show the first run's images: the image, its truth, and each run's last prediction."""
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


def load_networks(run: Run, config: RunConfig) -> Networks:
    """Load the networks of a run folder; what cannot be loaded is absent, with the reason."""
    networks = Networks(config, run.classes, run.path / "eval" / "step_00000000", first_student(config, run.classes))
    said: list[str] = []
    try:
        module = build_train_module(without_training(config), run.classes).requires_grad_(False)
        checkpoint = find_latest(run.path / "checkpoints", report=said.append)
        if checkpoint is None:
            reason = f"There is no complete checkpoint, so nothing trained can be shown. {' '.join(said)}".strip()
            return replace(networks, notes=[reason])
        load_modules(checkpoint, module)
    except Exception as error:  # a damaged or foreign folder raises nearly every kind; the page says what
        return replace(networks, notes=[f"The networks of this run cannot be loaded: {first_line(error)}"])
    return replace(networks, module=module.eval(), step=checkpoint.progress.step, notes=said)


def first_student(config: RunConfig, classes: ClassSet) -> Segmentor | None:
    """Build the student before its first step, or None if it started from weights that are not here any more."""
    if config.model.pretrained:
        return None
    try:
        plain = replace(config, train=replace(config.train, compile=False))
        return build_train_module(plain, classes).student.requires_grad_(False).eval()
    except ConfigError:  # no or another file of that name by now; what else may be wrong shows with the checkpoint
        return None


def image_and_truth(networks: Networks, subject: Subject) -> list[Panel]:
    """Show the image and its label, if it has one."""
    panels = [Panel("Image", photograph(subject.photo))]
    if subject.truth is not None:
        panels.append(Panel("Truth", label_map(subject.truth, networks.classes.palette), "label of the validation set"))
    return panels


def first_prediction(networks: Networks, subject: Subject) -> list[Panel]:
    """Show the student before training: as saved by the evaluation of step 0, else made again from the seed."""
    key = subject.sample.key
    path = networks.overlays / f"{key}.png"
    label, note = None, "step 0"
    # A key is text out of a shard; it may not lead out of the folder.
    if Path(key).name == key and path.is_file():
        with Image.open(io.BytesIO(read_whole(path))) as picture:
            label = overlay_prediction(np.asarray(picture.convert("RGB")), subject.photo, networks.classes.palette)
    if label is None and networks.first is not None:
        label, note = _predicted(networks.first, networks.config, subject), "step 0, from the seed"
    if label is not None:
        return [Panel("First prediction", label_map(label, networks.classes.palette), note + _right(label, subject))]
    if networks.overlays.is_dir():
        return [Panel("First prediction", "", f"not saved (eval.overlays={networks.config.eval.overlays})")]
    raise AbsentError(
        "The first prediction is not there: the evaluation of step 0 saved no pictures, and the start weights of "
        "this run do not follow from its seed."
    )


def last_prediction(networks: Networks, subject: Subject) -> list[Panel]:
    """Show the student of the checkpoint, as evaluation runs it."""
    return prediction_and_mistakes(networks, subject)[:1]


def prediction_and_mistakes(networks: Networks, subject: Subject) -> list[Panel]:
    """Show the same, and where it differs from the truth, if that is known."""
    label = _predicted(networks.trained.student, networks.config, subject)
    note = f"step {networks.step:,}{_right(label, subject)}"
    panels = [Panel("Last prediction", label_map(label, networks.classes.palette), note)]
    if subject.truth is not None:
        panels.append(Panel(MISTAKES, mistakes(subject.truth, label), "of the last prediction"))
    return panels


@torch.no_grad()
def pseudo_label(networks: Networks, subject: Subject) -> list[Panel]:
    """Show the teacher's label, hatched where it is less sure than the threshold."""
    teacher = networks.trained.teacher
    if teacher is None:
        raise AbsentError(f"There is no pseudo-label: {networks.config.method.name} without MFM has no teacher.")
    logits = teacher(twice(subject.as_trained(networks.config.data.target_resize).sample.image[None]))
    probability, label = logits.float().softmax(dim=1)[0].max(dim=0)
    unsure = (probability < networks.config.self_training.pseudo_threshold).numpy()
    drawn = label_map(label.numpy().astype(np.uint8), networks.classes.palette, unsure=unsure)
    return [Panel(PSEUDO_LABEL, drawn, f"{_percent(1 - unsure.mean())} sure, the rest hatched")]


@torch.no_grad()
def masked_pass(networks: Networks, subject: Subject) -> list[Panel]:
    """Show an MFM pass over the central crop: what is hidden, and what the decoder makes of the rebuilt features."""
    rebuilder, student, config = networks.trained.rebuilder, networks.trained.student, networks.config
    if rebuilder is None:
        raise AbsentError("There are no rebuilt features: this run has no Rebuilder.")
    if config.mfm.reconstruction != "classes":
        rebuilt = config.mfm.reconstruction.replace("_", " ")
        raise AbsentError(f"Rebuilt features are not classified in this run: it rebuilds {rebuilt}.")
    subject = subject.as_trained(config.data.target_resize)
    image = subject.sample.image
    box = _central_box((image.shape[1], image.shape[2]), config.data.crop)
    crop = image[:, box[0], box[1]]
    generator = torch_generator(config.seed, Stream.MFM_MASK, subject.number)
    mask = mask_of(config.mfm, rebuilder.grid, generator)
    features = student.encode(student.context(normalise(crop[None])))
    logits = resize(student.decode(rebuild(student, rebuilder, features, mask)), crop.shape[1:])

    outside = np.ones(image.shape[1:], dtype=bool)
    hidden, label = np.zeros_like(outside), np.zeros(outside.shape, dtype=np.uint8)
    outside[box] = False
    hidden[box] = hidden_places(mask, crop)[0].numpy()
    label[box] = logits.argmax(dim=1)[0].numpy()
    rows, columns = rebuilder.grid
    share = f"{_percent(mask.float().mean().item())} of the {rows} \N{MULTIPLICATION SIGN} {columns} cells"
    beyond = "; the pale rest is outside of the crop" if outside.any() else ""
    return [
        Panel(HIDDEN_CELLS, photograph(greyed(subject.photo, hidden, outside)), share + beyond),
        Panel(
            "From rebuilt features",
            label_map(label, networks.classes.palette, outside=outside),
            f"where hidden{_right(label, subject, hidden)}",
        ),
    ]


ALL_VIEWS: tuple[View, ...] = (image_and_truth, first_prediction, prediction_and_mistakes, masked_pass, pseudo_label)


def _central_box(size: tuple[int, int], crop: tuple[int, int]) -> tuple[slice, slice]:
    """Return the middle of an image in the training crop's size, or all of a side that is shorter."""
    sides = [(max(have - want, 0) // 2, min(have, want)) for have, want in zip(size, crop, strict=True)]
    (top, height), (left, width) = sides
    return slice(top, top + height), slice(left, left + width)


def _predicted(segmentor: Segmentor, config: RunConfig, subject: Subject) -> Pixels:
    ids = predict_labels(segmentor, subject.sample.image, CPU, fit_into=config.eval.resize)
    return ids.numpy().astype(np.uint8)


def _right(prediction: Pixels, subject: Subject, where: Mask | None = None) -> str:
    """Say the share of labelled pixels with the right class, behind a colon; nothing of an image without a label."""
    if subject.truth is None:
        return ""
    counts = subject.truth != IGNORE_INDEX
    if where is not None:
        counts &= where
    if not counts.any():
        return ": no labelled pixels"
    return f": {_percent((prediction == subject.truth)[counts].mean())} of pixels right"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
