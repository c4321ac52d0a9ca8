"""Probe a run's Rebuilder on validation images: whether it has something to do, does it, and what its loss teaches.

Training never sees what is asked here, for it takes true labels of the target. Everything is computed as in a training
step, BatchNorm over the micro-batch included, but without dropout and drop-path, so that it can be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mfm_dist.batch import UDABatch
from mfm_dist.checkpoint.files import Checkpoint
from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.config.schema import DataSection, RunConfig
from mfm_dist.data.reader import Sample, ShardReader
from mfm_dist.data.transforms import central_crop
from mfm_dist.errors import BadSample, ConfigError, DataError
from mfm_dist.methods.base import ForwardKind
from mfm_dist.methods.losses import cross_entropy, pixel_cross_entropy
from mfm_dist.methods.mfm import (
    Rebuild,
    View,
    completed,
    hide,
    keyed_masks,
    masked_features_loss,
    rebuild,
    view_of,
)
from mfm_dist.methods.self_training import PseudoTarget
from mfm_dist.models.layers import batch_norm_untracked, resize
from mfm_dist.models.rebuilder import hidden_places
from mfm_dist.optim import build_optimizer
from mfm_dist.rng import Stream, keyed_generator
from mfm_dist.train_module import TrainModule

IMAGES = 40
MICRO_BATCH = 2
"""Images at a time, as published; one of them alone would have no other."""
BINS = 15
"""Equal bins of confidence over which the calibration error is taken (Guo et al., 2017)."""
RESAMPLES = 2000

Values = dict[str, float | None]
"""Figures by name; None where there is nothing to measure, as in a gradient that is 0."""


def why_no_probe(config: RunConfig) -> str | None:
    """Say why a run has nothing to probe; None if it has."""
    if not config.mfm.enabled:
        return "MFM is off in this run (mfm.enabled=false)"
    if not config.mfm.use_rebuilder:
        return "this run has no Rebuilder (mfm.use_rebuilder=false)"
    if config.mfm.reconstruction != "classes":
        return f"rebuilt features are not classified in this run (mfm.reconstruction={config.mfm.reconstruction})"
    if config.data.validation is None:
        return "this run has no target labels (data.validation=null)"
    if config.model.freeze and not config.model.lora.rank:
        return "the encoder is frozen (model.freeze=true), so MFM sends no gradient to it"
    return None


def probe(module: TrainModule, batches: Sequence[UDABatch], checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Measure everything; the module is afterwards as it was.

    Args:
        batches: of ``read_batches``.
        checkpoint: where the optimiser's state is; None: the step of ``output_change`` is its first.

    Returns:
        ``agreement``, ``rebuilder_minus_diffusion``, ``alignment``, ``gradient_share``, ``calibration`` and
        ``output_change``, of the functions of these names, as JSON has them.

    Raises:
        ConfigError: the run has nothing to probe.
    """
    if reason := why_no_probe(module.config):
        raise ConfigError(f"there is nothing to probe: {reason}")
    with as_in_training_without_dropout(module.student):
        looks = [look_at(module, batch) for batch in batches]
        agreeing = agreement(module, looks)
        hidden = {name: found["hidden"] for name, found in agreeing.items()}
        return {
            "images": sum(len(look.mask) for look in looks),
            "agreement": agreeing,
            "rebuilder_minus_diffusion": _difference(hidden["rebuilder"], hidden["diffusion"]),
            **gradients(module, looks),
            "calibration": calibration(looks),
            "output_change": output_change(module, looks[0], checkpoint),
        }


