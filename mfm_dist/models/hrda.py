"""HRDA's segmentor (Hoyer et al., ECCV 2022, arXiv 2204.13132): one encoder and decoder at two resolutions.

The context is the whole image at half its resolution, the detail a window of it, a quarter of its area, at full
resolution. A second decoder reads the context and says for each place and class which of both to believe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mfm_dist.errors import ConfigError
from mfm_dist.models.backbone import Backbone
from mfm_dist.models.decoders import build_decoder
from mfm_dist.models.layers import resize
from mfm_dist.models.pyramid import PyramidDecoder, SimplePyramid
from mfm_dist.models.segmentor import Segmentor, pad_to_multiple
from mfm_dist.models.size_limit import limited_size
from mfm_dist.models.windows import DrawnWindow, Window, average_windows, sliding_boxes

SCALE = 2
"""The context has one pixel for so many of the image, in each direction (HRDA)."""


class TwoResolutions(NamedTuple):
    """What a pass with one detail window gives."""

    fused: Tensor
    """Logits [B, C, H / stride, W / stride]; outside the window the context speaks alone."""
    detail: Tensor
    """Logits of the window, [B, C, height / stride, width / stride]."""


class HRDASegmentor(Segmentor):
    """A plain segmentor of which two resolutions of an image are asked, and the attention that fuses the answers.

    ``encode`` and ``decode`` are the plain segmentor's, at whatever resolution they are given. Which detail window is
    looked at in training is an argument; nothing about it is kept here.

    Args:
        segmentor: the encoder and the decoder of both resolutions.
        attention: a decoder with the same ``stride`` and as many classes.
        window: height and width of the training crop, in pixels; longer images are predicted in windows of it.

    Attributes:
        detail_size: height and width of a detail window, in pixels.

    Raises:
        ConfigError: attention or window do not fit the decoder.
    """

    def __init__(self, segmentor: Segmentor, attention: nn.Module, window: tuple[int, int]) -> None:
        super().__init__(segmentor.backbone, segmentor.decoder)
        self.attention = attention
        self.window = window
        self.detail_size = (window[0] // SCALE, window[1] // SCALE)
        self.stride = int(self.decoder.stride)  # type: ignore[arg-type]
        problems = []
        if self.stride != self.decoder.stride:
            problems.append(
                f"HRDA needs a decoder whose stride is a whole number of pixels, this one has {self.decoder.stride}: a "
                "plain vision transformer with patches of 14 takes model.backbone_options={patch_size: 16, ...}"
            )
        if attention.stride != self.stride:
            problems.append(
                f"hrda.attention has stride {attention.stride}, model.decoder {self.stride}: they must be equal; "
                "take segformer beside daformer and segformer, deeplabv2 (with attention_options={}) beside deeplabv2"
            )
        if any(side % (2 * SCALE * self.stride) for side in window):
            problems.append(
                f"data.crop={window[0]}x{window[1]}: HRDA halves it and slides by a quarter, on a grid of "
                f"{self.stride} pixels, so both sides must be multiples of {2 * SCALE * self.stride}"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def heads(self) -> list[nn.Module]:
        return [self.decoder, self.attention]

    @property
    def box_step(self) -> int:
        """Pixels between the places that a detail window may have, so that it lies on the context's grid, too.

        The published step is 8, which for a decoder of stride 8 puts the window half a cell beside the attention.
        """
        return SCALE * self.stride

    def context(self, image: Tensor) -> Tensor:
        """Shrink [B, 3, H, W] to [B, 3, H / 2, W / 2]."""
        return resize(image, [side // SCALE for side in image.shape[-2:]])

    def decode_crops(self, maps: Iterator[list[Tensor]], box: Window | DrawnWindow) -> TwoResolutions:
        """Classify at both resolutions, from encoder maps of an image's context and then of a detail window."""
        context = next(maps)
        coarse, attention = self.decode(context), self.attend(context)
        detail = self.decode(next(maps), number=1)
        return TwoResolutions(self.fuse_window(coarse, attention, detail, box), detail)

    def fuse_window(self, coarse: Tensor, attention: Tensor, detail: Tensor, box: Window | DrawnWindow) -> Tensor:
        """Fuse logits and attention of the context [B, C, h, w] with the logits of one detail window: [B, C, 2h, 2w].

        Outside the window the context speaks alone.
        """
        cell = box.scaled_down(SCALE * self.stride)
        rows, columns = coarse.shape[-2:]
        inside = cell.paste(cell.crop(attention), (rows, columns))  # 0 outside the window
        pasted = box.scaled_down(self.stride).paste(detail, (SCALE * rows, SCALE * columns))
        return fuse(coarse, inside, pasted)

    def attend(self, features: list[Tensor]) -> Tensor:
        """Say from the context's encoder maps how much of the detail to believe, 0..1, [B, C, h, w]."""
        with self._head_masks_of(0):
            return torch.sigmoid(self.attention(features))

    def forward(self, image: Tensor) -> Tensor:
        """Turn normalised images [B, 3, H, W] into logits [B, C, H, W], with windows of detail that slide over all."""
        height, width = image.shape[-2:]
        # To whole cells and patches of the context.
        padded = pad_to_multiple(image, SCALE * math.lcm(self.stride, self.backbone.multiple))
        features = self.encode(self.context(padded))
        fused = fuse(self.decode(features), self.attend(features), self._detail_everywhere(padded))
        return resize(fused, padded.shape[-2:])[..., :height, :width]

    def _detail_everywhere(self, image: Tensor) -> Tensor:
        """Turn [B, 3, H, W] into logits [B, C, H / stride, W / stride], all windows in one forward."""
        size = (image.shape[-2], image.shape[-1])
        step = (self.detail_size[0] // 2, self.detail_size[1] // 2)
        boxes = sliding_boxes(size, self.detail_size, step)
        logits = self.decode(self.encode(torch.cat([box.crop(image) for box in boxes])))
        cells = [box.scaled_down(self.stride) for box in boxes]
        return average_windows(list(logits.chunk(len(boxes))), cells, (size[0] // self.stride, size[1] // self.stride))


def fuse(coarse: Tensor, attention: Tensor, detail: Tensor) -> Tensor:
    """Return (1 - a) * coarse + a * detail at the detail's resolution; coarse and a are enlarged bilinearly (HRDA).

    Args:
        coarse: logits of the context [B, C, h, w].
        attention: a, [B, C, h, w] in 0..1.
        detail: logits [B, C, 2 h, 2 w].
    """
    size = detail.shape[-2:]
    return resize((1 - attention) * coarse, size) + resize(attention, size) * detail


def build_segmentor(
    *,
    backbone: str,
    decoder: str,
    num_classes: int,
    pretrained: bool = False,
    weights: Path | None = None,
    backbone_options: Mapping[str, object] | None = None,
    decoder_options: Mapping[str, object] | None = None,
    attention: str | None = None,
    attention_options: Mapping[str, object] | None = None,
    window: tuple[int, int] | None = None,
) -> Segmentor:
    """Build a segmentor from names and options (see ``Backbone`` and ``build_decoder`` for both).

    Args:
        attention: the decoder that weighs detail against context; with it the segmentor is HRDA's, else a plain one.
        window: of ``HRDASegmentor``, which needs one.

    Raises:
        ConfigError: an unknown name, a wrong option, weights that cannot be used, or parts that do not fit.
    """
    with limited_size("model.backbone_options, model.decoder_options and hrda.attention_options"):
        encoder = Backbone(backbone, pretrained=pretrained, weights=weights, options=backbone_options)
        segmentor = Segmentor(encoder, _decoder_on(encoder, decoder, num_classes, decoder_options))
        if attention is None:
            return segmentor
        assert window is not None
        try:
            weighing = _decoder_on(encoder, attention, num_classes, attention_options)
        except ConfigError as error:
            raise ConfigError([f"hrda.attention={attention}: {problem}" for problem in error.problems]) from error
        return HRDASegmentor(segmentor, weighing, window)


def _decoder_on(encoder: Backbone, name: str, num_classes: int, options: Mapping[str, object] | None) -> nn.Module:
    """Build a decoder of the encoder's maps, or of a pyramid of its last one."""
    if not encoder.pyramid:
        return build_decoder(name, encoder.channels, encoder.strides, num_classes, options)
    pyramid = SimplePyramid(encoder.channels[-1], encoder.strides[-1])
    decoder = build_decoder(name, pyramid.channels, pyramid.strides, num_classes, options)
    reads = tuple(decoder.inputs)  # type: ignore[arg-type]
    if len(reads) < len(pyramid.channels):
        # Maps that nothing reads leave parameters without gradients, which goes wrong under DDP and ZeRO-3.
        raise ConfigError(
            f"model.backbone_options: pyramid makes {len(pyramid.channels)} maps, of which decoder {name!r} reads "
            f"{len(reads)}: choose a decoder that reads all, such as daformer or segformer, or leave pyramid out"
        )
    return PyramidDecoder(pyramid, decoder)
