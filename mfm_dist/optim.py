"""Parameter groups and the optimiser; its rates over the steps stand in ``schedules``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mfm_dist.config.schema import OptimSection
from mfm_dist.train_module import TrainModule


def parameter_groups(module: TrainModule, settings: OptimSection) -> list[dict[str, Any]]:
    """Group every trainable parameter by part and by whether it decays.

    Encoder, decoder and Rebuilder have rates of their own; a pyramid on the encoder starts from random weights, as the
    decoder does, and counts as part of it. LayerNorm parameters do not decay, BatchNorm parameters and
    biases do, as in the published configurations. The teacher is in no group.
    """
    backbone = module.student.backbone
    new = [*module.student.heads, *([] if backbone.pyramid is None else [backbone.pyramid])]
    parts: list[tuple[str, nn.Module, float]] = [
        ("encoder", backbone.net, settings.lr),
        ("decoder", nn.ModuleList(new), settings.lr * settings.decoder_lr_factor),
    ]
    if module.rebuilder is not None:
        parts.append(("rebuilder", module.rebuilder, settings.rebuilder_lr))
    groups: list[dict[str, Any]] = []
    for name, part, rate in parts:
        exempt = {p for m in part.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
        trainable = [p for p in part.parameters() if p.requires_grad]
        decaying = [p for p in trainable if p not in exempt]
        kept = [p for p in trainable if p in exempt]
        for label, parameters, decay in (("", decaying, settings.weight_decay), ("_norm", kept, 0.0)):
            if parameters:
                group = {"name": name + label, "params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
                if name == "rebuilder" and settings.rebuilder_betas is not None:
                    group["betas"] = settings.rebuilder_betas
                groups.append(group)
    return groups


def build_optimizer(module: TrainModule, settings: OptimSection) -> Optimizer:
    """Build the optimiser over ``parameter_groups``."""
    groups = parameter_groups(module, settings)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
