"""Whole tensors put together from pieces; across real processes, see ``tests/distributed``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mfm_dist.distributed import deepspeed_engine
from mfm_dist.distributed.deepspeed_engine import DeepSpeedEngine, LeafCheck, Piece
from mfm_dist.errors import ConfigError


def test_buckets_give_every_bit_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks' pieces of tensors below, at and above the size of a bucket, and what sums would not keep."""
    monkeypatch.setattr(deepspeed_engine, "BUCKET", 10)
    shapes = [torch.Size(shape) for shape in [(), (3, 2), (3,), (10,), (5, 5), (1,)]]
    wholes = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    wholes[1][2, 1] = -0.0
    wholes[4][0, 0] = torch.nan
    wholes[4][4, 4] = torch.inf

    def of_rank(rank: int) -> list[tuple[torch.Size, list[Piece]]]:
        """The second rank has nothing of the one-element tensors."""
        places = [(slice(0, (n + 1) // 2), slice((n + 1) // 2, n))[rank] for n in map(Tensor.numel, wholes)]
        pieces = zip(wholes, places, strict=True)
        held = [[(place, whole.flatten()[place])] if place.stop > place.start else [] for whole, place in pieces]
        return list(zip(shapes, held, strict=True))

    sent: list[Tensor] = []
    other = DeepSpeedEngine.__new__(DeepSpeedEngine)
    other.device = torch.device("cpu")
    other.sum = lambda values: sent.append(values) or values  # type: ignore[method-assign, func-returns-value]
    list(other._gather_full(of_rank(1)))
    assert [exchanged.numel() for exchanged in sent] == [10, 10, 25, 1]

    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.device = torch.device("cpu")
    engine.sum = lambda values: values + sent.pop(0)  # type: ignore[method-assign]
    found = list(engine._gather_full(of_rank(0)))
    assert [whole.shape for whole in found] == shapes
    for whole, expected in zip(found, wholes, strict=True):
        assert torch.equal(whole.view(-1).view(torch.int32), expected.view(-1).view(torch.int32))


def test_a_leaf_runs_once_between_backwards_and_behind_what_trains() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1]._z3_leaf = True  # as DeepSpeed marks them
    check, x = LeafCheck(network), torch.ones(1, 2)
    for _ in range(2):
        network(x).sum().backward()
        with torch.no_grad():
            network(x)  # as of a teacher, or in an evaluation
        check.after_backward()
    network(x)
    with pytest.raises(ConfigError, match=r"leaf_module .*: 1 \(Linear\) runs twice before a backward"):
        network(x)
    check.after_backward()
    network[0].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"1 \(Linear\) is the first that trains"):
        network(x)
