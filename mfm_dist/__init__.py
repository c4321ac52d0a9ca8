"""Distributed training of Masked Feature Modeling (MFM) for domain-adaptive semantic segmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from mfm_dist.inference.segmentor import TrainedSegmentor

__version__ = "0.1.0"


def load(path: str | PathLike[str], device: str | torch.device = "cpu") -> TrainedSegmentor:
    """Load the trained segmentor of an export folder, or of a run folder (its newest checkpoint), in eval mode.

    It is an ``nn.Module`` from normalised images, float [B, 3, H, W], to logits [B, classes, H, W], without the
    Rebuilder. ``model.predict(image)`` takes uint8 RGB [3, H, W] and gives train ids [H, W]; ``model.normalise`` is
    the step before the forward; ``model.card`` says which classes, where from, how good.

    Raises:
        mfm_dist.errors.ConfigError: the folder is neither, or is damaged.
    """
    from pathlib import Path

    if (Path(path) / "config.yaml").is_file():
        from mfm_dist.inference.open_run import open_run  # reading a run needs the libraries that trained it

        return open_run(Path(path)).model.to(device)
    from mfm_dist.inference.segmentor import load_export

    return load_export(Path(path)).to(device)