def read_batches(
    reader: ShardReader, data: DataSection, *, images: int = IMAGES
) -> tuple[list[UDABatch], list[BadSample]]:
    """Read images evenly spread over a validation set as micro-batches of ``MICRO_BATCH``, and name what is unusable.

    The middle of each image, as large as a training crop, stands for source and target alike: as a target it has
    pseudo-labels and margins, as a source its true labels.

    Raises:
        DataError: not even one micro-batch.
    """
    numbers = np.linspace(0, len(reader) - 1, min(images, len(reader))).round().astype(int).tolist()
    found = [reader.read(number) for number in numbers]
    bad = [one for one in found if isinstance(one, BadSample)]
    samples = [one for one in found if isinstance(one, Sample)]
    groups = [samples[first : first + MICRO_BATCH] for first in range(0, len(samples), MICRO_BATCH)]
    batches = [_batch(group, data, number) for number, group in enumerate(groups) if len(group) == MICRO_BATCH]
    if not batches:
        reasons = "".join(f"\n  {one}" for one in bad)
        raise DataError(f"{reader.index.folder}: the probe needs {MICRO_BATCH} usable images at least{reasons}")
    return batches, bad


def _batch(samples: Sequence[Sample], data: DataSection, number: int) -> UDABatch:
    crops = []
    for sample in samples:
        assert sample.label is not None
        crops.append(
            central_crop(sample.image, sample.label, data.crop, box=data.target_resize, margins=data.target_margins)
        )
    image, label, valid = (torch.stack(parts) for parts in zip(*crops, strict=True))
    return UDABatch(source_image=image, source_label=label, target_image=image, target_valid=valid, block=number)


class Look(NamedTuple):
    """What is looked at of one micro-batch."""

    image: Tensor
    """float32 [B, 3, h, w], normalised, as the encoder sees it whole: under HRDA its context."""
    clean: View
    """With the teacher's label and weight."""
    truth: View
    """With the true label."""
    pseudo: PseudoTarget
    mask: Tensor
    """bool [B, rows, cols] on the CPU, True = hidden, as the run's settings say."""

    @property
    def hidden(self) -> Tensor:
        """The mask at the label's size: bool [B, H, W]."""
        return hidden_places(self.mask, self.clean.label)


def look_at(module: TrainModule, batch: UDABatch) -> Look:
    """Ask the teacher about a micro-batch, and draw its masks."""
    settings = module.config.mfm
    inputs = module.step_inputs(batch.to(next(module.parameters()).device))
    clean, truth = (view_of(inputs, kind) for kind in (ForwardKind.MFM, ForwardKind.MFM_SOURCE))
    assert inputs.pseudo is not None
    mask = keyed_masks(inputs, module.config.rebuilder.grid, settings)
    return Look(module.student.context(clean.image), clean, truth, inputs.pseudo, mask)


