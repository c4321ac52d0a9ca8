"""Parameter groups and the optimiser; its rates over the steps stand in ``schedules``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mfm_dist.config.schema import OptimSection
from mfm_dist.distributed.memory import StateSizes
from mfm_dist.models.activation_checkpointing import find_blocks
from mfm_dist.models.rebuilder import Rebuilder
from mfm_dist.train_module import TrainModule


def parameter_groups(module: TrainModule, settings: OptimSection) -> list[dict[str, Any]]:
    """Group every trainable parameter by part, by whether it decays, and by rate.

    Encoder, decoder and Rebuilder have rates of their own, and with ``optim.layer_decay`` so has each of the encoder's
    blocks; its groups all have the encoder's name. LayerNorm parameters do not decay, BatchNorm parameters and biases
    do, as in the published configurations. The teacher and what is frozen are in no group.
    """
    groups = []
    for layer, share in encoder_layers(module.student.backbone.net, settings.layer_decay):
        groups += _groups_of("encoder", module.student.backbone.net, settings.lr * share, settings, only=layer)
    heads = nn.ModuleList(module.student.heads)
    groups += _groups_of("decoder", heads, settings.lr * settings.decoder_lr_factor, settings)
    if module.rebuilder is not None:
        groups += _rebuilder_groups(module.rebuilder, settings)
    return groups


def state_sizes(module: TrainModule, settings: OptimSection) -> StateSizes:
    """Return how large what a run trains with is; the module may be without storage."""
    groups = [group["params"] for group in parameter_groups(module, settings)]
    followers = [follower for _, follower in module.teacher_pairs()]
    counted = {id(parameter) for parameter in (*(p for group in groups for p in group), *followers)}
    return StateSizes(
        groups=[[p.numel() for p in group] for group in groups],
        teacher=[p.numel() for p in followers],
        frozen=[p.numel() for p in module.parameters() if id(p) not in counted],
        buffer_bytes=sum(buffer.nbytes for buffer in module.buffers()),
        moments=2 if settings.name == "adamw" else 1,
    )


def encoder_layers(network: nn.Module, decay: float) -> Iterator[tuple[list[nn.Parameter], float]]:
    """Yield the parameters of each layer, and its share of the encoder's rate: 1 of the last, else decay x the next's.

    Layers are the blocks and, first, what comes before them; what lies behind a block belongs to it. So it is in
    VFM-UDA++ (arXiv 2503.10685) and, but for one more factor everywhere, in BEiT and DINOv2.
    """
    if decay == 1.0:
        yield list(network.parameters()), 1.0
        return
    blocks = find_blocks(network)
    number_of = {id(p): number for number, block in enumerate(blocks, 1) for p in block.parameters()}
    layers: list[list[nn.Parameter]] = [[] for _ in range(len(blocks) + 1)]
    current = 0
    for parameter in network.parameters():
        current = number_of.get(id(parameter), current)
        layers[current].append(parameter)
    for number, layer in enumerate(layers):
        yield layer, decay ** (len(blocks) - number)


def _groups_of(
    part: str, network: nn.Module, rate: float, settings: OptimSection, *, only: Iterable[nn.Parameter] | None = None
) -> list[dict[str, Any]]:
    """Group the trainable parameters of one part, all or some of them, by whether they decay."""
    exempt = {p for m in network.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
    trainable = [p for p in (network.parameters() if only is None else only) if p.requires_grad]
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
    apart = {id(p) for p in wide}
    others = [p for p in rebuilder.parameters() if id(p) not in apart]
    groups = _groups_of("rebuilder", rebuilder, rate, settings, only=others)
    if wide:
        scale = min(1.0, settings.rebuilder_base_width / rebuilder.width)
        group = _group("rebuilder", "_wide", wide, rate * scale, settings.weight_decay)
        groups.append({**group, "eps": settings.eps * scale})
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


def build_optimizer(module: TrainModule, settings: OptimSection, *, fused: bool = False) -> Optimizer:
    """Build the optimiser over ``parameter_groups``.

    Args:
        fused: step AdamW in one kernel instead of a dozen, for weights that are on a GPU.
    """
    groups = parameter_groups(module, settings)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
