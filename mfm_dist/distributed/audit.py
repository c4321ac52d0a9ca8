"""Finding a weight that changed on one rank alone: what several places hold must be the same bits everywhere.

DDP and ZeRO 1 and 2 hold every parameter on every rank, so the ranks' fingerprints are compared; ZeRO-3 holds no
parameter twice across ranks. What a rank does hold twice are the trainable parameters themselves and DeepSpeed's fp32
master of them, at ZeRO 1 to 3; these are compared on the spot. DDP and ZeRO-0 hold the optimiser's state on every rank,
which is compared too. Not covered, because it exists once: the state at ZeRO 1 to 3, and the teacher at ZeRO-3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfm_dist.distributed.engine import Engine


def audit(module: nn.Module, engine: Engine) -> list[str]:
    """Compare all that is held twice. Collective; reads every weight once.

    Returns:
        one line for each tensor that differs, the same on every rank; empty if all is well.
    """
    own = [f"{name} differs from its fp32 master on rank {engine.rank}" for name in engine.params_out_of_sync()]
    findings = [line for lines in engine.gather_objects(own) for line in lines]
    if engine.replicates_parameters and engine.world_size > 1:
        named: dict[str, Tensor] = dict(module.named_parameters())
        if engine.replicates_gradients:
            states = {name: engine.optimizer.state.get(parameter, {}) for name, parameter in module.named_parameters()}
            named |= {
                f"{key} of {name}": value
                for name, state in states.items()
                for key, value in sorted(state.items())
                if key != "step" and isinstance(value, Tensor)
            }
        everyone = engine.gather(torch.stack([fingerprint(p) for p in named.values()]))  # [world, tensors, 2]
        differs = (everyone != everyone[:1]).any(-1).any(0).tolist()
        findings += [
            f"{name} differs: {_dissenters(everyone[:, index])}" for index, name in enumerate(named) if differs[index]
        ]
    return findings


def fingerprint(tensor: Tensor) -> Tensor:
    """Sum the bits of a tensor, plainly and weighted by place, so that a swap shows too: int64 [2].

    One flipped bit always changes the first. Both wrap around at 64 bits, which is as good as any modulus.
    """
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    first = 1
    for part in tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()]).split(AT_ONCE):
        bits = part.to(torch.int64)
        places = torch.arange(first, first + len(bits), device=bits.device)
        sums += torch.stack([bits.sum(), (bits * places).sum()])
        first += len(bits)
    return sums


AT_ONCE = 2**20
"""Elements: their bits and places take 24 bytes each, four to six times what the tensor itself does."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type of the same size in bytes."""


def _dissenters(prints: Tensor) -> str:
    """Say who is in the minority, from fingerprints [world, 2]."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, print_ in enumerate(prints.tolist()):
        groups.setdefault(tuple(print_), []).append(rank)
    if len(groups) == 2 and len(set(map(len, groups.values()))) == 2:
        few, many = sorted(groups.values(), key=len)
        return f"rank {', '.join(map(str, few))} against the other {len(many)}"
    return " against ".join(f"rank {', '.join(map(str, ranks))}" for ranks in groups.values())
