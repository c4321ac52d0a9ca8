"""Each fault of accelerate, torch and DeepSpeed that is worked around, by itself: is it still there?

Run on two processes with ``fp32`` or ``bf16`` (one precision a process). Rank 0 prints one JSON object: for each fault
whether it shows. No code of the package runs here; what works around a fault is named in docs/distributed.md.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

os.environ["DS_ACCELERATOR"] = "cpu"
WIDTH = 5
"""Odd, so that no parameter and no buffer is divided evenly by two ranks."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1))


def inputs(seed: int = 0) -> Tensor:
    """This rank's own."""
    generator = torch.Generator().manual_seed(2 * seed + dist.get_rank())
    return torch.randn(4, WIDTH, generator=generator)


def start(module: nn.Module, stage: int, *, rate: float = 0.1, groups: int = 1, **settings: Any) -> Any:
    """A DeepSpeed engine around the module, plain SGD unless there are several groups."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        [{"params": parameters[index::groups]} for index in range(groups)], lr=rate, momentum=0.9 if groups > 1 else 0.0
    )
    zero = {"stage": stage, "overlap_comm": False, **settings.pop("zero_optimization", {})}
    told = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    told |= {"steps_per_print": 10**9, **settings}
    return deepspeed.initialize(model=module, optimizer=optimizer, config=told)[0]


def whole(parameter: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().float().clone()


def movement(engine: Any, loss: Callable[[Any], Tensor]) -> float:
    """Norm of what one step does to the weights."""
    before = [whole(p) for p in engine.module.parameters()]
    engine.backward(loss(engine))
    engine.step()
    after = [whole(p) for p in engine.module.parameters()]
    return float(torch.stack([(b - a).norm() for b, a in zip(before, after, strict=True)]).norm())


def clips_unasked() -> bool:
    """A gradient of norm 100 and more, of which the step takes 1."""
    unasked, asked = (
        movement(start(net(), 2, rate=1.0, **told), lambda engine: 100 * engine(inputs()).sum())
        for told in ({}, {"gradient_clipping": 0.0})
    )
    return bool(abs(unasked - 1.0) < 1e-3 < asked - unasked)


def zero0_applies_nan() -> bool:
    engine = start(net(), 0, gradient_clipping=0.0)
    engine.backward(engine(inputs()).sum() * torch.nan)
    engine.step()
    return not all(bool(torch.isfinite(p).all()) for p in engine.module.parameters())


def offload_overlooks_nan() -> bool:
    """The gradient that is stepped with is not looked at."""
    engine = start(net(), 2, gradient_clipping=0.0, zero_force_ds_cpu_optimizer=False,
                   zero_optimization={"offload_optimizer": {"device": "cpu"}})  # fmt: skip
    engine.backward(engine(inputs()).sum())
    for shard in engine.optimizer.single_partition_of_fp32_groups:
        shard.grad.fill_(torch.nan)
    engine.step()
    return not all(bool(torch.isfinite(p).all()) for p in engine.module.parameters())


def padding_keeps_nan() -> bool:
    """A step that was refused for a NaN in the whole buffer, then one with good gradients: refused as well."""
    engine = start(net(), 3, gradient_clipping=0.0)
    engine.backward(engine(inputs()).sum())
    for gradients in engine.optimizer.averaged_gradients.values():
        for gradient in gradients:
            gradient.fill_(torch.nan)
    engine.step()
    refused = not engine.was_step_applied()
    engine.backward(engine(inputs(1)).sum())
    engine.step()
    return bool(refused and not engine.was_step_applied())


def round_robin_maps_to_other_parameters() -> bool:
    """What DeepSpeed says is a parameter's piece of the fp32 master holds other values."""
    engine = start(net(), 2, zero_optimization={"round_robin_gradients": True})
    wrong = False
    for parameter in engine.module.parameters():
        if (piece := parameter._hp_mapping) is not None:
            place = piece.lp_fragment_address
            wrong |= not torch.equal(
                piece.get_hp_fragment(), parameter.data.flatten()[place.start : place.start + place.numel]
            )
    found = torch.tensor(float(wrong))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def reduces_in_huge_buckets() -> bool:
    return int(start(net(), 2).optimizer.reduce_bucket_size) >= 500_000_000


def resident_parameter_hides_update() -> bool:
    """By default ZeRO-3 keeps small parameters gathered after a step: what is written into the shard is lost."""
    engine, x = start(net(), 3), torch.ones(1, WIDTH)
    engine.backward(engine(inputs()).sum())
    engine.step()
    before = engine(x).detach().clone()
    for parameter in engine.module.parameters():
        parameter.ds_tensor.data.zero_()
    return bool(torch.equal(engine(x), before))


def second_copy_hides_update() -> bool:
    """hpZ gathers from a copy that it renews for what is trained alone: what is written to a frozen shard is lost."""
    module, x = net(), torch.ones(1, WIDTH)
    module[0].requires_grad_(False)
    settings = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    engine = start(module, 3, rate=0.0, zero_optimization=settings)
    engine.backward(engine(inputs()).sum())
    engine.step()
    before = engine(x).detach().clone()
    for parameter in module[0].parameters():
        parameter.ds_tensor.data.zero_()
    return bool(torch.equal(engine(x), before))


