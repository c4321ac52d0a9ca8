"""Fingerprints of weights, and the check that every backward reaches every parameter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mfm_dist.distributed.audit import audit, fingerprint
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
    assert findings_of(1.0, 1.0, 2.0, 1.0) == ["weight differs: rank 2 against the other 3"]
    assert findings_of(1.0, 2.0) == ["weight differs: rank 0 against rank 1"]
    assert findings_of(1.0, 1.0, 1.0) == []


def findings_of(*copies: float) -> list[str]:
    """What an audit says of one parameter, of which every rank holds a copy of its own."""
    everyone = torch.stack([fingerprint(torch.tensor([[copy]])) for copy in copies])

    def gather(own: Tensor) -> Tensor:
        assert torch.equal(own, everyone[:1])
        return everyone[:, None]

    engine = SimpleNamespace(
        rank=0, world_size=len(copies), replicates_parameters=True, replicates_gradients=False,
        params_out_of_sync=lambda: [], gather_objects=lambda own: [own], gather=gather,
    )  # fmt: skip
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, copies[0])
    return audit(net, engine)  # type: ignore[arg-type]


def test_a_parameter_without_a_gradient_is_named_and_one_with_a_zero_gradient_is_not() -> None:
    net = nn.ModuleDict({"used": nn.Linear(2, 2), "forgotten": nn.Linear(2, 2)})
    check = GradientCheck(net)
    image = torch.ones(1, 2)
    (net["used"](image).sum() + 0.0 * net["forgotten"](image).sum()).backward()
    check.after_micro_batch()
    net["used"](image).sum().backward()  # .grad of the other is still there from before: stale
    with pytest.raises(RuntimeError, match=r"2 trainable parameters .*forgotten\.weight, forgotten\.bias"):
        check.after_micro_batch()
