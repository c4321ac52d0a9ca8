"""Views of one validation image: what it is, and what the networks of a run make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.reader import Sample
from mfm_dist.inference.predict_labels import predict_labels
from mfm_dist.methods.mfm import enlarge_mask, rebuild
from mfm_dist.models.layers import resize
from mfm_dist.models.preprocessing import normalise
from mfm_dist.models.rebuilder import draw_mask
from mfm_dist.report.networks import Networks
from mfm_dist.report.picture import Pixels, greyed, label_map, mistakes, overlay_prediction, photograph
from mfm_dist.rng import Stream, torch_generator

CPU = torch.device("cpu")
PSEUDO_LABEL, HIDDEN_CELLS, MISTAKES = "Teacher's pseudo-label", "Hidden cells", "Mistakes"


@dataclass(frozen=True)
class Panel:
    """One picture of a row."""

    title: str
    address: str
    """Its ``data:`` address; empty if only this image lacks the picture, which ``note`` then says."""
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """One validation image."""

    number: int
    sample: Sample

    @property
    def photo(self) -> Pixels:
        """RGB [H, W, 3]."""
        return self.sample.image.permute(1, 2, 0).numpy()

    @property
    def label(self) -> Tensor:
        """Integer [H, W]."""
        assert self.sample.label is not None
        return self.sample.label


View = Callable[[Networks, Subject], "list[Panel] | str"]
"""Panels of one image, or the reason why there are none."""


def image_and_truth(_: Networks, subject: Subject) -> list[Panel]:
    """The image and its label."""
    truth = subject.label.numpy().astype(np.uint8)
    return [Panel("Image", photograph(subject.photo)), Panel("Truth", label_map(truth), "label of the validation set")]


def first_prediction(networks: Networks, subject: Subject) -> list[Panel] | str:
    """The student before training: as saved by the evaluation of step 0, else made again from the seed."""
    key = subject.sample.key
    path = networks.overlays / f"{key}.png"
    label = None
    # A key is text out of a shard; it may not lead out of the folder.
    if Path(key).name == key and path.is_file():
        with Image.open(path) as picture:
            label = overlay_prediction(np.asarray(picture.convert("RGB")), subject.photo)
    if label is not None:
        note = "step 0"
    elif networks.first is not None:
        box = networks.config.eval.resize
        label = predict_labels(networks.first, subject.sample.image, CPU, fit_into=box).numpy().astype(np.uint8)
        note = "step 0, from the seed"
    elif networks.overlays.is_dir():
        return [Panel("First prediction", "", f"not saved (eval.overlays={networks.config.eval.overlays})")]
    else:
        return (
            "The first prediction is not there: the evaluation of step 0 saved no pictures, and the start weights of "
            "this run do not follow from its seed."
        )
    return [Panel("First prediction", label_map(label), f"{note}: {_right(label, subject)}")]


def last_prediction(networks: Networks, subject: Subject) -> list[Panel] | str:
    """The student of the checkpoint, as evaluation runs it."""
    seen = prediction_and_mistakes(networks, subject)
    return seen if isinstance(seen, str) else seen[:1]


def prediction_and_mistakes(networks: Networks, subject: Subject) -> list[Panel] | str:
    """The same, and where it differs from the truth."""
    if networks.trained is None:
        return networks.absent
    box = networks.config.eval.resize
    label = predict_labels(networks.trained.student, subject.sample.image, CPU, fit_into=box).numpy().astype(np.uint8)
    truth = subject.label.numpy().astype(np.uint8)
    return [
        Panel("Last prediction", label_map(label), f"step {networks.step:,}: {_right(label, subject)}"),
        Panel(MISTAKES, mistakes(truth, label), "of the last prediction"),
    ]


@torch.no_grad()
def pseudo_label(networks: Networks, subject: Subject) -> list[Panel] | str:
    """The teacher's label, hatched where it is less sure than the threshold."""
    if networks.trained is None:
        return networks.absent
    teacher = networks.trained.teacher
    if teacher is None:
        return f"There is no pseudo-label: {networks.config.method.name} without MFM has no teacher."
    logits = teacher(normalise(subject.sample.image[None]))
    probability, label = logits.float().softmax(dim=1)[0].max(dim=0)
    unsure = (probability < networks.config.self_training.pseudo_threshold).numpy()
    drawn = label_map(label.numpy().astype(np.uint8), unsure=unsure)
    return [Panel(PSEUDO_LABEL, drawn, f"{_percent(1 - unsure.mean())} sure, the rest hatched")]


@torch.no_grad()
def masked_pass(networks: Networks, subject: Subject) -> list[Panel] | str:
    """One MFM pass over the central crop: what is hidden, and what the decoder makes of the rebuilt features."""
    if networks.trained is None:
        return networks.absent
    rebuilder, student, config = networks.trained.rebuilder, networks.trained.student, networks.config
    if rebuilder is None:
        return "There are no hidden cells and no rebuilt features: MFM is off in this run."
    if config.mfm.reconstruction != "classes":
        rebuilt = config.mfm.reconstruction.replace("_", " ")
        return f"Rebuilt features are not classified in this run: it rebuilds {rebuilt}."
    image = subject.sample.image
    box = _central_box((image.shape[1], image.shape[2]), config.data.crop)
    crop = image[:, box[0], box[1]]
    generator = torch_generator(config.seed, Stream.MFM_MASK, subject.number)
    mask = draw_mask(1, rebuilder.grid, config.mfm.mask_ratio, generator)
    features = student.encode(student.context(normalise(crop[None])))
    logits = resize(student.decode(rebuild(student, rebuilder, features, mask)), crop.shape[1:])

    outside = torch.ones(image.shape[1:], dtype=torch.bool)
    hidden, label = torch.zeros_like(outside), torch.zeros(image.shape[1:], dtype=torch.uint8)
    outside[box] = False
    hidden[box] = enlarge_mask(mask, crop.shape[1:])[0]
    label[box] = logits.argmax(dim=1)[0].byte()
    rows, columns = rebuilder.grid
    share = f"{_percent(mask.float().mean().item())} of the {rows} \N{MULTIPLICATION SIGN} {columns} cells"
    beyond = "; the pale rest is outside of the crop" if outside.any() else ""
    covered = photograph(greyed(subject.photo, hidden.numpy(), outside.numpy()))
    drawn = label_map(label.numpy(), outside=outside.numpy())
    return [
        Panel(HIDDEN_CELLS, covered, share + beyond),
        Panel("From rebuilt features", drawn, f"where hidden: {_right(label.numpy(), subject, hidden)}"),
    ]


ALL_VIEWS: tuple[View, ...] = (image_and_truth, first_prediction, prediction_and_mistakes, masked_pass, pseudo_label)


def _central_box(size: tuple[int, int], crop: tuple[int, int]) -> tuple[slice, slice]:
    """The middle of an image in the training crop's size, or all of a side that is shorter."""
    sides = [(max(have - want, 0) // 2, min(have, want)) for have, want in zip(size, crop, strict=True)]
    (top, height), (left, width) = sides
    return slice(top, top + height), slice(left, left + width)


def _right(prediction: Pixels, subject: Subject, where: Tensor | None = None) -> str:
    """Share of labelled pixels with the right class, in words."""
    counts = subject.label != IGNORE_INDEX
    if where is not None:
        counts = counts & where
    if not counts.any():
        return "no labelled pixels"
    right = torch.from_numpy(prediction.astype(np.int64))[counts] == subject.label[counts].long()
    return f"{_percent(right.float().mean().item())} of pixels right"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
