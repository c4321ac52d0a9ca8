"""Label maps as colours, and overlays of image, label and prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mfm_dist.classes import PALETTE

OPACITY = 0.65
"""Share of the class colour in an overlay."""
GAP = 4
"""White pixels between panels."""


def colourise(label: Tensor) -> npt.NDArray[np.uint8]:
    """Train ids [H, W] to uint8 RGB [H, W, 3] in the Cityscapes palette; ignored pixels are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(PALETTE)] = PALETTE
    return table[label.numpy().astype(np.uint8)]


def overlay(image: npt.NDArray[np.uint8], label: Tensor) -> npt.NDArray[np.uint8]:
    """Class colours laid over an RGB image [H, W, 3]."""
    blended = (1 - OPACITY) * image + OPACITY * colourise(label)
    return blended.round().astype(np.uint8)


def save_ids(path: Path, ids: Tensor) -> None:
    """Train ids [H, W] as a PNG whose pixel values are the ids and whose palette shows them in class colours."""
    picture = Image.fromarray(ids.numpy().astype(np.uint8))
    picture.putpalette(colourise(torch.arange(256)).flatten().tolist())
    save_picture(path, picture)


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, whole or not at all; a link of that name is replaced, not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        picture.save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_overlay(path: Path, image: Tensor, label: Tensor, prediction: Tensor) -> None:
    """One PNG with three panels side by side: the image, its label, the prediction, the latter two laid over it.

    Args:
        image: uint8 [3, H, W]; label and prediction: integer [H, W].
    """
    picture = image.permute(1, 2, 0).numpy()
    gap = np.full((picture.shape[0], GAP, 3), 255, dtype=np.uint8)
    panels = np.concatenate([picture, gap, overlay(picture, label), gap, overlay(picture, prediction)], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(panels).save(path)
