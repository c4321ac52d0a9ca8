"""The network that is trained, evaluated and exported: an encoder and a decoder, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch.nn.functional as F
from torch import Tensor, nn

from mfm_dist.models.backbone import Backbone
from mfm_dist.models.dropout import dropouts_of, masked
from mfm_dist.models.layers import resize


class Segmentor(nn.Module):
    """Semantic segmentation in two halves, so that a method can work on the features in between.

    Attributes:
        window: height and width in pixels of the windows in which a longer image is predicted; None: in one piece.
        head_masks: of the heads' dropout for each image of a pass, [B, sum of widths]; None: forwards draw their own.
    """

    window: tuple[int, int] | None = None
    head_masks: Sequence[Tensor] | None = None

    def __init__(self, backbone: Backbone, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    @property
    def decoder_inputs(self) -> tuple[int, ...]:
        """Indices of the encoder maps that the decoder reads."""
        return tuple(self.decoder.inputs)  # type: ignore[arg-type]

    @property
    def heads(self) -> list[nn.Module]:
        """All that is trained beside the encoder."""
        return [self.decoder]

    def context(self, image: Tensor) -> Tensor:
        """Return the image [B, 3, H, W] as the encoder sees it whole: itself."""
        return image

    def encode(self, image: Tensor) -> list[Tensor]:
        """Turn a normalised image [B, 3, H, W] into encoder maps, fine to coarse, i-th [B, channels[i], h_i, w_i]."""
        return self.backbone(image)

    def decode(self, features: list[Tensor], number: int = 0) -> Tensor:
        """Turn all encoder maps into logits [B, num_classes, h, w] at the decoder's own resolution.

        Args:
            number: of the image in its pass, whose dropout masks are taken.
        """
        with self._head_masks_of(number):
            return self.decoder(features)

    def _head_masks_of(self, number: int) -> AbstractContextManager[None]:
        if self.head_masks is None:
            return nullcontext()
        return masked(dropouts_of(self.heads), self.head_masks[number])

    def forward(self, image: Tensor) -> Tensor:
        """Turn a normalised image [B, 3, H, W] into fp32 logits [B, num_classes, H, W]."""
        height, width = image.shape[-2:]
        padded = pad_to_multiple(image, self.backbone.multiple)
        logits = resize(self.decode(self.encode(padded)).float(), padded.shape[-2:])
        return logits if self.backbone.multiple == 1 else logits[..., :height, :width]


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Extend a normalised image [B, 3, H, W] at the bottom and the right to multiples of a side; 0 is the mean colour.

    Where any size will do, the tensor itself comes back.
    """
    if multiple == 1:
        return image
    bottom, right = (-side % multiple for side in image.shape[-2:])
    return F.pad(image, (0, right, 0, bottom))
