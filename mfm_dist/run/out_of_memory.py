"""A run that its GPU's memory does not hold ends on all ranks, with one message that names what would need less."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import EXIT_OUT_OF_MEMORY, EndedByPeerError, OutOfMemoryError, first_line
from mfm_dist.run.folder import RunFolder
from mfm_dist.run.watchdog import Watchdog
from mfm_dist.storage import write_atomically

FOLDER = "out_of_memory"
"""In the run folder: a file for each rank that ran out, with what the allocator held then."""


@contextmanager
def ending_out_of_memory(run: RunFolder, engine: Engine, watchdog: Watchdog) -> Iterator[None]:
    """Make an end for all ranks of one rank's end for want of memory, within the watchdog's next look.

    Raises:
        OutOfMemoryError: on the first rank that ran out, which speaks for all.
        EndedByPeerError: on any other rank, in place of what it met with because its peers are gone.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            place = watchdog.report()
            snapshot = write_snapshot(run.path, engine, error, place.place())
            if watchdog.end_all(EXIT_OUT_OF_MEMORY):
                where = f"rank {engine.rank} in {place.place()}"
                reason = f"{where} ran out of memory: {first_line(error)}"
                RunFolder(run.path, writes=True).event("out_of_memory", step=place.step, reason=reason)
                tips = "; ".join(what_needs_less(engine.config, engine.device, evaluating=place.phase == "evaluation"))
                raise OutOfMemoryError(
                    f"{reason}\nWhat needs less and is not on: {tips}. The same command goes on from the last "
                    f"checkpoint; what memory held: {snapshot}"
                ) from error
        if (code := watchdog.told_to_end()) is not None:
            raise EndedByPeerError(code) from error
        raise


def what_needs_less(config: RunConfig, device: torch.device, *, evaluating: bool) -> list[str]:
    """Name settings that are not on and need less memory, those first that cost least.

    Args:
        evaluating: whether memory ran out in an evaluation, which most of them do not change.
    """
    graph = "train.cuda_graph=false (a captured micro-batch keeps its memory, in evaluations too)"
    found = [graph] if config.train.cuda_graph else []
    if evaluating:
        return [
            *found,
            "a smaller eval.resize, which changes the scores",
            "processes that do not share their GPU with others",
        ]
    memory, train = config.memory, config.train
    if train.precision == "fp32" and device.type == "cuda":
        found.append("train.precision=bf16")
    if not memory.lean:
        found.append("memory.lean=true (the same training, one loss term at a time)")
    if not memory.checkpoint_backbone:
        found.append("memory.checkpoint_backbone=true (computes the encoder's blocks twice)")
    if config.mfm.enabled and config.mfm.use_rebuilder and not memory.checkpoint_rebuilder:
        found.append("memory.checkpoint_rebuilder=true (the same of the Rebuilder's)")
    found.append("more processes under ZeRO-2 or 3 (which share the optimiser's state, and gradients or weights)")
    if not memory.offload_optimizer:
        found.append("memory.offload_optimizer=true (ZeRO 1 to 3)")
    smaller = f"train.micro_batch={train.micro_batch // 2} or " if train.micro_batch > 1 else ""
    return [*found, f"in a new run, for it is other training, {smaller}a smaller data.crop"]


def write_snapshot(folder: Path, engine: Engine, error: Exception, place: str) -> Path:
    """Write what the allocator of this rank holds, as JSON; a full disk must not hide the reason."""
    on_gpu = engine.device.type == "cuda"
    content = {
        "rank": engine.rank,
        "place": place,
        "error": str(error),
        "summary": torch.cuda.memory_summary(engine.device).splitlines() if on_gpu else [],
        "segments": torch.cuda.memory_snapshot() if on_gpu else [],
    }
    path = folder / FOLDER / f"rank_{engine.rank:05d}.json"
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1, default=str) + "\n")
    return path
