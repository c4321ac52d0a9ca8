"""Clipping of all parts and of single ones, and steps that are refused, against the obvious way."""

from __future__ import annotations

import math

import pytest
import torch

from mfm_dist.distributed.clipping import Ceilings, clip_factors, is_good, sum_of_squares

NONE = torch.full((3,), math.inf)


def test_the_sum_of_squares_of_many_tensors() -> None:
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2).bfloat16()]
    expected = sum(float(t.double().square().sum()) for t in tensors)
    assert float(sum_of_squares(tensors, torch.device("cpu"))) == pytest.approx(expected, rel=1e-6)
    assert float(sum_of_squares([], torch.device("cpu"))) == 0.0


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_a_global_limit_is_torchs_clipping(limit: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(7)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.randn(7)
    norms = torch.stack([p.grad.norm() for p in parameters])  # type: ignore[union-attr]
    ours = [p.grad * f for p, f in zip(parameters, clip_factors(norms, NONE, limit), strict=True)]  # type: ignore
    torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    for parameter, clipped in zip(parameters, ours, strict=True):
        torch.testing.assert_close(clipped, parameter.grad)


def test_a_part_is_clipped_by_itself_and_then_with_all() -> None:
    norms = torch.tensor([3.0, 40.0])
    each = clip_factors(norms, torch.tensor([math.inf, 4.0]), 0.0)
    torch.testing.assert_close(each * norms, torch.tensor([3.0, 4.0]))
    both = clip_factors(norms, torch.tensor([math.inf, 4.0]), 1.0)
    torch.testing.assert_close(both * norms, torch.tensor([0.6, 0.8]))  # 3 and 4 over their norm of 5


@pytest.mark.parametrize(
    ("norms", "loss", "applied"),
    [
        ([1.0, 2.0], 0.5, True),
        ([1.0, math.inf], 0.5, False),
        ([math.nan, 2.0], 0.5, False),
        ([1.0, 2.0], math.nan, False),
        ([1.0, 2.0], 1.5, False),
        ([3.0, 2.0], 0.5, False),
    ],
)
def test_what_is_not_finite_or_above_its_ceiling_is_refused(norms: list[float], loss: float, applied: bool) -> None:
    assert bool(is_good(torch.tensor(norms), torch.tensor(loss), Ceilings(loss=1.0, grad_norm=3.0))) == applied