class Branch(nn.Module):
    """Two layers, of which one step may use the first alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        y = self.always(x)
        return (self.sometimes(y) if both else y).sum()


def unused_parameter_moves_again() -> bool:
    """With plain SGD a parameter without a gradient should stay where it is."""
    engine = start(Branch(), 3, gradient_clipping=0.0, zero_optimization={"stage3_param_persistence_threshold": 0})
    for both in (True, False):
        before = whole(engine.module.sometimes.weight)
        engine.backward(engine(inputs(), both))
        engine.step()
    return not torch.equal(before, whole(engine.module.sometimes.weight))


def later_backward_adds_to_an_old_gradient() -> bool:
    """Two backwards a step, the second of them through ``sometimes`` too, against one backward of their sum."""
    moved = []
    for several in (True, False):
        engine = start(Branch(), 3, gradient_clipping=0.0, zero_optimization={"stage3_param_persistence_threshold": 0})
        before = [whole(p) for p in engine.module.parameters()]
        for step in range(2):
            if several:
                engine.set_gradient_accumulation_boundary(False)
                engine.backward(engine(inputs(step), False))
                engine.set_gradient_accumulation_boundary(True)
                engine.backward(engine(inputs(step), True))
            else:
                engine.backward(engine(inputs(step), False) + engine(inputs(step), True))
            engine.step()
        after = [whole(p) for p in engine.module.parameters()]
        moved.append(torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]))
    return not torch.allclose(moved[0], moved[1], rtol=1e-3, atol=1e-6)


def second_group_has_no_state() -> bool:
    """After a step every parameter of every group should be linked to its momentum."""
    engine = start(net(), 1, groups=2)
    engine.backward(engine(inputs()).sum())
    engine.step()
    pieces = [parameter._hp_mapping for parameter in engine.module.parameters()]
    unlinked = torch.tensor(float(any(p is not None and "momentum_buffer" not in p.optim_fragment for p in pieces)))
    dist.all_reduce(unlinked, op=dist.ReduceOp.MAX)
    return bool(unlinked)


def backward_also_steps() -> bool:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    told = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2, "overlap_comm": False},
            "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}  # fmt: skip
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=told), mixed_precision="no")
    module = net()
    wrapped, _ = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
    before = module[0].weight.detach().clone()
    accelerator.backward(wrapped(inputs()).sum())
    return not torch.equal(before, module[0].weight)


class Numbers(IterableDataset[Tensor]):
    """This rank's numbers: all equal to its rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Any:
        return iter(torch.full((8, 1), float(self.rank)))


def prepared_loader_reads_rank_0_alone() -> bool:
    from accelerate import Accelerator

    loader = Accelerator(cpu=True).prepare(DataLoader(Numbers(dist.get_rank()), batch_size=2))
    seen = torch.cat(list(loader)).amax()
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return bool(seen == 0)


def prepared_scheduler_steps_once_a_rank() -> bool:
    from accelerate import Accelerator

    accelerator, module = Accelerator(cpu=True), net()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    _, prepared, schedule = accelerator.prepare(module, optimizer, schedule)
    prepared.step()
    schedule.step()
    return bool(optimizer.param_groups[0]["lr"] != 0.5)


def no_sync_around_backward_alone_exchanges() -> bool:
    wrapped = nn.parallel.DistributedDataParallel(net())
    loss = wrapped(inputs()).sum()
    with wrapped.no_sync():
        loss.backward()
    gradient = wrapped.module[0].weight.grad.clone()
    other = gradient.clone()
    dist.broadcast(other, src=0)
    return bool(torch.equal(gradient, other))


def master_is_made_of_rounded_weights() -> bool:
    module = net()
    exact = torch.cat([p.detach().flatten() for p in module.parameters()])
    engine = start(module, 2, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    master = engine.optimizer.single_partition_of_fp32_groups[0]
    own = exact.new_zeros(2 * master.numel())
    own[: exact.numel()] = exact
    mine = own.chunk(2)[dist.get_rank()]
    differs = torch.tensor(float(not torch.equal(master.detach().sort().values, mine.sort().values)))
    rounded = torch.tensor(float(torch.equal(master.detach(), master.detach().bfloat16().float())))
    for sign in (differs, rounded):
        dist.all_reduce(sign, op=dist.ReduceOp.MIN)
    return bool(differs and rounded)


FAULTS: dict[str, list[Callable[[], bool]]] = {
    "fp32": [
        no_sync_around_backward_alone_exchanges,
        clips_unasked,
        zero0_applies_nan,
        offload_overlooks_nan,
        padding_keeps_nan,
        round_robin_maps_to_other_parameters,
        reduces_in_huge_buckets,
        resident_parameter_hides_update,
        second_copy_hides_update,
        unused_parameter_moves_again,
        later_backward_adds_to_an_old_gradient,
        second_group_has_no_state,
    ],
    "bf16": [master_is_made_of_rounded_weights],
    "accelerate": [prepared_loader_reads_rank_0_alone, prepared_scheduler_steps_once_a_rank],
    "accelerate_deepspeed": [backward_also_steps],
}
"""By what a process has to be for them."""


def main(kind: str) -> None:
    dist.init_process_group("gloo")
    found = {fault.__name__: fault() for fault in FAULTS[kind]}
    if dist.get_rank() == 0:
        print("FAULTS " + json.dumps(found), flush=True)
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)
