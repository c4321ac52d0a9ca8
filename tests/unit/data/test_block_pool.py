"""Memory that a worker fills and the trainer reads: who may use a slot again, and when."""

from __future__ import annotations

import os

import pytest
import torch

from mfm_dist.data.block_pool import BlockPool
from mfm_dist.errors import ConfigError


def test_a_slot_is_free_again_when_the_last_view_of_it_is_gone() -> None:
    pool = BlockPool(workers=0, slots=2, size=64)
    first, second = pool.take(), pool.take()
    assert (first, second, pool.take()) == (0, 1, None)
    pool.fill(1).fill_(7)
    lent = pool.lend(1)
    view = lent.view(8, 8)[3]
    del lent
    assert pool.take() is None
    assert torch.equal(view, torch.full((8,), 7, dtype=torch.uint8))
    del view
    assert pool.take() == 1


def test_both_sides_of_a_fork_have_the_same_memory() -> None:
    pool = BlockPool(workers=2, slots=1, size=16)
    child = os.fork()
    if child == 0:
        pool.fill(1).fill_(9)
        os._exit(0)
    os.waitpid(child, 0)
    assert pool.lend(1).tolist() == [9] * 16


def test_the_end_of_a_view_in_a_forked_process_means_nothing() -> None:
    pool = BlockPool(workers=0, slots=1, size=16)
    assert pool.take() == 0
    lent = pool.lend(0)
    child = os.fork()
    if child == 0:
        del lent
        os._exit(0)
    os.waitpid(child, 0)
    assert pool.take() is None
    assert lent.shape == (16,)


def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"take 1,024\.0 GiB in each process.*lower train\.global_batch"):
        BlockPool(workers=2, slots=512, size=2**30)
