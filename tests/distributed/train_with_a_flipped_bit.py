"""The training command with a planted fault: after the second step, one bit of one weight turns over on rank 1.

With FLIPPED=exp_avg in the environment it is one of the optimiser's moments, under DDP and ZeRO-0.
"""

from __future__ import annotations

import os
import sys

import torch

from mfm_dist import train
from mfm_dist.batch import UDABatch
from mfm_dist.run.signals import end_process
from mfm_dist.trainer import Trainer

honest_step = Trainer.train_step


def step_and_flip(self: Trainer, batches: list[UDABatch]) -> None:
    honest_step(self, batches)
    if self.engine.rank == 1 and self.progress.step == 2:
        parameter = dict(self.module.named_parameters())["student.backbone.net.conv1.0.weight"]
        held = getattr(parameter, "ds_tensor", parameter).data  # ZeRO-3 keeps a shard
        if os.environ["FLIPPED"] == "exp_avg":
            held = self.engine.optimizer.state[parameter]["exp_avg"]
        held.view(torch.int32).view(-1)[3] ^= 1


if __name__ == "__main__":
    Trainer.train_step = step_and_flip  # type: ignore[method-assign]
    end_process(train.main(sys.argv[1:]))
