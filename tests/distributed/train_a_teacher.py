"""Trains a tiny module for 300 steps and compares its EMA teacher with the average of the exact weights, in fp64.

Prints one JSON object: the relative error of the teacher, and of an average kept in bf16 for comparison.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mfm_dist.config.loader import load_config
from mfm_dist.distributed.start import start_engine
from mfm_dist.run.signals import end_process

STEPS, DECAY = 300, 0.999


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
        return SimpleNamespace(total=loss, losses={"only": loss.detach()}, measured={}, inputs=None)


def main(overrides: list[str]) -> None:
    """Train as the overrides say, over the processes of the launch."""
    engine = start_engine(load_config(None, ["train.micro_batch=1", "train.global_batch=2", *overrides]))
    module = Tiny()
    groups = [
        {"name": "encoder", "part": "encoder", "params": list(module.student.parameters()), "lr": 3e-4, "base_lr": 3e-4}
    ]
    engine.prepare(module, torch.optim.AdamW(groups))
    pairs = list(module.teacher_pairs())
    students, teachers = zip(*pairs, strict=True)
    initial = [whole.double() for whole in engine.full_parameters(teachers)]
    exact = [tensor.clone() for tensor in initial]
    coarse = [tensor.bfloat16() for tensor in initial]
    for step in range(STEPS):
        for micro_batch in range(engine.accumulation):
            number = (step * engine.accumulation + micro_batch) * engine.world_size + engine.rank
            inputs = torch.randn(4, 33, generator=torch.Generator().manual_seed(number))
            engine.forward_backward(inputs, 1.0)  # type: ignore[arg-type]
        assert engine.step().applied
        engine.update_teacher(torch.tensor(DECAY))
        for kept, rounded, now in zip(exact, coarse, engine.full_parameters(students), strict=True):
            kept.lerp_(now.double(), 1.0 - DECAY)
            rounded.lerp_(now.bfloat16(), 1.0 - DECAY)
    teacher = [whole.double() for whole in engine.full_parameters(teachers)]
    errors = {"teacher": error(teacher, exact, initial), "bf16": error(coarse, exact, initial)}
    if engine.is_main:
        print("ERRORS " + json.dumps(errors), flush=True)
    engine.close()


def error(found: list[Tensor], exact: list[Tensor], initial: list[Tensor]) -> float:
    """Distance from the exact average, over the distance that this one has moved."""
    off = sum(float((f.double() - e).square().sum()) for f, e in zip(found, exact, strict=True))
    moved = sum(float((e - i).square().sum()) for e, i in zip(exact, initial, strict=True))
    return float((off / moved) ** 0.5)


if __name__ == "__main__":
    main(sys.argv[1:])
    end_process(0)
