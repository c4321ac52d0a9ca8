"""What a run will need on so many GPUs: memory, exchange, time, by stated formulas (``plan_command`` states them).

The state is cut as ``distributed.memory`` says; what is computed is counted on fake tensors (``kernels``), or timed,
where the plan is for CPUs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

from mfm_dist.build import build_train_module, classes_without_data
from mfm_dist.config.schema import RunConfig
from mfm_dist.config.shipped import find_shipped
from mfm_dist.distributed.launch import Launch
from mfm_dist.distributed.memory import STAGES, StateSizes, ZeroBuffers, exchanged_bytes, rank_bytes, stage_of
from mfm_dist.distributed.teacher import update_teacher
from mfm_dist.errors import ConfigError
from mfm_dist.optim import build_optimizer, state_sizes
from mfm_dist.profiling.counting import build_without_storage, count_step, without_weights
from mfm_dist.profiling.kernels import Count, count_kernels, roofline_ms
from mfm_dist.profiling.step import random_batch
from mfm_dist.storage import read_json


@dataclass(frozen=True)
class Card:
    """A GPU, of NVIDIA's data sheets."""

    gib: float
    """Memory that a process can have, about."""
    watts: float
    """At most."""
    nvlink: float
    """GB/s to the other GPUs of its node, one way."""


GPUS = {"a100": Card(39, 400, 300), "h100": Card(78, 700, 450), "h200": Card(139, 700, 450)}
"""The kinds whose arithmetic ``kernels.CARDS`` has."""
ADAPTER = 25.0
"""GB/s between nodes where nothing else is said: one adapter of 200 Gb/s for all GPUs of a node."""
LAUNCH_SECONDS = 8e-6
"""Host time of a kernel in eager PyTorch; 6 to 9 us are usual. Not measured on a GPU here."""
LEFT_FREE = 0.1
COPY_SPEED, WRITE_SPEED = 2e9, 0.5e9
"""Bytes/s of a rank: from the GPU to main memory; to disk, SHA-256 included."""
UPDATE = ("clipping", "optimiser", "EMA")
"""Parts of ``count_kernels`` that come once a step."""
MOST_GPUS = 1024
PAYS = 0.8
"""Share of the best GPU's work for which one more still pays."""
PRECISIONS = ("fp32", "bf16", "bf16_weights")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run is planned on."""

    nodes: int
    gpus: int
    """Of a node: one rank each."""
    gpu: str
    """A name of ``GPUS``, or cpu."""
    gib: float
    """Memory of a GPU."""
    within: float
    """GB/s that a rank sends to others of its node."""
    across: float
    """GB/s that leave a node."""

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.nodes * self.gpus


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a rank computes, and holds for the backward."""

    block_seconds: float
    """Forward and backward of a micro-batch."""
    update_seconds: float
    """Clipping, optimiser and EMA of a whole state."""
    saved_bytes: int
    cast_weight_bytes: int
    """Of ``saved_bytes``, copies of the weights in bf16."""


def work_of(config: RunConfig, cluster: Cluster) -> Work:
    """Count the step, and say how long it takes there. Raises ConfigError: networks that cannot be built."""
    precision: Literal["fp32", "bf16"] = "fp32" if config.train.precision == "fp32" else "bf16"
    counted_config = replace(config, train=replace(config.train, precision=precision))
    counted = count_kernels(counted_config)
    if cluster.gpu == "cpu":
        block, update = calibrate(config, cluster.gpus)
    else:
        parts = counted.parts.items()
        block = _gpu_seconds([part for name, part in parts if name not in UPDATE], cluster.gpu, precision)
        update = _gpu_seconds([part for name, part in parts if name in UPDATE], cluster.gpu, precision)
    return Work(
        block_seconds=block,
        update_seconds=update,
        saved_bytes=counted.saved_bytes,
        cast_weight_bytes=counted.cast_weight_bytes,
    )


