"""The teacher's average, against the obvious way."""

from __future__ import annotations

import torch
from torch import nn

from mfm_dist.distributed.teacher import update_teacher


def pairs() -> list[tuple[nn.Parameter, nn.Parameter]]:
    shapes = [(3, 5), (7,), (2, 3, 1, 1), ()]
    return [(nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))) for shape in shapes]


def test_the_teacher_moves_by_a_share_towards_the_student_bit_for_bit_as_lerp() -> None:
    both = pairs()
    expected = [teacher.detach().lerp(student.detach(), 1.0 - 0.999) for student, teacher in both]
    students = [student.detach().clone() for student, _ in both]
    update_teacher(both, torch.tensor(1.0 - 0.999))
    assert all(torch.equal(teacher, end) for (_, teacher), end in zip(both, expected, strict=True))
    assert all(torch.equal(student, begin) for (student, _), begin in zip(both, students, strict=True))


def test_a_share_of_0_changes_no_bit() -> None:
    both = pairs()
    before = [teacher.detach().clone() for _, teacher in both]
    update_teacher(both, torch.zeros(()))
    assert all(torch.equal(teacher, begin) for (_, teacher), begin in zip(both, before, strict=True))
