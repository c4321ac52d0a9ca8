"""BatchNorm's running statistics: kept before a step, put back after one that was not applied."""

from __future__ import annotations

import torch
from torch import nn

from mfm_dist.distributed.running_statistics import KeptStatistics, running_statistics


def test_they_are_put_back_unless_the_step_was_applied() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4, affine=False)))
    kept = KeptStatistics(module)
    image = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for applied, scale in ((True, 1.0), (False, float("inf")), (False, 2.0), (True, 3.0)):
        before = [buffer.clone() for buffer in running_statistics(module)]
        kept.keep()
        module(image * scale)
        moved = [buffer.clone() for buffer in running_statistics(module)]
        assert len(moved) == 4
        assert not any(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
        kept.put_back(unless=torch.tensor(applied))
        expected = moved if applied else before
        assert all(torch.equal(a, b) for a, b in zip(running_statistics(module), expected, strict=True))


def test_a_module_without_any_is_left_alone() -> None:
    kept = KeptStatistics(nn.Linear(2, 2))
    kept.keep()
    kept.put_back(unless=torch.tensor(False))