@contextmanager
def as_in_training_without_dropout(student: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise with batch statistics and keep its running ones; all else is in evaluation mode."""
    before = {module: module.training for module in student.modules()}
    student.eval()
    for module in before:
        if isinstance(module, _BatchNorm):
            module.train()
    try:
        with batch_norm_untracked(student):
            yield
    finally:
        for module, training in before.items():
            module.training = training


def diffuse(last_feature: Tensor, features: list[Tensor], mask: Tensor) -> list[Tensor]:  # noqa: ARG001 - as a Rebuilder
    """Rebuild each map from its own visible places, without parameters: ``fill_from_neighbours``."""
    return [fill_from_neighbours(feature, hidden_places(mask, feature).unsqueeze(1)) for feature in features]


def fill_from_neighbours(feature: Tensor, hidden: Tensor) -> Tensor:
    """Fill hidden places of [B, C, h, w] with smooth averages of the visible ones around; ``hidden`` is [B, 1, h, w].

    Averages of visible places are taken at halved sizes down to one, and a place takes from each size the share that
    is visible there, the rest from the next (pull-push, Gortler et al., 1996). An image without any visible place
    takes the mean of the others, or 0.
    """
    seen = (~hidden).to(feature.dtype)
    return torch.where(hidden, _pull_push(feature * seen, seen), feature)


def _pull_push(total: Tensor, seen: Tensor) -> Tensor:
    """Average at this size where it is seen, at half the size elsewhere.

    Args:
        total: sum of visible values over the places that a cell stands for, over their number, [B, C, h, w].
        seen: share of visible places, [B, 1, h, w].
    """
    average = total / seen.clamp_min(1e-6)
    if max(total.shape[-2:]) == 1:
        every_image = total.sum(dim=0, keepdim=True) / seen.sum(dim=0, keepdim=True).clamp_min(1e-6)
        return torch.where(seen > 0, average, every_image)
    coarse = _pull_push(*(F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (total, seen)))
    return seen * average + (1 - seen) * resize(coarse, total.shape[-2:])


@torch.no_grad()
def agreement(module: TrainModule, looks: Sequence[Look]) -> dict[str, Values]:
    """Compare the student's decoding of an image whose features are in part hidden with the teacher's pseudo-label.

    Returns:
        The share of valid pixels with the same class, ``visible`` and ``hidden``, by how hidden features are rebuilt:

        - ``zero_fill``: not at all, they are 0;
        - ``diffusion``: as an average of their neighbours, without parameters. What the Rebuilder reaches above this
          is what it has learned;
        - ``rebuilder``: by the Rebuilder;
        - ``other_image``: by the Rebuilder, from the last map of another image. What is left is what it knows without
          looking: the layout of a street;
        - ``all_hidden``: by the Rebuilder where all is hidden.
    """
    student, rebuilder = module.student, module.rebuilder
    assert rebuilder is not None
    counts = {name: np.zeros((2, 2)) for name in ("zero_fill", "diffusion", "rebuilder", "other_image", "all_hidden")}
    for look in looks:
        features = student.encode(look.image)
        # Of [last map, mask]: what rebuilds, what it sees, where.
        last, other = features[-1], features[-1].roll(1, dims=0)
        ways: dict[str, tuple[Rebuild, Tensor, Tensor]] = {
            "zero_fill": (hide, last, look.mask),
            "diffusion": (diffuse, last, look.mask),
            "rebuilder": (rebuilder, last, look.mask),
            "other_image": (rebuilder, other, look.mask),
            "all_hidden": (rebuilder, last, torch.ones_like(look.mask)),
        }
        for name, (way, seen, mask) in ways.items():
            read = student.decoder_inputs
            logits = student.decode(completed(features, read, way(seen, [features[index] for index in read], mask)))
            label = look.clean.label
            same = resize(logits.float(), label.shape[-2:]).argmax(dim=1) == label
            hidden = hidden_places(mask, label)
            for place, where in enumerate((~hidden, hidden)):
                where = where & look.pseudo.valid
                counts[name][place] += float((same & where).sum()), float(where.sum())
    return {
        name: {place: _share(*pair) for place, pair in zip(("visible", "hidden"), found.tolist(), strict=True)}
        for name, found in counts.items()
    }


class Gradients(NamedTuple):
    """Of one micro-batch."""

    visible: Tensor
    """[P], of the loss of visible pixels, with respect to the encoder's last weight."""
    hidden: Tensor
    """[P], likewise."""
    truth: Tensor
    """[P], of the cross-entropy of the clean image with its true label, likewise."""
    through_rebuilder: float
    """Squared norm over all weights of the encoder, of what comes back through what the Rebuilder reads."""
    whole: float
    """Squared norm over all weights of the encoder."""


def gradients(module: TrainModule, looks: Sequence[Look]) -> dict[str, Any]:
    """Measure where MFM's gradient points, and which way it takes.

    Returns:
        ``alignment``: by ``visible`` and ``hidden``, the ``cosine`` between the gradients of L_mfm on these pixels and
        of the cross-entropy of the clean image with its true label, each summed over micro-batches, with the 95 %
        bootstrap over these (``low``, ``high``). With respect to the last weight of the encoder that is no vector, and
        with pseudo-label and weight of the run; both places are asked, also where the run counts one.
        ``gradient_share``: root of the sum over micro-batches of |g_r|^2 over that of |g|^2. g is the gradient of L_mfm
        with respect to the encoder, on the pixels that the run counts; g_r is the same with visible maps taken as
        constants, so that it reaches the encoder only through the map that the Rebuilder reads.
    """
    found = [gradients_of(module, look) for look in looks]
    truth = torch.stack([one.truth for one in found])
    places = {
        "visible": torch.stack([one.visible for one in found]),
        "hidden": torch.stack([one.hidden for one in found]),
    }
    whole = sum(one.whole for one in found)
    share = _share(sum(one.through_rebuilder for one in found), whole)
    return {
        "alignment": {
            name: cosine_with_interval(gradient, truth, keyed_generator(module.config.seed, Stream.BOOTSTRAP, 0))
            for name, gradient in places.items()
        },
        "gradient_share": None if share is None else share**0.5,
    }


def gradients_of(module: TrainModule, look: Look) -> Gradients:
    """Run the backward passes of one micro-batch; no parameter's ``grad`` is touched."""
    student, rebuilder = module.student, module.rebuilder
    assert rebuilder is not None
    encoder = [parameter for parameter in student.backbone.parameters() if parameter.requires_grad]
    last = [parameter for parameter in encoder if parameter.ndim > 1][-1]
    place = next(number for number, parameter in enumerate(encoder) if parameter is last)

    def gradient(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, encoder, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(encoder, found, strict=True)]

    features = student.encode(look.image)
    visible, hidden = split_loss(student.decode(rebuild(student, rebuilder, features, look.mask)), look)
    of_visible, of_hidden = gradient(visible), gradient(hidden)
    constant = [feature.detach() for feature in features]
    read = student.decoder_inputs
    rebuilt = rebuilder(features[-1], [constant[index] for index in read], look.mask)
    through = split_loss(student.decode(completed(constant, read, rebuilt)), look)
    counts_visible = module.config.mfm.loss_on == "all"
    of_rebuilder = gradient(through[0] + through[1] if counts_visible else through[1])
    whole = [v + h if counts_visible else h for v, h in zip(of_visible, of_hidden, strict=True)]
    of_truth = gradient(cross_entropy(student.decode(features), look.truth.label))
    return Gradients(
        visible=of_visible[place].flatten(),
        hidden=of_hidden[place].flatten(),
        truth=of_truth[place].flatten(),
        through_rebuilder=_square(of_rebuilder),
        whole=_square(whole),
    )


def split_loss(logits: Tensor, look: Look) -> tuple[Tensor, Tensor]:
    """Split L_mfm of logits [B, C, h, w] into its visible and its hidden pixels; both are over the number of all."""
    errors = pixel_cross_entropy(logits, look.clean.label) * look.clean.weight
    return (errors * ~look.hidden).sum() / errors.numel(), (errors * look.hidden).sum() / errors.numel()


def cosine_with_interval(first: Tensor, second: Tensor, generator: np.random.Generator) -> Values:
    """Return the cosine between the sums of vectors [n, P] and [n, P], and its 95 % bootstrap over the n pairs."""
    pairs = [first @ second.T, first @ first.T, second @ second.T]
    cross, own, others = (one.double().cpu().numpy() for one in pairs)
    count = len(cross)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)  # how often each pair is in it
    times = np.concatenate([np.ones((1, count)), drawn])

    def product(table: np.ndarray) -> np.ndarray:
        return np.einsum("ri,ij,rj->r", times, table, times)

    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = product(cross) / np.sqrt(product(own) * product(others))
    if not np.isfinite(cosines[0]):
        return {"cosine": None, "low": None, "high": None}
    low, high = np.nanquantile(cosines[1:], [0.025, 0.975])
    return {"cosine": float(cosines[0]), "low": float(low), "high": float(high)}


