"""The training step at its smallest: a network, a batch, and what a method is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfm_dist.batch import UDABatch
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.methods.base import StepInputs
from mfm_dist.models.preprocessing import channel_constants
from tests.helpers.classes import CLASSES

SMALL = [
    "model.backbone=test_resnet", "model.backbone_options={out_indices: [1, 2, 3, 4]}",
    "model.decoder=daformer", "model.decoder_options={width: 16}",
    "mfm.enabled=true", "rebuilder.width=32", "rebuilder.heads=2", "rebuilder.depth=1", "rebuilder.grid=4",
]  # fmt: skip


def config_with(*overrides: str) -> RunConfig:
    """Read ``SMALL`` and overrides as a configuration."""
    return load_config(None, [*SMALL, *overrides])


def block(number: int = 3, size: int = 64) -> UDABatch:
    """Draw a micro-batch of two images a domain, everything in it by its number."""
    generator = torch.Generator().manual_seed(number)

    def image() -> Tensor:
        return torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)

    return UDABatch(
        source_image=image(),
        source_label=torch.randint(0, 19, (2, size, size), generator=generator, dtype=torch.uint8),
        target_image=image(),
        target_valid=torch.ones(2, size, size, dtype=torch.bool),
        block=number,
    )


def inputs_with(**fields: Any) -> StepInputs:
    """Put together what terms look at, with nothing drawn unless it is given."""
    mean, std = channel_constants()
    filled: dict[str, Any] = {"classes": CLASSES, "draws": {}, "dropout": torch.ones(0), "mean": mean, "std": std}
    filled |= {"target_valid": torch.ones(0, dtype=torch.bool), "mfm_weight": torch.ones(())}
    return StepInputs(**(filled | fields))