def _gpu_seconds(parts: Sequence[Count], gpu: str, precision: str) -> float:
    bound = sum(roofline_ms(part, gpu, precision) for part in parts) / 1000
    return max(bound, LAUNCH_SECONDS * sum(part.kernels for part in parts))


def calibrate(config: RunConfig, processes: int) -> tuple[float, float]:
    """Time the network on this machine, in as many processes at once as a node has.

    Timed are crops of a sixteenth and a quarter of the pixels where those can be, and the run's own unless that takes
    too long: time then grows from the larger one as the FLOP do. That is too little, for maps that leave the caches
    cost more than their FLOP say.

    Returns:
        seconds of forward and backward of a micro-batch, and of clipping, optimiser and EMA.
    """
    config = without_weights(config)
    height, width = config.data.crop
    crops = [
        (height // n, width // n)
        for n in (4, 2, 1)
        if n == 1 or (min(height, width) >= 64 * n and height % (32 * n) == width % (32 * n) == 0)
    ]
    each = [replace(config, data=replace(config.data, crop=crop)) for crop in crops]
    flop = [sum(term.flop for term in count_step(one).values()) for one in each]
    blocks: list[float] = []
    updates: list[float] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for number, one in enumerate(each):
            if number == 2 and (1 + TIMED) * blocks[1] * flop[2] / flop[1] > LONGEST_SECONDS:
                return blocks[1] + (blocks[1] - blocks[0]) * (flop[2] - flop[1]) / (flop[1] - flop[0]), updates[1]
            found = list(pool.map(_timed_step, [one] * processes))
            blocks.append(max(block for block, _ in found))
            updates.append(max(update for _, update in found))
    return blocks[-1], updates[-1]


TIMED = 3
"""Steps, after one more. The fastest counts: others may use the machine."""
LONGEST_SECONDS = 60.0
"""For the steps of a crop; a longer one is inferred."""


def _timed_step(config: RunConfig) -> tuple[float, float]:
    """Time one process's micro-batch and update on a CPU, in seconds."""
    torch.set_num_threads(config.train.threads)
    module = build_train_module(config, classes_without_data(config))
    optimizer = build_optimizer(module, config.optim)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    pairs = list(module.teacher_pairs())
    blocks, updates = [], []
    for number in range(1 + TIMED):
        batch = random_batch(config, number)
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision != "fp32"):
            output = module(batch, config.mfm.loss_weight)
        output.total.backward()
        computed = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_teacher(pairs, torch.tensor(1.0 - config.self_training.ema_decay))
        blocks.append(computed - began)
        updates.append(time.perf_counter() - computed)
    return min(blocks[1:]), min(updates[1:])


def zero_buffers(stage: str) -> ZeroBuffers:
    """Return what the shipped DeepSpeed file of a stage says; DeepSpeed's own and ours where there is none."""
    file = find_shipped(Path(f"configs/deepspeed/zero{stage}.json"))
    return ZeroBuffers.of(read_json(file)["zero_optimization"] if file.is_file() else {})


def stages_of(precision: str, cluster: Cluster) -> list[str]:
    """List the stages that this precision can be trained at there."""
    kept = STAGES if cluster.nodes > 1 and cluster.gpus > 1 else STAGES[:4]
    return [stage for stage in kept if precision != "bf16_weights" or stage[0] in "23"]


