"""Trains the same steps under ZeRO-3 without and with leaf modules; says how far the weights are apart.

LEAVES is the class of the leaf modules. Prints one JSON object: whether all weights, the teacher too, are
the same bits, how many modules had hooks in each way, and what was refused, if something was.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.distributed.start import start_engine
from mfm_dist.errors import ConfigError
from mfm_dist.optim import build_optimizer
from mfm_dist.run.signals import end_process
from tests.helpers.classes import CLASSES
from tests.helpers.modules import SMALL, block
from tests.helpers.wholes import full_parameters

FIXED = [*SMALL, "model.backbone=mit_b0", "model.backbone_options={drop_path_rate: 0.3}", "optim.name=sgd",
         "optim.lr=0.025", "self_training.pseudo_threshold=0", "train.global_batch=8"]  # fmt: skip
STEPS = 2


def trained(overrides: list[str]) -> tuple[dict[str, Tensor], int]:
    """Train; return whole weights by name, and the number of modules with hooks of DeepSpeed."""
    AcceleratorState._reset_state()
    config = load_config(None, [*FIXED, *overrides])
    module = build_train_module(config, CLASSES)
    engine = start_engine(config)
    engine.prepare(module, build_optimizer(module, config.optim))
    hooked = sum(bool(part._forward_hooks) for part in module.modules())
    for step in range(STEPS):
        for number in range(engine.accumulation):
            engine.forward_backward(block((step * engine.accumulation + number) * engine.world_size + engine.rank), 1.0)
        assert engine.step().applied
        engine.update_teacher(torch.tensor(0.9))
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, full_parameters(engine, parameters), strict=True)), hooked


def main(overrides: list[str]) -> None:
    """Train both ways over the processes of the launch."""
    torch.set_num_threads(1)
    plain, hooks = trained(overrides)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ds.json"
        leaves = {"classes": os.environ["LEAVES"].split()}
        file.write_text(json.dumps({"zero_optimization": {"stage": 3, "leaf_module": leaves}}))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)
        try:
            ours, fewer = trained(overrides)
            said = {
                "same": all(torch.equal(ours[name], whole) for name, whole in plain.items()),
                "hooks": [hooks, fewer],
            }
            said["apart"] = max(float((ours[name] - whole).abs().max()) for name, whole in plain.items())
        except ConfigError as error:
            said = {"refused": str(error)}
    if os.environ["RANK"] == "0":
        print("LEAVES " + json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    end_process(0)