def calibration(looks: Sequence[Look]) -> Values:
    """Compare what the teacher is sure of with what is right, over labelled and valid pixels.

    Returns:
        ``expected_error``: mean over ``BINS`` bins of confidence, by their pixels, of |confidence - accuracy|;
        ``pseudo_weight``: its mean over micro-batches; ``accuracy`` of the pseudo-label; ``weight_minus_accuracy``.
    """
    sums = torch.zeros(3, BINS, dtype=torch.float64)  # of pixels, confidence, right ones
    for look in looks:
        counts = (look.truth.label != IGNORE_INDEX) & look.pseudo.valid
        confidence = look.pseudo.confidence[counts].double().cpu()
        right = (look.pseudo.label == look.truth.label)[counts].double().cpu()
        bins = (confidence * BINS).long().clamp_max(BINS - 1)
        for row, values in zip(sums, (torch.ones_like(right), confidence, right), strict=True):
            row.index_add_(0, bins, values)
    pixels = float(sums[0].sum())
    weight = float(torch.stack([look.pseudo.weight.amax() for look in looks]).mean())
    accuracy = _share(float(sums[2].sum()), pixels)
    return {
        "expected_error": _share(float((sums[1] - sums[2]).abs().sum()), pixels),
        "pseudo_weight": weight,
        "accuracy": accuracy,
        "weight_minus_accuracy": _difference(weight, accuracy),
    }


