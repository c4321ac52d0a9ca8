"""A compiled network gives what the plain one gives, Dropout's draws included."""

from __future__ import annotations

import shutil

import pytest
import torch

from mfm_dist.models.compiling import compile_segmentor
from mfm_dist.models.segmentor import build_segmentor


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_it_is_the_same_function() -> None:
    segmentor = build_segmentor(
        backbone="test_resnet",
        decoder="daformer",
        num_classes=5,
        backbone_options={"out_indices": [4]},
        decoder_options={"width": 8},
    )
    features = [torch.randn(2, segmentor.backbone.channels[0], 4, 4)]
    names = set(segmentor.state_dict())
    torch.manual_seed(1)
    plain = segmentor.decoder(features)
    compile_segmentor(segmentor)
    torch.manual_seed(1)
    translated = segmentor.decoder(features)
    torch.testing.assert_close(translated, plain)
    assert set(segmentor.state_dict()) == names
