"""Parameter groups and the optimiser; its rates over the steps stand in ``schedules``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mfm_dist.config.schema import OptimSection
from mfm_dist.models.rebuilder import Rebuilder
from mfm_dist.train_module import TrainModule


def parameter_groups(module: TrainModule, settings: OptimSection) -> list[dict[str, Any]]:
    """Group every trainable parameter by part, by whether it decays, and by rate.

    Encoder, decoder and Rebuilder have rates of their own; a pyramid on the encoder starts from random weights, as the
    decoder does, and counts as part of it. LayerNorm parameters do not decay, BatchNorm parameters and
    biases do, as in the published configurations. The teacher is in no group.
    """
    backbone = module.student.backbone
    new = [*module.student.heads, *([] if backbone.pyramid is None else [backbone.pyramid])]
    groups = [
        *_groups_of("encoder", backbone.net, settings.lr, settings),
        *_groups_of("decoder", nn.ModuleList(new), settings.lr * settings.decoder_lr_factor, settings),
    ]
    if module.rebuilder is not None:
        groups += _rebuilder_groups(module.rebuilder, settings)
    return groups


def _groups_of(
    part: str, network: nn.Module, rate: float, settings: OptimSection, apart: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Group the trainable parameters of one part, without those that are ``apart``, by whether they decay."""
    exempt = {p for m in network.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
    left_out = {id(p) for p in apart}
    trainable = [p for p in network.parameters() if p.requires_grad and id(p) not in left_out]
    decaying = [p for p in trainable if p not in exempt]
    kept = [p for p in trainable if p in exempt]
    return [
        _group(part, label, parameters, rate, decay)
        for label, parameters, decay in (("", decaying, settings.weight_decay), ("_norm", kept, 0.0))
        if parameters
    ]


def _rebuilder_groups(rebuilder: Rebuilder, settings: OptimSection) -> list[dict[str, Any]]:
    """Group the Rebuilder's parameters; matrices that are as wide as it is apart, where their rate depends on that."""
    rate, wide = settings.rebuilder_lr, rebuilder.wide_matrices() if settings.rebuilder_base_width else []
    groups = _groups_of("rebuilder", rebuilder, rate, settings, apart=wide)
    if wide:
        scale = min(1.0, settings.rebuilder_base_width / rebuilder.width)
        group = _group("rebuilder", "_wide", wide, rate * scale, settings.weight_decay)
        groups.append({**group, "eps": settings.eps * scale})
    if settings.rebuilder_betas is not None:
        groups = [{**group, "betas": settings.rebuilder_betas} for group in groups]
    return groups


def _group(part: str, label: str, parameters: list[nn.Parameter], rate: float, decay: float) -> dict[str, Any]:
    return {
        "name": part + label,
        "part": part,
        "params": parameters,
        "numel": sum(p.numel() for p in parameters),
        "lr": rate,
        "base_lr": rate,
        "weight_decay": decay,
    }


def build_optimizer(module: TrainModule, settings: OptimSection) -> Optimizer:
    """Build the optimiser over ``parameter_groups``."""
    groups = parameter_groups(module, settings)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
