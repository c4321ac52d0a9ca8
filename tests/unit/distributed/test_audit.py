"""Fingerprints of weights, and the check that every backward reaches every parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mfm_dist.distributed.audit import _dissenters, fingerprint
from mfm_dist.distributed.engine import GradientCheck


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_single_flipped_bit_changes_the_fingerprint(dtype: torch.dtype) -> None:
    weights = torch.randn(3, 5).to(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    reference = fingerprint(weights)
    for place in range(weights.numel()):
        for bit in range(8 * weights.element_size()):
            changed = weights.clone()
            flip = torch.tensor(1, dtype=torch.int64) << bit
            changed.view(integer).view(-1)[place] ^= flip.to(integer)
            assert not torch.equal(fingerprint(changed), reference), (place, bit)


def test_swapped_weights_change_the_fingerprint() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert not torch.equal(fingerprint(weights), fingerprint(weights.flip(0)))
    assert torch.equal(fingerprint(weights), fingerprint(weights.clone()))


def test_the_odd_rank_is_named() -> None:
    prints = torch.tensor([[1, 1], [1, 1], [2, 1], [1, 1]])
    assert _dissenters(prints) == "rank 2 against the other 3"
    assert _dissenters(prints[1:3]) == "rank 0 against rank 1"


def test_a_parameter_without_a_gradient_is_named_and_one_with_a_zero_gradient_is_not() -> None:
    net = nn.ModuleDict({"used": nn.Linear(2, 2), "forgotten": nn.Linear(2, 2)})
    check = GradientCheck(net)
    image = torch.ones(1, 2)
    (net["used"](image).sum() + 0.0 * net["forgotten"](image).sum()).backward()
    check.after_micro_batch()
    net["used"](image).sum().backward()  # .grad of the other is still there from before: stale
    with pytest.raises(RuntimeError, match=r"2 trainable parameters .*forgotten\.weight, forgotten\.bias"):
        check.after_micro_batch()
