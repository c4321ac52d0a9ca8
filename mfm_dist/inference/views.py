"""Predict an image in several views, enlarged, reduced and mirrored, and average: test-time augmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mfm_dist.data.geometry import scaled_size
from mfm_dist.inference.predict_labels import most_probable, seen_size

Box = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views that an image is predicted in; by default the image alone."""

    scales: tuple[float, ...] = (1.0,)
    """Sizes, as shares of that at which the image is seen otherwise."""
    flip: bool = False
    """Whether each is predicted mirrored, too."""

    def predict(self, image: Tensor, fit_into: Box | None, logits_of: Callable[[Tensor, Box | None], Tensor]) -> Tensor:
        """Return the most probable class of every pixel, by the mean probability over all views: int64 [H, W].

        Args:
            image: uint8 [3, H, W].
            fit_into: box of the single view (``predict_logits``), which the scales enlarge and reduce.
            logits_of: gives the logits [1, C, H, W] of an image fitted into a box, at the image's own size.
        """
        if self == SINGLE:
            return most_probable(logits_of(image, fit_into)[0])
        size, total = seen_size(image, fit_into), None
        for scale in self.scales:
            for mirrored in (False, True) if self.flip else (False,):
                view = logits_of(image.flip(-1) if mirrored else image, scaled_size(size, scale)).softmax(dim=1)
                view = view.flip(-1) if mirrored else view
                total = view if total is None else total.add_(view)  # one image of probabilities at a time
        assert total is not None, "there is a scale at least"
        return most_probable(total[0])

    def __str__(self) -> str:
        if self == SINGLE:
            return "single scale, no flip"
        scales = ", ".join(f"{scale:g}" for scale in self.scales)
        return f"mean probability over scales {scales}{' and their mirror images' if self.flip else ', no flip'}"


SINGLE = Views()
"""The image alone, as every evaluation while training."""
