"""Activation checkpointing of the blocks of a network: exact, BatchNorm statistics and random draws included."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from timm.models import FeatureDictNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mfm_dist.errors import ConfigError
from mfm_dist.models.backbone import Backbone
from mfm_dist.models.dropout import KeyedDropout, dropouts_of


def checkpoint_blocks(backbone: Backbone) -> None:
    """Have a block keep its input alone from now on, and compute the rest again when its backward needs it.

    Where no blocks can be told apart (RegNet, DenseNet, DLA, Inception, DPN), whole stages do, which saves less.

    Forwards without gradients are not touched. Names of parameters stay, so checkpoints fit with and without.

    Raises:
        ConfigError: the encoder has no blocks that can be told apart.
    """
    blocks = find_parts(backbone.net)
    if not blocks:
        raise ConfigError(
            "memory.checkpoint_backbone: no block was found in this encoder (a block is a part with layers of its own "
            "inside an nn.Sequential or nn.ModuleList). Set memory.checkpoint_backbone=false, or choose another "
            "model.backbone, e.g. of the families MiT, ResNet, ConvNeXt, Swin or ViT; memory.lean works with every one"
        )
    recompute(blocks)


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Have each of these modules keep its input alone, and compute the rest again when its backward needs it."""
    for block in blocks:
        # A method bound to the block: unlike a closure, a copy of the block (the teacher) gets one of its own. Around
        # the forward that the block has, which may be compiled.
        forward: Any = block.forward
        block.forward = MethodType(partial(_forward, forward.__func__), block)


def find_parts(net: nn.Module) -> list[nn.Module]:
    """Find an encoder's blocks, or its stages where no blocks can be told apart; [] where neither can."""
    return find_blocks(net) or find_stages(net)


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """Find the innermost parts with layers of their own that are listed in a container: a stage's residual blocks.

    timm has no common name for them, but writes them all as entries of a Sequential or a ModuleList.
    """
    found = []
    for child in module.children():
        inside = find_blocks(child)
        composite = any(child.children()) and not isinstance(child, (*_CONTAINERS, _BatchNorm))
        if not inside and composite and isinstance(module, _CONTAINERS):
            inside = [child]
        found += inside
    return found


def find_stages(net: nn.Module) -> list[nn.Module]:
    """Find the parts with layers that timm's feature wrapper calls one after the other; [] of another wrapper.

    ``FeatureHookNet`` is another: it collects maps where layers inside of stages run, and would do so again in the
    recomputation.
    """
    if not isinstance(net, FeatureDictNet):
        return []
    return [child for child in net.children() if any(child.children()) and not isinstance(child, _BatchNorm)]


_CONTAINERS = (nn.Sequential, nn.ModuleList)


def _forward(forward: Callable[..., Any], block: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Run the block's own forward, checkpointed where there will be a backward."""
    compute = partial(forward, block)
    if not torch.is_grad_enabled():
        return compute(*inputs, **options)
    tracked = {m: m.track_running_stats for m in block.modules() if isinstance(m, _BatchNorm)}
    masks = {layer: layer.mask for layer in dropouts_of([block])}
    # Non-reentrant, which alone is exact under DDP and ZeRO with several forwards a step. It restores the random
    # generators and autocast; BatchNorm in the recomputation is left to us.
    return checkpoint(
        compute,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _as_in_the_forward(tracked, masks)),
        **options,
    )


@contextmanager
def _as_in_the_forward(tracked: dict[_BatchNorm, bool], masks: dict[KeyedDropout, Tensor | None]) -> Iterator[None]:
    """Let BatchNorm layers work as in the forward, on copies of their running statistics, then dropped; and dropout.

    Copies, because without the buffers other tensors would be saved than in the forward, which torch refuses.

    Args:
        tracked: each layer's ``track_running_stats`` in the forward; it may have changed since.
        masks: of each layer in the forward, likewise.
    """
    for dropout, mask in masks.items():
        dropout.mask = mask
    found = {layer: (layer.track_running_stats, dict(layer._buffers)) for layer in tracked}
    for layer, tracks in tracked.items():
        layer.track_running_stats = tracks
        layer._buffers.update({name: b if b is None else b.clone() for name, b in layer._buffers.items()})
    try:
        yield
    finally:  # also when torch ends the recomputation early, by an exception
        for layer, (tracks, buffers) in found.items():
            layer.track_running_stats = tracks
            layer._buffers.update(buffers)
        for dropout in masks:
            dropout.mask = None
