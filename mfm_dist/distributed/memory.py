"""What a rank holds of a run's state, by how it is cut: pure arithmetic, for plans made before anything is started.

``tools/bench_ranks.py`` counts the same in real processes; the formulas were checked against its records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mfm_dist.distributed.launch import Launch

STAGES = ("0", "1", "2", "3", "3_hpz")
"""ZeRO stages. 0 is DDP's as well; 3_hpz is ZeRO-3 with a second copy of the weights, cut within each node."""
GATHERED = 1_000_000_000
"""Elements: DeepSpeed's default of stage3_max_live_parameters and stage3_max_reuse_distance (0.19.8)."""


@dataclass(frozen=True, kw_only=True)
class StateSizes:
    """How large the state of a run is: elements, but for buffers."""

    groups: Sequence[Sequence[int]]
    """Of each trained parameter, by group of the optimiser."""
    teacher: Sequence[int]
    """Of each teacher parameter that follows one of the student's."""
    frozen: Sequence[int]
    """Of every other parameter: a frozen encoder and the teacher's copy of it, the initial encoder."""
    buffer_bytes: int
    moments: int
    """Tensors that the optimiser keeps of each parameter: 2 (AdamW) or 1 (SGD)."""

    @property
    def trained(self) -> list[int]:
        """Elements of each trained parameter."""
        return [numel for group in self.groups for numel in group]

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes that a checkpoint has, all fp32: student, teacher, Rebuilder, moments. The frozen are not counted."""
        return 4 * ((1 + self.moments) * sum(self.trained) + sum(self.teacher)) + self.buffer_bytes


@dataclass(frozen=True, kw_only=True)
class ZeroBuffers:
    """What of a DeepSpeed file decides how much ZeRO holds beside the state, in elements."""

    reduce_bucket: int = 50_000_000
    """``distributed.start.BUCKET``, and configs/deepspeed."""
    prefetch: int = 50_000_000
    live: int = GATHERED
    reuse: int = GATHERED

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ZeroBuffers:
        """Read the settings of a launch (``Launch.zero_settings``)."""
        default = cls()
        return cls(
            reduce_bucket=int(settings.get("reduce_bucket_size", default.reduce_bucket)),
            prefetch=int(settings.get("stage3_prefetch_bucket_size", default.prefetch)),
            live=int(settings.get("stage3_max_live_parameters", default.live)),
            reuse=int(settings.get("stage3_max_reuse_distance", default.reuse)),
        )


def stage_of(launch: Launch) -> str:
    """Return which of ``STAGES`` a launch trains at."""
    return "3_hpz" if launch.zero_settings.get("zero_hpz_partition_size", 1) > 1 else str(launch.zero_stage or 0)


def rank_bytes(
    sizes: StateSizes,
    *,
    stage: str,
    ranks: int,
    precision: str,
    node_ranks: int = 1,
    zero: ZeroBuffers = ZeroBuffers(),
    lean: bool = False,
) -> dict[str, int]:
    """Return bytes by component, of the rank that holds most, at the moment within a step when each is largest.

    Gradients at ZeRO 1 and 2 count whole parameters where a cut runs through one: DeepSpeed keeps the whole tensor
    alive. Before the exchange a backward holds whole gradients at ZeRO-1 and with ``memory.lean``. What ZeRO-3 gathers:
    all that is trained, if ``stage3_max_reuse_distance`` reaches from its forward to its backward, otherwise half that
    distance; while the teacher runs, what is prefetched.

    Args:
        stage: one of ``STAGES``.
        node_ranks: ranks of a node, which share the second copy of hpZ.
        precision: ``train.precision``.
    """
    weight = 2 if precision == "bf16_weights" else 4
    trained, teacher, frozen = sum(sizes.trained), sum(sizes.teacher), sum(sizes.frozen)
    if stage == "0":
        held = {"parameters": 4 * trained, "gradients": 4 * trained, "optimiser": 4 * sizes.moments * trained}
        return _rounded(held | {"teacher": 4 * teacher, "frozen": 4 * frozen, "buffers": sizes.buffer_bytes})
    held = {"buffers": sizes.buffer_bytes, "reduction_bucket": weight * zero.reduce_bucket}
    if stage in ("1", "2"):
        pieces = [_piece(sum(group), ranks) for group in sizes.groups]
        share = sum(pieces)
        touched = share if weight == 2 else _most_touched(sizes.groups, pieces, ranks)
        held |= {"parameters": weight * share * ranks, "gradients": 4 * touched}
        held |= {"teacher": weight * teacher, "frozen": weight * frozen}
        own_teacher = -(-teacher // ranks)
    else:
        share, own_teacher = _shards(sizes.trained, ranks), _shards(sizes.teacher, ranks)
        held |= {"parameters": weight * share, "gradients": 4 * share}
        held |= {"teacher": weight * own_teacher, "frozen": weight * _shards(sizes.frozen, ranks)}
        everything = trained + teacher + frozen
        largest = max([*sizes.trained, *sizes.teacher, *sizes.frozen])
        held["gathered_parameters"] = weight * _gathered(trained, everything, largest, zero)
        if stage == "3_hpz":
            held["hpz_copies"] = weight * -(-everything // node_ranks)
    held |= {"optimiser": 4 * sizes.moments * share, "master": 4 * share}
    if weight == 2:
        held["teacher"] += 4 * own_teacher
    if stage == "1" or lean:
        held["unreduced_gradients"] = max(0, weight * trained - held["gradients"] * (stage == "1"))
    return _rounded(held)


def exchanged_bytes(
    sizes: StateSizes, *, stage: str, ranks: int, precision: str, accumulation: int, zero: ZeroBuffers
) -> tuple[int, int]:
    """Return the bytes that a rank sends in one step: over all ranks, and, with hpZ, within the node alone.

    A ring sends (N - 1) / N of a tensor to gather it or to sum and scatter it, and twice that to sum it everywhere.
    DDP and ZeRO-1 sum once a step, ZeRO 2 and 3 after each micro-batch. DeepSpeed's ZeRO 1 and 2 sum everywhere
    (0.19.8), and gather the weights once a step. ZeRO-3 gathers everything in each forward, what is trained again in
    each backward unless it was kept, and scatters the gradient's sum; with hpZ all but a step's first gather of a
    weight stay within the node.
    """
    if ranks == 1:
        return 0, 0
    ring = (ranks - 1) / ranks
    weight = 2 if precision == "bf16_weights" else 4
    trained, teacher, frozen = sum(sizes.trained), sum(sizes.teacher), sum(sizes.frozen)
    if stage == "0":
        return round(2 * ring * 4 * trained), 0
    if stage in ("1", "2"):
        sums = 2 * weight * trained * (accumulation if stage == "2" else 1)
        published = weight * (trained + (teacher if weight == 2 else 0))
        return round(ring * (sums + published)), 0
    forward = weight * (trained + teacher + frozen)
    backward = 0 if zero.reuse >= 2 * trained else weight * trained
    first, again = forward, (accumulation - 1) * forward + accumulation * backward
    scattered = accumulation * weight * trained
    if stage == "3_hpz":
        return round(ring * (first + scattered)), round(ring * again)
    return round(ring * (first + again + scattered)), 0


def _piece(numel: int, ranks: int) -> int:
    """Return a rank's share of a flat group, which is padded to two elements a rank (DeepSpeed 0.19.8)."""
    return 2 * -(-numel // (2 * ranks))


def _shards(parameters: Sequence[int], ranks: int) -> int:
    """Sum a rank's shards at ZeRO-3, each rounded up."""
    return sum(-(-numel // ranks) for numel in parameters)


def _most_touched(groups: Sequence[Sequence[int]], pieces: Sequence[int], ranks: int) -> int:
    """Return the elements of all parameters of which the fullest rank has a piece, and of the padding."""
    total = np.zeros(ranks, dtype=np.int64)
    for group, piece in zip(groups, pieces, strict=True):
        ends = np.cumsum(group)
        cuts = np.minimum(piece * np.arange(ranks + 1), ends[-1])
        first = np.searchsorted(ends, cuts[:-1], side="right")
        last = np.searchsorted(ends, cuts[1:], side="left")
        starts = np.concatenate([[0], ends])
        whole = np.where(cuts[1:] > cuts[:-1], starts[np.minimum(last + 1, len(ends))] - starts[first], 0)
        total += whole + piece - np.diff(cuts)
    return int(total.max())


def _gathered(trained: int, everything: int, largest: int, zero: ZeroBuffers) -> int:
    """Return the most elements that are gathered at a time at ZeRO-3."""
    ahead = min(zero.prefetch, zero.live) + largest
    if zero.reuse >= 2 * trained:
        return max(trained, min(everything, ahead))
    return min(everything, zero.reuse // 2 + ahead)


def _rounded(held: Mapping[str, float]) -> dict[str, int]:
    return {name: int(size) for name, size in held.items() if size}
