"""MIC (Hoyer et al., CVPR 2023, arXiv 2212.01322): the student must find in a masked image what the teacher saw."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_dist.config.schema import MICSection, RunConfig, SelfTrainingSection
from mfm_dist.methods import dacs, daformer, hrda, source_only
from mfm_dist.methods.augment import Shipped, augmentation_tensors, strong_augment
from mfm_dist.methods.base import ForwardKind, Method, Pass, StepInputs, Term, named
from mfm_dist.methods.self_training import pseudo_weight
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.rng import Keyed, Stream, keyed_generator, torch_generator

BLOCKS = 16
"""Masked blocks from top to bottom of a crop, unless their size is given: 32 pixels each of 512, 64 of 1024 (MIC)."""


class MIC(Method):
    """L of another method + weight * L_mask."""

    def __init__(self, settings: MICSection, self_training: SelfTrainingSection, base: Method) -> None:
        self.settings = settings
        self.self_training = self_training
        self.base = base
        self.classify = base.classify
        self.needs_teacher = base.needs_teacher or settings.mode != "separatesrc"
        self.needs_initial_encoder = base.needs_initial_encoder

    def terms(self) -> Mapping[str, Term]:
        return {**self.base.terms(), "masked": self.masked_term}

    def draws(self, key: Keyed, size: tuple[int, int]) -> dict[str, Tensor]:
        return {**self.base.draws(key, size), **masked_draws(key, size, self.settings, self.self_training)}

    def prepare(self, inputs: StepInputs) -> StepInputs:
        return with_masked_image(self.base.prepare(inputs), self.settings, self.self_training)

    def masked_term(self, student: Segmentor, inputs: StepInputs) -> Pass:
        """Compute L_mask, over all pixels, masked or not."""
        image, label, weight = masked_batch(inputs, self.settings)
        # The published code leaves HRDA's detail loss out of the weight; at the published weight of 1 that is the same.
        seen = self.classify(student, inputs, ForwardKind.MASKED, image, label, weight)
        return seen.weighted(self.settings.loss_weight)


def masked_draws(
    key: Keyed, size: tuple[int, int], settings: MICSection, self_training: SelfTrainingSection
) -> dict[str, Tensor]:
    """Draw what ``with_masked_image`` needs: the blocks of each image that stay visible, and the augmentation."""
    source, target = chosen_images(len(key.positions), settings.mode)
    positions = [(position, 0) for position in key.positions[:source]]
    positions += [(position, 1) for position in key.positions[:target]]
    visible = [
        visible_blocks(size, settings, torch_generator(key.seed, Stream.MIC_MASK, position, domain))
        for position, domain in positions
    ]
    drawn = {"visible": torch.stack(visible)}
    if settings.augment:
        generator = keyed_generator(key.seed, Stream.MIC_AUGMENT, key.block)
        drawn |= augmentation_tensors(self_training, generator, len(positions), scope="batch")
    return named("masked", drawn)


@torch.no_grad()
def with_masked_image(inputs: StepInputs, settings: MICSection, self_training: SelfTrainingSection) -> StepInputs:
    """Augment the images of ``settings.mode``, if that is asked for, and mask blocks of them: "masked/image"."""
    source, target = chosen_images(len(inputs.source_image), settings.mode)
    image = torch.cat([inputs.source_image[:source], inputs.target_image[:target]])
    drawn = inputs.drawn("masked")
    if settings.augment:
        generator = keyed_generator(inputs.seed, Stream.MIC_AUGMENT, inputs.block)
        shipped = Shipped(drawn, inputs.mean, inputs.std)
        image = strong_augment(image, self_training, generator, scope="batch", shipped=shipped)
    # Hidden is 0 after normalisation, the ImageNet mean colour.
    image = image * F.interpolate(drawn["visible"].unsqueeze(1), image.shape[-2:], mode="nearest")
    return inputs.with_made("masked", {"image": image})


@torch.no_grad()
def masked_batch(inputs: StepInputs, settings: MICSection) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masked images with what they are to be classified as.

    Returns:
        image float32 [B', 3, H, W], label int64 [B', H, W] and pixel weight float32 [B', H, W].
    """
    source, target = chosen_images(len(inputs.source_image), settings.mode)
    labels = [inputs.source_label[:source].long()]
    weights = [torch.ones_like(labels[0], dtype=torch.float32)]
    if target:
        pseudo = inputs.pseudo
        assert pseudo is not None
        weight = pseudo.weight
        if settings.pseudo_threshold is not None:
            weight = pseudo_weight(pseudo.confidence, pseudo.valid, settings.pseudo_threshold)
        labels.append(pseudo.label[:target])
        weights.append(weight[:target])
    return inputs.drawn("masked")["image"], torch.cat(labels), torch.cat(weights)


def chosen_images(batch: int, mode: str) -> tuple[int, int]:
    """Return how many images of a micro-batch are masked: (source, target), each counted from the first.

    ``separate`` takes half of each domain, so that as many images are masked as there are of one domain. The
    published code knows it for two images only, where it is one of each; so it is here for one.
    """
    if mode == "separatesrc":
        return batch, 0
    if mode == "separatetrg":
        return 0, batch
    half = max(1, batch // 2)
    return half, max(1, batch - half)


def visible_blocks(size: tuple[int, int], settings: MICSection, generator: torch.Generator) -> Tensor:
    """Draw float32 [rows, columns], 1 for a block of an image of this size that stays visible, 0 for a masked one.

    Masked blocks are about ``mask_block_pixels`` a side and drawn independently of one another, so the share varies.
    """
    block = settings.mask_block_pixels or max(1, size[0] // BLOCKS)
    grid = [max(1, round(side / block)) for side in size]
    return (torch.rand(grid, generator=generator) > settings.mask_ratio).float()


def build(config: RunConfig) -> Method:
    """Build the method as configured."""
    bases = {"source_only": source_only, "dacs": dacs, "daformer": daformer, "hrda": hrda}
    return MIC(config.mic, config.self_training, bases[config.mic.base_method].build(config))