def output_change(module: TrainModule, look: Look, checkpoint: Checkpoint | None) -> float | None:
    """Measure how much one step of the Rebuilder changes what it rebuilds: |after - before| / |before|.

    Over the hidden places of all maps of the micro-batch that the step is taken on, with the optimiser's own settings,
    at its full rate (neither warm-up nor decay) and without clipping.
    """
    rebuilder, student, config = module.rebuilder, module.student, module.config
    assert rebuilder is not None
    optimizer = build_optimizer(module, config.optim)
    optimizer.param_groups = [group for group in optimizer.param_groups if group["part"] == "rebuilder"]
    if checkpoint is not None:
        _load_optimizer(optimizer, rebuilder, checkpoint)
    weights = {name: value.clone() for name, value in rebuilder.state_dict().items()}
    with torch.no_grad():
        features = student.encode(look.image)
    maps = [features[index] for index in student.decoder_inputs]

    def hidden_parts() -> Tensor:
        with torch.no_grad():
            rebuilt = rebuilder(features[-1], maps, look.mask)
        places = [hidden_places(look.mask, one).unsqueeze(1) for one in rebuilt]
        return torch.cat([one[place.expand_as(one)] for one, place in zip(rebuilt, places, strict=True)])

    def decode(rebuilt: list[Tensor]) -> Tensor:
        return student.decode(completed(features, student.decoder_inputs, rebuilt))

    before = hidden_parts()
    label, weight, loss_on = look.clean.label, look.clean.weight, config.mfm.loss_on
    loss = masked_features_loss(rebuilder, maps, decode, look.mask, label, weight, loss_on=loss_on)
    parameters = list(rebuilder.parameters())
    found = torch.autograd.grad(config.mfm.loss_weight * loss, parameters, allow_unused=True)
    for parameter, one in zip(parameters, found, strict=True):
        parameter.grad = torch.zeros_like(parameter) if one is None else one
    optimizer.step()
    optimizer.zero_grad()
    after = hidden_parts()
    rebuilder.load_state_dict(weights)
    return _share(float((after - before).norm()), float(before.norm()))


def _load_optimizer(optimizer: torch.optim.Optimizer, rebuilder: nn.Module, checkpoint: Checkpoint) -> None:
    """Give the optimiser its state of the Rebuilder's parameters; those without one have seen no gradient yet."""
    parameters = dict(rebuilder.named_parameters(prefix="rebuilder"))
    for name, value in checkpoint.tensors("optimizer").items():
        owner, _, key = name.rpartition("/")
        if owner in parameters:
            state = optimizer.state[parameters[owner]]
            state[key] = value.to(parameters[owner].device)
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.tensor(float(checkpoint.progress.applied))


def _square(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([one.double().square().sum() for one in tensors]).sum())


def _share(part: float, whole: float) -> float | None:
    """Divide; None where nothing is measured, or a network has diverged."""
    share = part / whole if whole else math.nan
    return share if math.isfinite(share) else None


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second
