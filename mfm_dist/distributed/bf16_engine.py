"""The engine over ZeRO-2 and 3 with bf16 weights: what is exact are fp32 pieces, of the student and of the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfm_dist.distributed.deepspeed_engine import DeepSpeedEngine
from mfm_dist.distributed.engine import Piece
from mfm_dist.distributed.running_statistics import running_statistics
from mfm_dist.distributed.teacher import move_towards


class BF16Engine(DeepSpeedEngine):
    """DeepSpeed casts the whole module to bf16 and keeps an fp32 master of what is trained, sharded.

    The teacher is no part of DeepSpeed's master, and in bf16 an average with a decay of 0.999 would not move. Its exact
    values are kept here, cut like the student's master from which they are updated; the module's bf16 teacher is a
    copy of them. At ZeRO-3 that copy is local; at ZeRO-2 it takes one all-gather a step.

    BatchNorm's running statistics are bf16 as well; with a momentum of 0.1 they move.
    """

    def prepare(self, module: nn.Module, optimizer: Optimizer) -> None:
        # DeepSpeed makes its master from the weights that it has cast: what they were before is put back.
        exact = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        constants = {name: buffer.clone() for name, buffer in module.named_buffers()}
        super().prepare(module, optimizer)
        # BatchNorm wants its statistics in the type of its weights. Other buffers stay as exact as they were.
        statistics = {id(buffer) for buffer in running_statistics(module)}
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                whole = constants[name].to(buffer.device)
                buffer.data = whole.bfloat16() if id(buffer) in statistics else whole
        pairs = self._teacher_pairs
        self._student_of = {teacher: student for student, teacher in pairs}
        self._average: dict[nn.Parameter, Tensor] = {}
        """Exact values of this rank's piece of each teacher parameter, flat, fp32."""
        self._pieces_by_rank: list[list[tuple[int, slice]]] = self.gather_objects(
            [(index, place) for index, (student, _) in enumerate(pairs) for place, _ in self._local_shards(student)]
        )
        """For each rank the pieces it keeps: index of the parameter, and where in the flat whole it belongs."""
        teacher_of = dict(pairs)
        for name, parameter in module.named_parameters():
            if name in exact:
                self.set_parameter(parameter, exact[name])
                if (teacher := teacher_of.get(parameter)) is not None:
                    self.set_parameter(teacher, exact[name])

    @torch.no_grad()
    def update_teacher(self, decay: Tensor) -> None:
        pieces = [
            (self._average[teacher], master)
            for teacher, student in self._student_of.items()
            for _, master in self._local_shards(student)
        ]
        move_towards([master for _, master in pieces], [own for own, _ in pieces], self._new_share(decay))
        if self._is_stage_3:
            for teacher, own in self._average.items():
                self._local_piece(teacher)[1].copy_(own)
            self._drop_copies(self._average)
        else:
            self._gather_teacher()

    def parameter_pieces(self, parameter: nn.Parameter) -> list[Piece]:
        if (student := self._student_of.get(parameter)) is not None:
            return [(place, self._average[parameter]) for place, _ in self._local_shards(student)]
        return self._local_shards(parameter) if parameter.requires_grad else super().parameter_pieces(parameter)

    @torch.no_grad()
    def set_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        super().set_parameter(parameter, whole)
        if (student := self._student_of.get(parameter)) is not None:
            for place, master in self._local_shards(student):
                self._average[parameter] = whole.flatten()[place].to(master.device, torch.float32, copy=True)

    @contextmanager
    def inference_context(self) -> Iterator[None]:
        with super().inference_context(), torch.autocast(self.device.type, dtype=torch.bfloat16):
            yield

    def _to_wrap(self, module: nn.Module) -> nn.Module:
        return _UnderAutocast(module, self.device.type)

    def _gather_teacher(self) -> None:
        """Copy the exact teacher, all ranks' pieces of it, into the module's; one all-gather."""
        teachers = list(self._student_of)
        lengths = [sum(place.stop - place.start for _, place in pieces) for pieces in self._pieces_by_rank]
        own = torch.zeros(max(lengths), dtype=torch.bfloat16, device=self.device)
        if self._average:
            own[: lengths[self.rank]] = torch.cat([self._average[t] for t in teachers if t in self._average])
        for pieces, flat in zip(self._pieces_by_rank, self.gather(own), strict=True):
            first = 0
            for index, place in pieces:
                count = place.stop - place.start
                teachers[index].data.view(-1)[place] = flat[first : first + count]
                first += count


class _UnderAutocast(nn.Module):
    """Runs a module of bf16 weights on fp32 inputs: DeepSpeed switches off an autocast around its own forward."""

    def __init__(self, module: nn.Module, device_type: str) -> None:
        super().__init__()
        self.module = module
        self.device_type = device_type

    def forward(self, *args: Any) -> Any:
        with torch.autocast(self.device_type, dtype=torch.bfloat16):
            return self.module(*args)
