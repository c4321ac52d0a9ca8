"""The training command with planted faults: the micro-batches BAD_BLOCKS give a bad loss, gradient or activation,
or are too large for memory (BAD_KIND), and on rank 1 there is no data from block NO_DATA_FROM on, if that is set."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from mfm_dist import train, trainer
from mfm_dist.batch import UDABatch
from mfm_dist.errors import DataError
from mfm_dist.run.signals import end_process
from mfm_dist.train_module import StepOutput, TrainModule

BAD = {int(block) for block in os.environ["BAD_BLOCKS"].split(",")}
KIND = os.environ["BAD_KIND"]

NO_DATA_FROM = int(os.environ.get("NO_DATA_FROM", sys.maxsize))

honest_forward, honest_pipeline = TrainModule.forward, trainer.train_pipeline


def forward_with_faults(self: TrainModule, batch: Any, *arguments: Any) -> StepOutput:
    if batch.block in BAD and KIND == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
    if batch.block in BAD and KIND == "gpu memory":
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    if batch.block in BAD and KIND == "activation":
        planted = self.student.backbone.register_forward_pre_hook(lambda _, images: (images[0] * float("inf"),))
        output = honest_forward(self, batch, *arguments)
        planted.remove()
        return output
    output = honest_forward(self, batch, *arguments)
    if batch.block not in BAD:
        return output
    if KIND == "gradient":  # the loss itself looks well
        output.total.register_hook(lambda gradient: gradient * float("nan"))
        return output
    return replace(output, total=output.total * {"loss": float("nan"), "spike": 1000.0}[KIND])


def pipeline_that_ends(*arguments: Any, **named: Any) -> Iterator[UDABatch]:
    for batch in honest_pipeline(*arguments, **named):
        if os.environ.get("RANK") == "1" and batch.block >= NO_DATA_FROM:
            raise DataError("the disk with the shards is gone")
        yield batch


if __name__ == "__main__":
    trainer.train_pipeline = pipeline_that_ends  # type: ignore[assignment]
    TrainModule.forward = forward_with_faults  # type: ignore[method-assign]
    end_process(train.main(sys.argv[1:]))
