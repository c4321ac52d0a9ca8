"""When leaf modules of ZeRO-3 may run; across real processes, see ``tests/distributed``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mfm_dist.distributed.deepspeed_engine import LeafCheck
from mfm_dist.errors import ConfigError


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
