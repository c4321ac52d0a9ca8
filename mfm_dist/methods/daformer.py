"""DAFormer (Hoyer et al., CVPR 2022, arXiv 2111.14887): DACS that keeps the encoder near its ImageNet features.

The method's third part, rare class sampling, is a matter of the data: ``data.rare_class_sampling``.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from mfm_dist.classes import IGNORE_INDEX, ClassSet
from mfm_dist.config.schema import DAFormerSection, RunConfig, SelfTrainingSection
from mfm_dist.methods.base import Classify, Loss, Maps, Method, Pass, StepInputs, classify
from mfm_dist.methods.dacs import DACS
from mfm_dist.models.segmentor import Segmentor


class DAFormer(DACS):
    """L = L_sup + L_mix + weight * L_fd; the feature distance shares the forward of L_sup."""

    needs_initial_encoder = True

    def __init__(
        self, settings: DAFormerSection, self_training: SelfTrainingSection, classify: Classify = classify
    ) -> None:
        super().__init__(self_training, classify)
        self.distance = settings

    def source_term(self, student: Segmentor, inputs: StepInputs) -> Pass:
        """Compute L_sup, and L_fd on the same features."""
        supervised = super().source_term(student, inputs)

        def losses(maps: Maps) -> dict[str, Loss]:
            assert inputs.initial_feature is not None
            whole = next(maps)
            found = supervised.losses(chain([whole], maps))
            last = whole[-1]
            size = (last.shape[-2], last.shape[-1])
            mask = thing_mask(inputs.source_label, inputs.classes, size, self.distance.feature_distance_share)
            distance = feature_distance(last, inputs.initial_feature, mask)
            return {**found, "feature_distance": Loss(distance, self.distance.feature_distance_weight)}

        return supervised._replace(losses=losses)


@torch.no_grad()
def thing_mask(label: Tensor, classes: ClassSet, size: tuple[int, int], share: float) -> Tensor:
    """Mark the positions of a feature map on an object: one of ``classes.things`` has this share of their pixels.

    Args:
        label: integer [B, H, W]; ``IGNORE_INDEX`` counts as one class more, which is no thing.
        size: rows and columns (h, w) of the map; a position covers H // h by W // w pixels.
        share: of a position's pixels that its most frequent class must have at least, 0.75 as published.

    Returns:
        bool [B, h, w].
    """
    (rows, columns), (height, width) = size, label.shape[-2:]
    high, wide = height // rows, width // columns
    cells = label[:, : rows * high, : columns * wide].unflatten(2, (columns, wide)).unflatten(1, (rows, high))
    # One class after another: a one-hot of the whole label would take 20 times its memory.
    values = (*range(len(classes)), IGNORE_INDEX)
    counts = torch.stack([(cells == value).sum(dim=(2, 4)) for value in values], dim=1)  # [B, classes + 1, h, w]
    count, winner = counts.max(dim=1)
    is_thing = torch.stack([winner == index for index in classes.indices(classes.things)]).any(dim=0)
    return is_thing & (count >= share * high * wide)


def feature_distance(feature: Tensor, initial: Tensor, mask: Tensor) -> Tensor:
    """Return two maps' [B, C, h, w] mean Euclidean distance where ``mask`` [B, h, w] is True; 0 if it is nowhere.

    The published code takes the mean of nothing there, which logs NaN and has no gradient either.
    """
    distance = torch.linalg.vector_norm(feature.float() - initial.float(), dim=1)
    return (distance * mask).sum() / mask.sum().clamp_min(1)


def build(config: RunConfig) -> Method:
    """Build the method as configured."""
    return DAFormer(config.daformer, config.self_training)
