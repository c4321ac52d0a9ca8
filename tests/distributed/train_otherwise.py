"""The training command with one thing changed (OTHERWISE), for tests of what the equality of runs can and must see."""

from __future__ import annotations

import os
import sys
import time
import zlib
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_dist import build, train, trainer
from mfm_dist.batch import UDABatch
from mfm_dist.checkpoint import writer
from mfm_dist.classes import ClassSet
from mfm_dist.config.schema import MFMSection, RunConfig
from mfm_dist.distributed import cuda_graph, start, teacher
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.launch import Launch
from mfm_dist.run.signals import end_process
from mfm_dist.train_module import TrainModule
from tests.helpers.recorded_graphs import RecordingEngine


def every_other_step_without_mfm() -> None:
    """lambda is 1, 0, 1, 0, ...: where it is 0, no gradient of the step before may be used again."""

    def weight(step: int, _: MFMSection) -> float:
        return float(step % 2 == 0)

    trainer.mfm_weight = weight


def no_exchange() -> None:
    """A fault: DDP never exchanges gradients."""

    def never(self: Engine, **_: Any) -> AbstractContextManager[Any]:
        return self._wrapped.no_sync()  # type: ignore[operator]

    Engine._sync_context = never  # type: ignore[method-assign]


def stale_shard() -> None:
    """A fault: on rank 1 the teacher follows what the student's shards were one step ago."""
    honest, before = teacher.local_tensor, dict[int, Tensor]()

    def local_tensor(parameter: Any) -> Tensor:
        now = honest(parameter)
        if os.environ["RANK"] != "1" or not parameter.requires_grad:
            return now
        stale = before.get(id(parameter), now)
        before[id(parameter)] = now.clone()
        return stale

    teacher.local_tensor = local_tensor


def resident_parameters() -> None:
    """A fault: ZeRO-3 is left to its default, by which small parameters stay gathered."""
    honest = start.deepspeed_config

    def told(config: RunConfig, launch: Launch) -> dict[str, Any]:
        told = honest(config, launch)
        del told["zero_optimization"]["stage3_param_persistence_threshold"]
        return told

    start.deepspeed_config = told


def slow_write() -> None:
    """No fault: a disk that takes seconds for a checkpoint. The file ``writing`` in the run folder says when."""
    honest = writer.write_rank

    def write(final: Path, *arguments: Any) -> None:
        (final.parent.parent / "writing").touch()
        time.sleep(4)
        honest(final, *arguments)

    writer.write_rank = write


def last_bits() -> None:
    """No fault: the last bit of every other initial weight is another one, as rounding would leave it."""
    honest = build.build_train_module

    @torch.no_grad()
    def altered(config: RunConfig, classes: ClassSet) -> TrainModule:
        module, generator = honest(config, classes), torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            way = torch.randint(-1, 2, parameter.shape, generator=generator) * torch.inf
            parameter.copy_(torch.where(way.isnan(), parameter, torch.nextafter(parameter, way)))
        return module

    build.build_train_module = altered


def swapped_sample() -> None:
    """A fault: in one micro-batch, two source images have each other's label."""
    honest = TrainModule.forward

    def forward(self: TrainModule, batch: UDABatch, *arguments: Any) -> Any:
        if batch.block == 3:
            batch = replace(batch, source_label=batch.source_label.flip(0))
        return honest(self, batch, *arguments)

    TrainModule.forward = forward  # type: ignore[method-assign]


def samples_noted() -> None:
    """No fault: what is trained on is noted in the run folder, a line of block and checksum of its pixels."""
    honest = TrainModule.forward

    def forward(self: TrainModule, batch: UDABatch, *arguments: Any) -> Any:
        pixels = (batch.source_image, batch.source_label, batch.target_image)
        checksum = zlib.crc32(b"".join(part.contiguous().cpu().numpy().tobytes() for part in pixels))
        with open(os.environ["SAMPLES"], "a", encoding="utf-8") as file:
            file.write(f"{batch.block} {checksum}\n")
        return honest(self, batch, *arguments)

    TrainModule.forward = forward  # type: ignore[method-assign]


def replayed() -> None:
    """No fault: from the second micro-batch of a kind on the operators of that one run, as a CUDA graph would do it."""
    cuda_graph.WARM_UP = 1
    start.graph_problems = lambda *_: []
    start.GraphEngine = RecordingEngine  # type: ignore[misc]


def clock_set_back() -> None:
    """No fault: from the third step on, this process's clock is an hour behind."""
    honest, steps, now = TrainModule.forward, [0], time.time

    def forward(self: TrainModule, *arguments: Any) -> Any:
        steps[0] += 1
        if steps[0] == 3:
            time.time = lambda: now() - 3600
        return honest(self, *arguments)

    TrainModule.forward = forward  # type: ignore[method-assign]


if __name__ == "__main__":
    globals()[os.environ["OTHERWISE"]]()
    end_process(train.main(sys.argv[1:]))
