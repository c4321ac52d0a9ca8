"""Student, teacher and Rebuilder in one module, whose forward is the paper's training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mfm_dist.batch import UDABatch
from mfm_dist.classes import ClassSet
from mfm_dist.config.schema import RunConfig
from mfm_dist.methods.base import ForwardKind, Maps, Method, Pass, StepInputs, Term
from mfm_dist.methods.hrda import box_draws
from mfm_dist.methods.mfm import mask_draws, mfm_pass, passes_of
from mfm_dist.methods.self_training import PseudoTarget, pseudo_target, without_margins
from mfm_dist.models.backbone import Backbone
from mfm_dist.models.dropout import dropouts_of, masked, shares_kept
from mfm_dist.models.hrda import HRDASegmentor
from mfm_dist.models.layers import batch_norm_untracked
from mfm_dist.models.preprocessing import channel_constants, normalise_by
from mfm_dist.models.rebuilder import Rebuilder
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.rng import BlockKey, Stream, keyed_seed, torch_generator

IMAGES = 2
"""Images of a pass at most: HRDA's context and detail window."""


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gives: the scalar to run backward from, and the numbers to log."""

    total: Tensor
    """Sum of the weighted terms that ran, with its graph."""
    losses: dict[str, Tensor]
    """Each of them by name, unweighted and detached; ``pseudo_weight`` stands among them where there is a teacher."""
    measured: dict[str, Tensor]
    """What was measured beside them, by name; empty unless it was asked for."""
    inputs: StepInputs
    """What the terms looked at, teacher targets included; a later call for the same batch takes it."""


class TrainModule(nn.Module):
    """The only module the engine wraps, and ``forward`` its only way in, so that no gradient bypasses DDP or ZeRO."""

    image_mean: Tensor
    image_std: Tensor
    dropout_keep: Tensor

    def __init__(
        self,
        *,
        student: Segmentor,
        rebuilder: Rebuilder | None,
        method: Method,
        config: RunConfig,
        classes: ClassSet,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = Teacher(student) if method.needs_teacher or config.mfm.enabled else None
        self.initial_encoder = InitialEncoder(student.backbone) if method.needs_initial_encoder else None
        self.rebuilder = rebuilder
        self.method = method
        self.config = config
        self.classes = classes
        self.map_gradients = MapGradients()
        self.term_names = tuple(self.terms(mfm_weight=0.0))
        """The terms of the loss, in the order they run."""
        self.encodes_once = config.train.encode_once != "never" and why_not_once(config, student.backbone) is None
        self.encoder_dropouts, head_dropouts = dropouts_of([student.backbone]), dropouts_of(student.heads)
        mean, std = channel_constants()
        self.register_buffer("image_mean", mean, persistent=False)
        self.register_buffer("image_std", std, persistent=False)
        keep = shares_kept([*self.encoder_dropouts, *head_dropouts])
        self.register_buffer("dropout_keep", keep, persistent=False)

    def forward(
        self,
        batch: UDABatch,
        mfm_weight: float,
        only: str | None = None,
        inputs: StepInputs | None = None,
        measure: bool = False,
    ) -> StepOutput:
        """One micro-batch: L = L_sup + L_uda + lambda * L_mfm (MFM, section 3).

        The terms may also run one by one, in their order, each in a call of its own: the same numbers, draws and
        BatchNorm statistics, but a graph that the engine can free before the next term.

        Args:
            batch: one block, on the device.
            mfm_weight: lambda at this step; at 0 the term still runs, because ZeRO-3 would update an unused
                parameter with its previous gradient.
            only: name of the one term to run, None for all.
            inputs: of ``prepare_inputs``; or of the previous term's output, so that the teacher is asked once for a
                batch.
            measure: also measure the loss of L_mfm where hidden and where visible, the Rebuilder's largest attention
                logit, and the gradients that reach the encoder's last map.
        """
        inputs = self.with_targets(inputs or self.prepare_inputs(batch, mfm_weight))
        losses: dict[str, Tensor] = {}
        weighted: list[Tensor] = []
        measured: dict[str, Tensor] = {}
        terms = self.terms(inputs.mfm_weight, measured if measure else None)
        passes = {name: term(self.student, inputs) for name, term in terms.items() if only in (None, name)}
        encoded = self.encode_together(passes, inputs) if self.encodes_once else {}
        for name, seen in passes.items():
            with self.pass_of(name, seen, inputs, mfm_weight):
                maps = iter(encoded[name]) if self.encodes_once else self.encode_alone(name, seen, inputs)
                if self.config.mfm.enabled and (measure or self.config.mfm.gradient_budget):
                    maps = self.map_gradients.watched(maps, of_mfm=self.is_of_mfm(name))
                for part, loss in seen.losses(maps).items():
                    losses[part] = loss.value
                    weighted.append(loss.weight * loss.value)

        logged = {name: loss.detach() for name, loss in losses.items()}
        if inputs.pseudo is not None:
            logged["pseudo_weight"] = inputs.pseudo.weight.amax()
        return StepOutput(total=torch.stack(weighted).sum(), losses=logged, measured=measured, inputs=inputs)

    def terms(self, mfm_weight: float | Tensor, measured: dict[str, Tensor] | None = None) -> dict[str, Term]:
        """List the terms by name: those of the method, L_sup + L_uda, the cross-entropy on labelled target images where
        there are any, then L_mfm, which adds what it measures."""
        terms = dict(self.method.terms())
        if self.config.data.target_labelled:
            terms[ForwardKind.TARGET_LABELLED.label] = self.target_labelled_term
        if self.config.mfm.enabled:
            for kind in passes_of(self.config.mfm):
                terms[kind.label] = partial(self.masked_features_term, kind=kind, weight=mfm_weight, measured=measured)
        return terms

    def target_labelled_term(self, student: Segmentor, inputs: StepInputs) -> Pass:
        """Compute cross-entropy on labelled target images, as the method classifies, at a weight of its own."""
        assert inputs.labelled_target_image is not None
        assert inputs.labelled_target_label is not None
        weight, kind = self.config.method.target_labelled_weight, ForwardKind.TARGET_LABELLED
        image, label = inputs.labelled_target_image, inputs.labelled_target_label
        seen = self.method.classify(student, inputs, kind, image, label)
        return seen.weighted(weight)

    def masked_features_term(
        self,
        student: Segmentor,
        inputs: StepInputs,
        *,
        kind: ForwardKind,
        weight: float | Tensor,
        measured: dict[str, Tensor] | None = None,
    ) -> Pass:
        """Compute L_mfm."""
        return mfm_pass(
            student,
            self.rebuilder,
            inputs,
            self.config.mfm,
            weight=weight,
            detail_weight=self.config.hrda.detail_loss_weight,
            teacher=self.teacher_features,
            kind=kind,
            measured=measured,
        )

    def is_of_mfm(self, name: str) -> bool:
        """Tell whether this term is a pass of L_mfm."""
        return self.config.mfm.enabled and name in {kind.label for kind in passes_of(self.config.mfm)}

    def encode_together(self, passes: Mapping[str, Pass], inputs: StepInputs) -> dict[str, list[list[Tensor]]]:
        """Encode the images of all passes, those of one size in one call; return the maps of each by pass."""
        images = [(name, number, image) for name, seen in passes.items() for number, image in enumerate(seen.images)]
        maps: dict[str, list[list[Tensor]]] = {name: [[] for _ in seen.images] for name, seen in passes.items()}
        for size in dict.fromkeys(image.shape[1:] for *_, image in images):
            alike = [one for one in images if one[2].shape[1:] == size]
            counts = [len(image) for *_, image in alike]
            masks = [self.dropout_masks(inputs, name, number, len(image))[0] for name, number, image in alike]
            self._seed(inputs, len(self.term_names))
            with masked(self.encoder_dropouts, torch.cat(masks)):
                together = self.student.encode(torch.cat([image for *_, image in alike]))
            parts = zip(*(feature.split(counts) for feature in together), strict=True)
            for (name, number, _), own in zip(alike, parts, strict=True):
                maps[name][number] = list(own)
        return maps

    def encode_alone(self, name: str, seen: Pass, inputs: StepInputs) -> Maps:
        """Encode the images of one pass, each in a call of its own."""
        for number, image in enumerate(seen.images):
            with masked(self.encoder_dropouts, self.dropout_masks(inputs, name, number, len(image))[0]):
                features = self.student.encode(image)
            yield features

    @contextmanager
    def pass_of(self, name: str, seen: Pass, inputs: StepInputs, mfm_weight: float) -> Iterator[None]:
        """Span a pass: its draws are its own, and L_mfm counts in BatchNorm's running statistics only if it is to."""
        self._seed(inputs, self.term_names.index(name))
        tracked = not self.is_of_mfm(name) or (self.config.mfm.update_bn and mfm_weight > 0)
        with nullcontext() if tracked else batch_norm_untracked(self.student):
            self.student.head_masks = [
                self.dropout_masks(inputs, name, number, len(image))[1] for number, image in enumerate(seen.images)
            ]
            try:
                yield
            finally:
                self.student.head_masks = None

    def _seed(self, inputs: StepInputs, number: int) -> None:
        """Have what is drawn without a given mask, in the encoder's attention for example, depend on block and pass."""
        if not self.config.train.cuda_graph:  # whose engine has made sure that nothing is
            torch.manual_seed(keyed_seed(inputs.seed, Stream.FORWARD, inputs.block, number))

    def dropout_masks(self, inputs: StepInputs, name: str, number: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the dropout masks of encoder and heads for an image of a pass, each [count, sum of widths]."""
        masks = inputs.dropout[self.term_names.index(name), number, :count]
        encoder = sum(layer.width for layer in self.encoder_dropouts)
        return masks[:, :encoder], masks[:, encoder:]

    def pop_map_squares(self) -> Tensor:
        """Return the squared norms at the encoder's last map since the last call: [2], of the method and of L_mfm."""
        squares = self.map_gradients.squares
        if squares is None:
            return torch.zeros(2, device=self.image_mean.device)
        popped = squares.clone()
        squares.zero_()
        return popped

    def draw(self, batch: UDABatch) -> UDABatch:
        """Return the batch with all tensors that its step draws, on the CPU: functions of seed, block and positions.

        Drawn before the batch goes to the device they travel with it, and the step copies nothing.
        """
        key = BlockKey(self.config.seed, batch.block, batch.positions)
        height, width = batch.source_label.shape[-2:]
        draws = self.method.draws(key, (height, width))
        if self.config.mfm.enabled:
            draws |= mask_draws(key, self.config.rebuilder.grid, self.config.mfm)
        if isinstance(self.student, HRDASegmentor):
            draws |= box_draws(self.student, key, (height, width))
        shape = (IMAGES, 2 * len(key.positions), len(self.dropout_keep))
        dropout = [
            torch.rand(shape, generator=torch_generator(key.seed, Stream.FORWARD, key.block, index))
            for index in range(len(self.term_names))
        ]
        return replace(batch, draws={**draws, "dropout": torch.stack(dropout)})

    def step_inputs(self, batch: UDABatch) -> StepInputs:
        """Return what the terms look at, the teacher's targets included, with a lambda of 1."""
        return self.with_targets(self.prepare_inputs(batch, 1.0))

    def prepare_inputs(self, batch: UDABatch, mfm_weight: float) -> StepInputs:
        """Return what the terms look at, as far as it takes no network: images, draws, lambda.

        Two micro-batches may differ in here by more than the values of tensors; in all that follows they do not.
        """
        if not batch.draws:
            batch = self.draw(batch).to(batch.source_image.device)
        source_image, target_image = (
            normalise_by(image, self.image_mean, self.image_std) for image in (batch.source_image, batch.target_image)
        )
        few = batch.labelled_target_image
        inputs = StepInputs(
            source_image=source_image,
            source_label=batch.source_label,
            target_image=target_image,
            target_valid=batch.target_valid,
            labelled_target_image=None if few is None else normalise_by(few, self.image_mean, self.image_std),
            labelled_target_label=batch.labelled_target_label,
            classes=self.classes,
            seed=self.config.seed,
            block=batch.block,
            positions=batch.positions,
            draws=batch.draws,
            dropout=(batch.draws["dropout"] < self.dropout_keep) / self.dropout_keep,
            mfm_weight=torch.full((), mfm_weight, device=self.image_mean.device),
            mean=self.image_mean,
            std=self.image_std,
        )
        return self.method.prepare(inputs)

    def with_targets(self, inputs: StepInputs) -> StepInputs:
        """Return the same with the answers of teacher and initial encoder, which are asked once."""
        pseudo, feature = inputs.pseudo, inputs.initial_feature
        if pseudo is None:
            pseudo = self.pseudo_target(inputs.target_image, inputs.target_valid)
        if feature is None and self.initial_encoder is not None:
            feature = self.initial_encoder(self.student.context(inputs.source_image))
        return replace(inputs, pseudo=pseudo, initial_feature=feature)

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint weights outside the checkpoint that training rests on. Ask before the engine cuts the weights."""
        return {} if self.initial_encoder is None else {"initial_encoder": self.initial_encoder.fingerprint()}

    def teacher_pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield each student parameter that trains and the teacher's that follows it; none without a teacher."""
        if self.teacher is not None:
            followers = dict(self.teacher.segmentor.named_parameters())
            for name, parameter in self.student.named_parameters():
                if parameter.requires_grad:
                    yield parameter, followers[name]

    def pseudo_target(self, image: Tensor, valid: Tensor) -> PseudoTarget | None:
        """Ask the teacher for label and weight for a clean target image, without gradients."""
        if self.teacher is None:
            return None
        settings = self.config.self_training
        valid = without_margins(valid, settings.pseudo_weight_ignore_top, settings.pseudo_weight_ignore_bottom)
        with torch.no_grad():
            return pseudo_target(self.teacher(image), valid, settings.pseudo_threshold)

    @torch.no_grad()
    def teacher_features(self, image: Tensor) -> list[Tensor]:
        """Return the teacher's encoder maps of a normalised image, without gradients."""
        assert self.teacher is not None
        return self.teacher.segmentor.encode(image)


def why_not_once(config: RunConfig, backbone: Backbone) -> str | None:
    """Say why the images of all terms are not to be encoded in one call; None where they may."""
    if config.memory.lean:
        return "memory.lean holds the activations of one term at a time"
    if not backbone.frozen and any(isinstance(layer, _BatchNorm) for layer in backbone.modules()):
        return f"the encoder {config.model.backbone} has BatchNorm, which would normalise all images together"
    return None


class MapGradients:
    """Sums the squares of the gradients that come back to the encoder's last map."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        """Of the method's own terms, and of lambda * L_mfm; None before the first. Then always the same tensor, which
        a graph of the step adds to."""

    def watched(self, maps: Maps, *, of_mfm: bool) -> Maps:
        """Add what the backward will bring to the last of the maps of each image to one of the sums."""
        for features in maps:
            if features[-1].requires_grad:
                features[-1].register_hook(partial(self._add, int(of_mfm)))
            yield features

    def _add(self, place: int, gradient: Tensor) -> None:
        if self.squares is None:
            self.squares = torch.zeros(2, device=gradient.device)
        # An index that is a number, for a tensor would be on the CPU.
        self.squares[place] += gradient.detach().float().square().sum()


class Teacher(nn.Module):
    """A frozen copy of the student, later its exponential moving average (``distributed.teacher``).

    Dropout and drop-path are off, BatchNorm normalises with the statistics of the batch it sees, and its running
    statistics are neither read nor written: so does the published code (docs/methods.md).
    """

    def __init__(self, student: Segmentor) -> None:
        super().__init__()
        self.segmentor = deepcopy(student).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Teacher:
        """Set the one mode a teacher has, whatever ``mode`` the modules around it are put in."""
        super().train(False)
        backbone = self.segmentor.backbone
        frozen = set(backbone.net.modules()) if backbone.frozen else set()
        for module in self.modules():
            if isinstance(module, _BatchNorm) and module not in frozen:
                module.train()
                module.track_running_stats = False
        self.training = mode
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [B, C, H, W] of a normalised image [B, 3, H, W]."""
        logits: Tensor = self.segmentor(image)
        return logits


class InitialEncoder(nn.Module):
    """The student's encoder as it was before the first step, frozen, in evaluation mode (DAFormer).

    It is in no checkpoint: at every start it is copied from the student before a checkpoint is loaded, whose weights
    then follow from the configuration alone. ``fingerprint`` says whether they are those of the start before.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = deepcopy(backbone).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> InitialEncoder:
        """Stay in evaluation mode, whatever ``mode`` the modules around it are put in."""
        super().train(False)
        self.training = mode
        return self

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Return the last encoder map [B, C, h, w] of a normalised image [B, 3, H, W]."""
        return self.backbone(image)[-1]

    def fingerprint(self) -> str:
        """Return the SHA-256 of all weights and statistics. Ask before the engine cuts the weights."""
        digest = sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
