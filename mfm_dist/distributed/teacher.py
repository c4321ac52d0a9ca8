"""The teacher's exponential moving average, local to each rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def local_pairs(student: nn.Module, teacher: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of student and teacher that this rank holds: whole parameters, or ZeRO-3's shards of them.

    Both modules are of one shape and sit in one engine, so ZeRO-3 cuts them alike and no communication is needed.
    """
    student_parameters = dict(student.named_parameters())
    for name, teacher_parameter in teacher.named_parameters():
        pair = tuple(getattr(p, "ds_tensor", p).data for p in (student_parameters[name], teacher_parameter))
        assert pair[0].shape == pair[1].shape, f"{name}: student and teacher are sharded differently"
        yield pair[0], pair[1]


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, parameters only.

    Buffers are left alone: the teacher's BatchNorm normalises with batch statistics and never reads them.
    """
    pairs = list(local_pairs(student, teacher))
    torch._foreach_lerp_([t for _, t in pairs], [s for s, _ in pairs], 1.0 - decay)
