"""DACS (Tranheden et al. 2021) as the DAFormer / MIC code line trains it: self-training on class-mixed images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mfm_dist.config.schema import RunConfig, SelfTrainingSection
from mfm_dist.methods.augment import Shipped, augmentation_tensors, strong_augment
from mfm_dist.methods.base import Classify, ForwardKind, Method, Pass, StepInputs, Term, classify, named
from mfm_dist.methods.self_training import NUM_LABEL_VALUES, draw_class_masks, mix
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.rng import Keyed, Stream, keyed_generator


class DACS(Method):
    """L = L_sup + L_mix: half the classes of a source image pasted onto a pseudo-labelled target image."""

    needs_teacher = True

    def __init__(self, settings: SelfTrainingSection, classify: Classify = classify) -> None:
        self.settings = settings
        self.classify = classify

    def terms(self) -> Mapping[str, Term]:
        return {"source": self.source_term, "mixed": self.mixed_term}

    def draws(self, key: Keyed, size: tuple[int, int]) -> dict[str, Tensor]:  # noqa: ARG002 - of any size
        return mix_draws(key, self.settings)

    def prepare(self, inputs: StepInputs) -> StepInputs:
        return with_mixed_image(inputs, self.settings)

    def mixed_term(self, student: Segmentor, inputs: StepInputs) -> Pass:
        """Compute L_mix: paste source i onto target i; pasted pixels weigh 1, the others the pseudo-weight."""
        image, label, weight = mixed_batch(inputs)
        return self.classify(student, inputs, ForwardKind.MIXED, image, label, weight)


def mix_draws(key: Keyed, settings: SelfTrainingSection) -> dict[str, Tensor]:
    """Draw what ``with_mixed_image`` needs: a key for each image and label value, and the strong augmentation."""
    count = len(key.positions)
    ranks = keyed_generator(key.seed, Stream.CLASS_MIX, key.block).random((count, NUM_LABEL_VALUES))
    generator = keyed_generator(key.seed, Stream.STRONG_AUGMENT, key.block)
    return named("mixed", {"ranks": torch.from_numpy(ranks), **augmentation_tensors(settings, generator, count)})


@torch.no_grad()
def with_mixed_image(inputs: StepInputs, settings: SelfTrainingSection) -> StepInputs:
    """Mix images by classes and augment the result strongly (ClassMix): "mixed/image" and "mixed/class_mask"."""
    drawn = inputs.drawn("mixed")
    class_mask = draw_class_masks(inputs.source_label, drawn["ranks"], settings.class_draw)
    image = mix(class_mask, inputs.source_image, inputs.target_image)
    generator = keyed_generator(inputs.seed, Stream.STRONG_AUGMENT, inputs.block)
    image = strong_augment(image, settings, generator, shipped=Shipped(drawn, inputs.mean, inputs.std))
    return inputs.with_made("mixed", {"image": image, "class_mask": class_mask})


@torch.no_grad()
def mixed_batch(inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mixed image with what it is to be classified as.

    Returns:
        image float32 [B, 3, H, W], label int64 [B, H, W] and pixel weight float32 [B, H, W] of the mixed batch.
    """
    assert inputs.pseudo is not None
    made = inputs.drawn("mixed")
    label = mix(made["class_mask"], inputs.source_label.long(), inputs.pseudo.label)
    weight = mix(made["class_mask"], torch.ones_like(inputs.pseudo.weight), inputs.pseudo.weight)
    return made["image"], label, weight


def build(config: RunConfig) -> Method:
    """Build the method as configured."""
    return DACS(config.self_training)
