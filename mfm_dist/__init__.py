"""Distributed training of Masked Feature Modeling (MFM) for domain-adaptive semantic segmentation.

For a training loop of one's own (docs/your_loop.md) there are ``Rebuilder``, ``draw_mask`` and
``masked_features_loss``; for what was trained, ``load``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from mfm_dist.inference.segmentor import TrainedSegmentor
    from mfm_dist.methods.mfm import draw_mask, masked_features_loss
    from mfm_dist.models.rebuilder import Rebuilder

__version__ = "0.1.0"
__all__ = ["Rebuilder", "draw_mask", "load", "masked_features_loss"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: ``import mfm_dist`` alone stays light."""
    if name == "Rebuilder":
        from mfm_dist.models.rebuilder import Rebuilder

        return Rebuilder
    if name in __all__:
        from mfm_dist.methods import mfm

        return getattr(mfm, name)
    raise AttributeError(f"module 'mfm_dist' has no attribute {name!r}")


def load(path: str | PathLike[str], device: str | torch.device = "cpu") -> TrainedSegmentor:
    """Load the trained segmentor of an export folder, or of a run folder (its newest checkpoint), in eval mode.

    It is an ``nn.Module`` from normalised images, float [B, 3, H, W], to logits [B, classes, H, W], without the
    Rebuilder. ``model.predict(image)`` takes uint8 RGB [3, H, W] and gives indices of classes [H, W];
    ``model.normalise`` is the step before the forward; ``model.card`` says which classes, where from, how good.

    Raises:
        mfm_dist.errors.ConfigError: the folder is neither, or is damaged.
    """
    from pathlib import Path

    if (Path(path) / "config.yaml").is_file():
        from mfm_dist.inference.open_run import open_run  # reading a run needs the libraries that trained it

        return open_run(Path(path)).model.to(device)
    from mfm_dist.inference.segmentor import load_export

    return load_export(Path(path)).to(device)
