"""Whole parameters, put together on every rank from the pieces that the ranks would save of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mfm_dist.distributed.deepspeed_engine import parameter_shape
from mfm_dist.distributed.engine import Engine


def full_parameters(engine: Engine, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Assemble parameters in full precision, one exchange each; all ranks have to ask for the same."""
    return [full_parameter(engine, parameter) for parameter in parameters]


def full_parameter(engine: Engine, parameter: nn.Parameter) -> Tensor:
    """Assemble one parameter. Added as integers: to zeros that gives any bits as they are, also those of -0.0."""
    shape = parameter_shape(parameter)
    flat = torch.zeros(shape.numel(), device=engine.device)
    for place, piece in engine.parameter_pieces(parameter):
        flat[place] = piece
    return engine.sum(flat.view(torch.int32)).view(torch.float32).view(shape)
