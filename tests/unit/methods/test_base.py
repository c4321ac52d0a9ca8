"""How a plain method classifies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mfm_dist.build import build_train_module
from mfm_dist.methods.base import ForwardKind, classify
from mfm_dist.models.preprocessing import normalise
from tests.helpers.classes import CLASSES
from tests.helpers.modules import block, config_with


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_enlarged_once_and_in_fp32(dtype: torch.dtype) -> None:
    """For the loss as for the teacher: in bfloat16 an enlarged logit would be rounded to 8 bits once more."""
    module = build_train_module(config_with("mfm.enabled=false"), CLASSES)
    inputs = module.step_inputs(block())
    student = module.student.to(dtype).eval()  # no batch statistics: forwards can be repeated
    image, label = normalise(block().source_image).to(dtype), block().source_label
    weight = torch.rand(label.shape, generator=torch.Generator().manual_seed(0))
    small = student.decode(student.encode(image))
    assert small.shape[-1] < image.shape[-1]
    logits = F.interpolate(small.float(), image.shape[-2:], mode="bilinear")
    expected = (F.cross_entropy(logits, label.long(), reduction="none") * weight).mean()
    passed = classify(student, inputs, ForwardKind.SOURCE, image, label, weight)
    [seen] = passed.images
    features = student.encode(seen)
    assert torch.equal(passed.losses(iter([features]))["source"].value, expected)
    assert features[-1].dtype == dtype
    assert torch.equal(student(image), logits)
