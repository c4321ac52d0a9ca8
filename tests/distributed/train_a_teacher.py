"""Trains a tiny module and compares its EMA teacher with the average of the exact weights, in fp64.

Prints one JSON object: relative errors of the teacher, of an average kept in bf16 for comparison, and of what a forward
makes of the teacher: as it is trained (``seen``); where a copy of it that hpZ keeps is not renewed, a planted fault
(``stale``); and once its weights are put back (``put_back``).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mfm_dist.config.loader import load_config
from mfm_dist.distributed.deepspeed_engine import DeepSpeedEngine
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.start import start_engine
from mfm_dist.run.signals import end_process
from tests.helpers.wholes import full_parameters

DECAY = 0.999


class Tiny(nn.Module):
    """What an engine asks of a module, around a network of some thousand weights."""

    term_names = ("only",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(33, 65), nn.GELU(), nn.LayerNorm(65), nn.Linear(65, 7))
        self.teacher = deepcopy(self.student).requires_grad_(False)

    def teacher_pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        yield from zip(self.student.parameters(), self.teacher.parameters(), strict=True)

    def pop_map_squares(self) -> torch.Tensor:
        return torch.zeros(2)

    def forward(self, batch: Any, *_: Any) -> Any:
        with torch.no_grad():
            target = self.teacher(batch)
        loss = (self.student(batch).float() - target.float() - 1.0).square().mean()
        losses = {"only": loss.detach(), "seen": target.double().mean(0)}
        return SimpleNamespace(total=loss, losses=losses, measured={}, inputs=None)


honest = DeepSpeedEngine._drop_copies


def main(overrides: list[str]) -> None:
    """Train as the overrides say, over the processes of the launch."""
    engine = start_engine(load_config(None, ["train.micro_batch=1", "train.global_batch=2", *overrides]))
    module = Tiny()
    groups = [
        {"name": "encoder", "part": "encoder", "params": list(module.student.parameters()), "lr": 3e-4, "base_lr": 3e-4}
    ]
    before = [student.detach().double() for student, _ in module.teacher_pairs()]
    engine.prepare(module, torch.optim.AdamW(groups))
    pairs = list(module.teacher_pairs())
    students, teachers = zip(*pairs, strict=True)
    initial = [whole.double() for whole in full_parameters(engine, teachers)]
    start = max(float((own - whole).abs().max()) for own, whole in zip(initial, before, strict=True))
    exact = [tensor.clone() for tensor in initial]
    coarse = [tensor.bfloat16() for tensor in initial]
    for step in range(engine.config.train.steps):
        train(engine, step)
        engine.update_teacher(torch.tensor(DECAY))
        for kept, rounded, now in zip(exact, coarse, full_parameters(engine, students), strict=True):
            kept.lerp_(now.double(), 1.0 - DECAY)
            rounded.lerp_(now.bfloat16(), 1.0 - DECAY)
    teacher = [whole.double() for whole in full_parameters(engine, teachers)]
    errors = {"teacher": error(teacher, exact, initial), "bf16": error(coarse, exact, initial)}
    errors["start"] = start
    errors["seen"] = error([train(engine, 0)], [output(exact)], [output(initial)])
    DeepSpeedEngine._drop_copies = lambda *_: None  # type: ignore[method-assign, assignment]
    moved = [1.5 * tensor for tensor in exact]
    put(engine, teachers, moved)
    errors["stale"] = error([train(engine, 0)], [output(moved)], [output(exact)])
    DeepSpeedEngine._drop_copies = honest  # type: ignore[method-assign]
    put(engine, teachers, moved)
    errors["put_back"] = error([train(engine, 0)], [output(moved)], [output(exact)])
    if engine.is_main:
        print("ERRORS " + json.dumps(errors), flush=True)
    engine.close()


def train(engine: Engine, step: int) -> Tensor:
    """Train the student for a step; the mean output of the teacher on rank 0's first inputs."""
    seen: list[Tensor] = []
    for micro_batch in range(engine.accumulation):
        number = (step * engine.accumulation + micro_batch) * engine.world_size + engine.rank
        seen.append(engine.forward_backward(inputs(number), 1.0)["seen"])  # type: ignore[arg-type]
    assert engine.step().applied
    return seen[0]


def inputs(number: int) -> Tensor:
    return torch.randn(4, 33, generator=torch.Generator().manual_seed(number))


def output(weights: list[Tensor]) -> Tensor:
    """What ``train`` returns for a teacher of these weights, in fp64."""
    net = Tiny().teacher.double()
    named = dict(zip(dict(net.named_parameters()), weights, strict=True))
    rank = int(os.environ["RANK"])
    return functional_call(net, named, (inputs(rank).double(),)).mean(0)  # type: ignore[no-any-return]


def put(engine: Engine, parameters: Sequence[nn.Parameter], weights: list[Tensor]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        engine.set_parameter(parameter, weight.float())


def error(found: list[Tensor], exact: list[Tensor], initial: list[Tensor]) -> float:
    """Distance from the exact average, over the distance that this one has moved."""
    off = sum(float((f.double() - e).square().sum()) for f, e in zip(found, exact, strict=True))
    moved = sum(float((e - i).square().sum()) for e, i in zip(exact, initial, strict=True))
    return float((off / moved) ** 0.5)


if __name__ == "__main__":
    main(sys.argv[1:])
    end_process(0)