def memory(
    config: RunConfig, sizes: StateSizes, work: Work, cluster: Cluster, stage: str, precision: str
) -> dict[str, int]:
    """Return bytes of a rank by component; ``checkpoint_copy`` lies in main memory."""
    held = rank_bytes(
        sizes,
        stage=stage,
        ranks=cluster.ranks,
        node_ranks=cluster.gpus,
        precision=precision,
        zero=zero_buffers(stage),
        lean=config.memory.lean,
    )
    if config.memory.offload_optimizer and stage != "0":
        del held["optimiser"], held["master"]
    saved = work.saved_bytes - (work.cast_weight_bytes if precision == "bf16_weights" else 0)
    copy = -(-sizes.checkpoint_bytes // cluster.ranks) if config.checkpoint.background else 0
    return {**held, "activations": saved, "checkpoint_copy": copy}


def on_device(held: Mapping[str, int], cluster: Cluster) -> int:
    """Sum what lies in the GPU's memory, or in that of a CPU."""
    return sum(size for name, size in held.items() if name != "checkpoint_copy" or cluster.gpu == "cpu")


def fits(held: Mapping[str, int], cluster: Cluster) -> bool:
    """Tell whether a rank can hold this."""
    return on_device(held, cluster) <= (1 - LEFT_FREE) * cluster.gib * 2**30


def recommended(memories: Mapping[str, Mapping[str, int]], cluster: Cluster) -> str | None:
    """Return the first that fits of DDP, ZeRO-2 and ZeRO-3, which exchange more from one to the next.

    ZeRO-1 is not among them: it holds more than ZeRO-2, and exchanges less only where gradients add up over several
    micro-batches.
    """
    order = ("0", "2", "3_hpz", "3") if cluster.ranks > 1 else ("0", "2", "3")
    return next((stage for stage in order if stage in memories and fits(memories[stage], cluster)), None)


def step_of(
    config: RunConfig, sizes: StateSizes, work: Work, cluster: Cluster, stage: str, accumulation: int
) -> tuple[dict[str, float], float]:
    """Return the seconds of a step, by what they go to, and the GiB that a rank sends in it."""
    over_all, within = exchanged_bytes(
        sizes,
        stage=stage,
        ranks=cluster.ranks,
        precision=config.train.precision,
        accumulation=accumulation,
        zero=zero_buffers(stage),
    )
    compute = accumulation * work.block_seconds + work.update_seconds / (1 if stage == "0" else cluster.ranks)
    link = cluster.across if cluster.nodes > 1 else cluster.within
    exchange = over_all / (1e9 * link) + within / (1e9 * cluster.within)
    seconds = {"compute": compute, "exchange": exchange, "total": compute + exchange}
    return seconds, (over_all + within) / 2**30


def checkpoint_of(sizes: StateSizes, ranks: int) -> dict[str, float]:
    """Return size in GiB, and seconds that training stands still and that the write takes."""
    share = sizes.checkpoint_bytes / ranks
    return {
        "gib": sizes.checkpoint_bytes / 2**30,
        "stall_seconds": share / COPY_SPEED,
        "write_seconds": share / WRITE_SPEED,
    }


def hours_of(config: RunConfig, steps: float, step: float, stall: float) -> float:
    """Return how long a run takes, of so many steps of so many seconds."""
    return (steps * step + steps / config.checkpoint.every * stall) / 3600


def scaled(config: RunConfig, sizes: StateSizes, work: Work, cluster: Cluster) -> list[dict[str, Any]]:
    """Plan the same images on 1, 2, 4, ... GPUs, nodes being filled one after another."""
    rows: list[dict[str, Any]] = []
    blocks = config.blocks_per_step
    for gpus in (2**power for power in range(MOST_GPUS.bit_length())):
        there = replace(cluster, nodes=-(-gpus // cluster.gpus), gpus=min(gpus, cluster.gpus))
        precision = config.train.precision
        memories = {
            stage: memory(config, sizes, work, there, stage, precision) for stage in stages_of(precision, there)
        }
        stage = recommended(memories, there)
        row: dict[str, Any] = {"gpus": there.ranks, "stage": stage}
        if stage is not None:
            accumulation = max(1, -(-blocks // there.ranks))
            batch = accumulation * there.ranks * config.train.micro_batch
            steps = config.train.steps * config.train.global_batch / batch
            seconds, _ = step_of(config, sizes, work, there, stage, accumulation)
            stall = checkpoint_of(sizes, there.ranks)["stall_seconds"]
            hours = hours_of(config, steps, seconds["total"], stall)
            row |= {"global_batch": batch, "steps": round(steps), "step_seconds": seconds["total"], "hours": hours}
            row |= {"gpu_hours": hours * there.ranks, "kwh": _kwh(hours * there.ranks, cluster.gpu)}
        rows.append(row)
    return rows


def _kwh(gpu_hours: float, gpu: str) -> float | None:
    return GPUS[gpu].watts * gpu_hours / 1000 if gpu in GPUS else None


def pays_up_to(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the most GPUs that each still do ``PAYS`` of the work of one where a GPU does most; None if none fits."""
    possible = [row for row in rows if row["stage"] is not None]
    least = min((row["gpu_hours"] for row in possible), default=0.0)
    return max((row["gpus"] for row in possible if least >= PAYS * row["gpu_hours"]), default=None)


def make_plan(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """Plan a run, under the names that ``--json`` prints.

    Raises:
        ConfigError: networks that cannot be built, or a global batch that the ranks cannot share.
    """
    if problems := config.world_problems(cluster.ranks):
        raise ConfigError(problems)
    sizes = state_sizes(build_without_storage(config), config.optim)
    work, precision = work_of(config, cluster), config.train.precision
    by_precision = {
        kind: {stage: memory(config, sizes, work, cluster, stage, kind) for stage in stages_of(kind, cluster)}
        for kind in PRECISIONS
        if kind == precision or "fp32" not in (kind, precision)  # activations are those of the run's precision
    }
    memories = by_precision[precision]
    stage = recommended(memories, cluster)
    accumulation = config.blocks_per_step // cluster.ranks
    seconds, exchanged = step_of(config, sizes, work, cluster, stage or list(memories)[-1], accumulation)
    checkpoint = checkpoint_of(sizes, cluster.ranks)
    hours = hours_of(config, config.train.steps, seconds["total"], checkpoint["stall_seconds"])
    rows = scaled(config, sizes, work, cluster)
    return {
        "trained_parameters": sum(sizes.trained),
        "precision": precision,
        "nodes": cluster.nodes,
        "gpus": cluster.gpus,
        "gpu": cluster.gpu,
        "gpu_memory_gib": cluster.gib,
        "link_gb_s": {"within": cluster.within, "across": cluster.across},
        "memory_gib": {name: _gib(held) for name, held in memories.items()},
        "device_gib": {name: on_device(held, cluster) / 2**30 for name, held in memories.items()},
        "fits": {name: fits(held, cluster) for name, held in memories.items()},
        "memory_gib_by_precision": {
            kind: {name: _gib(held) for name, held in one.items()} for kind, one in by_precision.items()
        },
        "recommended_stage": stage,
        "step_seconds": seconds,
        "exchange_gib": exchanged,
        "checkpoint_gib": checkpoint["gib"],
        "checkpoint_seconds": {"stall": checkpoint["stall_seconds"], "write": checkpoint["write_seconds"]},
        "hours": hours,
        "gpu_hours": hours * cluster.ranks,
        "kwh": _kwh(hours * cluster.ranks, cluster.gpu),
        "scale": rows,
        "pays_up_to_gpus": pays_up_to(rows),
    }


def _gib(held: Mapping[str, int]) -> dict[str, float]:
    return {**{name: size / 2**30 for name, size in held.items()}, "total": sum(held.values()) / 2**30}


def does_not_fit(config: RunConfig, launch: Launch, gib: float) -> str | None:
    """Say what a rank would need, where that is more than a GPU of so many GiB has; None where it fits."""
    ranks, node_ranks = launch.world_size, launch.local_world_size
    there = Cluster(nodes=ranks // node_ranks, gpus=node_ranks, gpu="h100", gib=gib, within=1, across=1)
    sizes, precision = state_sizes(build_without_storage(config), config.optim), config.train.precision
    held = memory(config, sizes, work_of(config, there), there, stage_of(launch), precision)
    if fits(held, there):
        return None
    needs = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in held.items() if size >= 2**28)
    return (
        f"this will hardly fit: {on_device(held, there) / 2**30:.1f} GiB a GPU ({needs}), which has {gib:.1f}, "
        f"of which {LEFT_FREE:.0%} is left free; mfm-profile plan says what each ZeRO stage and precision needs"
    )
