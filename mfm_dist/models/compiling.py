"""Compilation by torch.compile, block by block: what blocks of one class share is compiled once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn

VARIANTS = 256
"""Times that one class may be compiled before the run ends with torch's error, rather than go on uncompiled without a
word (torch: 8). Compiled anew is what differs in structure (a stage's widths, a block without stochastic depth), in
mode (student, teacher, initial encoder, a pass that BatchNorm does not count) and in the size of maps or batch."""


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile the forward of each of these modules, when it is first called. Names, weights and hooks stay.

    By block and not by network: an encoder of fifty blocks is a handful of graphs, which takes seconds, not minutes.
    Copies of the modules, such as a teacher, share the graphs. Whatever draws does so by torch's own kernels, so that a
    compiled run draws what any other does.
    """
    # By the names that torch 2.6 has, which are aliases since 2.7.
    torch._dynamo.config.cache_size_limit = VARIANTS
    torch._dynamo.config.accumulated_cache_size_limit = VARIANTS
    torch._dynamo.config.fail_on_cache_limit_hit = True
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}
    for block in blocks:
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, dynamic=False, options={"fallback_random": True})
        # A method bound to the block: unlike a closure, a copy of the block gets one of its own.
        block.forward = MethodType(compiled[kind], block)
