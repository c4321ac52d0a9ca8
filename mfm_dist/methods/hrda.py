"""HRDA (Hoyer et al., ECCV 2022, arXiv 2204.13132): DAFormer on large crops, seen at two resolutions.

The network is ``models/hrda.py``. What changes in the method is how an image is classified, in every term; the teacher
classifies with sliding windows, as at inference.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor

from mfm_dist.config.schema import RunConfig
from mfm_dist.methods.base import ForwardKind, Loss, Maps, Method, Pass, StepInputs, named
from mfm_dist.methods.daformer import DAFormer
from mfm_dist.methods.losses import cross_entropy
from mfm_dist.models.hrda import HRDASegmentor
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.models.windows import DrawnWindow, Window
from mfm_dist.rng import Keyed, Stream, keyed_generator


def classify_at_two_resolutions(
    student: Segmentor,
    inputs: StepInputs,
    kind: ForwardKind,
    image: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    /,
    *,
    detail_weight: float,
) -> Pass:
    """Sum (1 - w) * cross-entropy of the fused logits and w * that of the detail window's, one window for the batch."""
    assert isinstance(student, HRDASegmentor)
    box = drawn_box(inputs, kind)

    def losses(maps: Maps) -> dict[str, Loss]:
        seen = student.decode_crops(maps, box)
        detail = cross_entropy(seen.detail, box.crop(label), None if weight is None else box.crop(weight))
        return {
            kind.label: Loss(cross_entropy(seen.fused, label, weight), 1.0 - detail_weight),
            f"{kind.label}_detail": Loss(detail, detail_weight),
        }

    return Pass([student.context(image), box.crop(image)], losses)


def box_draws(student: HRDASegmentor, key: Keyed, size: tuple[int, int]) -> dict[str, Tensor]:
    """Draw, on the CPU, the detail window of every forward of a micro-batch in crops of this size."""
    draws: dict[str, Tensor] = {}
    for kind in ForwardKind:
        generator = keyed_generator(key.seed, Stream.DETAIL_BOX, key.block, kind)
        box = detail_box(size, student.detail_size, student.box_step, generator)
        draws |= named(f"box/{kind.label}", box.indices())
    return draws


def drawn_box(inputs: StepInputs, kind: ForwardKind) -> DrawnWindow:
    """Return the detail window of one forward of a micro-batch."""
    return DrawnWindow(**inputs.drawn(f"box/{kind.label}"))


def detail_box(size: tuple[int, int], window: tuple[int, int], step: int, generator: np.random.Generator) -> Window:
    """Draw a window at a multiple of ``step`` pixels. As in HRDA's code, never at the last place of all."""
    top, left = (
        step * int(generator.integers(max(1, (side - part + 1) // step)))
        for side, part in zip(size, window, strict=True)
    )
    return Window(top, left, *window)


def build(config: RunConfig) -> Method:
    """Build the method as configured."""
    classify = partial(classify_at_two_resolutions, detail_weight=config.hrda.detail_loss_weight)
    return DAFormer(config.daformer, config.self_training, classify)
