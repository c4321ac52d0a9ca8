"""The teacher's exponential moving average, local to each rank; ``bf16_engine`` has its own, from fp32 masters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def local_tensor(parameter: nn.Parameter) -> Tensor:
    """Return what this rank holds of a parameter: all of it, or ZeRO-3's shard."""
    return getattr(parameter, "ds_tensor", parameter).data


@torch.no_grad()
def update_teacher(pairs: Iterable[tuple[nn.Parameter, nn.Parameter]], share: Tensor) -> None:
    """Average: teacher <- teacher + share * (student - teacher), parameters only.

    Student and teacher are of one shape and sit in one engine, so ZeRO-3 cuts them alike and no communication is
    needed. Buffers are left alone: the teacher's BatchNorm normalises with batch statistics and never reads them.

    Args:
        pairs: each student parameter and the teacher's that follows it, all fp32.
        share: scalar, fp32, on the device: 1 - decay, or 0 to leave all as it is.
    """
    pieces = [(local_tensor(student), local_tensor(teacher)) for student, teacher in pairs]
    assert all(s.shape == t.shape and t.dtype == torch.float32 for s, t in pieces), "student and teacher are cut apart"
    move_towards([student for student, _ in pieces], [teacher for _, teacher in pieces], share)


def move_towards(students: Sequence[Tensor], teachers: Sequence[Tensor], share: Tensor) -> None:
    """Move each teacher's tensor towards its student's: teacher <- teacher + share * (student - teacher).

    By the kernel of torch's fused SGD, which takes a rate that only the device knows: it ascends a gradient that is the
    student, with a decay of 1. Below a share of one half it has the bits of ``lerp``.
    """
    if teachers:
        torch._fused_sgd_(
            list(teachers),
            list(students),
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=share,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
        )
