"""The teacher's exponential moving average, local to each rank; ``bf16_engine`` has its own, from fp32 masters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def local_tensor(parameter: nn.Parameter) -> Tensor:
    """Return what this rank holds of a parameter: all of it, or ZeRO-3's shard."""
    return getattr(parameter, "ds_tensor", parameter).data


@torch.no_grad()
def update_teacher(pairs: Iterable[tuple[nn.Parameter, nn.Parameter]], decay: float) -> None:
    """Average: teacher <- decay * teacher + (1 - decay) * student, parameters only.

    Student and teacher are of one shape and sit in one engine, so ZeRO-3 cuts them alike and no communication is
    needed. Buffers are left alone: the teacher's BatchNorm normalises with batch statistics and never reads them.

    Args:
        pairs: each student parameter and the teacher's that follows it, all fp32.
    """
    pieces = [(local_tensor(student), local_tensor(teacher)) for student, teacher in pairs]
    assert all(s.shape == t.shape and t.dtype == torch.float32 for s, t in pieces), "student and teacher are cut apart"
    torch._foreach_lerp_([t for _, t in pieces], [s for s, _ in pieces], 1.0 - decay)
