"""Memory that is kept takes one checkpoint after another, whole."""

from __future__ import annotations

import torch

from mfm_dist.checkpoint.host_memory import HostMemory


def test_copies_are_what_is_copied_in_the_type_asked_for() -> None:
    whole, half = torch.randn(3, 5), torch.randn(7).bfloat16()
    empty, count = torch.empty(0), torch.tensor(3)
    wanted = [(whole.T, torch.float32), (half, torch.float32), (empty, torch.float32), (count, torch.int64)]
    copies = HostMemory().copies(wanted)
    for copy, (tensor, dtype) in zip(copies, wanted, strict=True):
        assert copy.dtype == dtype
        assert torch.equal(copy, tensor.to(dtype))
    whole.zero_()
    assert copies[0].any()


def test_the_same_memory_takes_the_next_copies_and_grows_for_more() -> None:
    memory, first, second = HostMemory(), torch.randn(100), torch.randn(100)
    (kept,) = memory.copies([(first, torch.float32)])
    (again,) = memory.copies([(second, torch.float32)])
    assert again.data_ptr() == kept.data_ptr()
    assert torch.equal(kept, second)
    more = memory.copies([(first, torch.float32), (second, torch.float64)])
    assert torch.equal(more[0], first)
    assert torch.equal(more[1], second.double())
