#!/usr/bin/env python
"""A state of many parameters, saved and loaded by ranks under ZeRO-3: memory above what training holds, and seconds.

accelerate launch --config_file configs/accelerate/cpu_zero3.yaml -m tests.campaign.large_state [--parameters 2e8]
    [--saves at_once background] [--alone] [--precision fp32]

The module is a stack of square layers that trains nothing; weights and AdamW's moments are random. Saved at once and in
the background, loaded, and compared by their bits; beside it, unless ``--alone``, DeepSpeed's own save_checkpoint and
torch's distributed checkpoint (whose metadata are pickled) of the same pieces. Rank 0 appends one line to the record:
of each figure the largest of any rank.

Anonymous memory counts what glibc keeps of what was freed; with MALLOC_MMAP_THRESHOLD_=65536 in the environment it
keeps nothing, and the figures are of what lives.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch import Tensor, nn

from mfm_dist.checkpoint.contents import load_state
from mfm_dist.checkpoint.files import open_checkpoint, step_folder
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.checkpoint.writer import CheckpointWriter
from mfm_dist.config.loader import load_config
from mfm_dist.distributed.audit import fingerprint
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.start import start_engine
from mfm_dist.run.signals import end_process
from mfm_dist.storage import JsonLines
from tests.helpers.classes import CLASSES

RECORD = Path("docs/benchmarks/campaign_large_state.jsonl")
WIDTH = 2048
SAMPLE_SECONDS = 0.005
SAVES = ("at_once", "background")


class Stack(nn.Module):
    """What a checkpoint looks for in a module: a student alone."""

    classes, teacher, rebuilder = CLASSES, None, None

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.student = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(max(1, parameters // WIDTH**2))))

    def teacher_pairs(self) -> list[Any]:
        return []


class Memory:
    """Anonymous memory of this process in GiB, and its peak inside a block."""

    peak = 0.0

    @staticmethod
    def now() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) / 2**20

    @contextmanager
    def watched(self) -> Iterator[None]:
        self.peak, ended = self.now(), Event()

        def sample() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                self.peak = max(self.peak, self.now())

        thread = Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def random_state(parameters: int, precision: str) -> tuple[Engine, Any]:
    """Give an engine with a module of about as many parameters, after a made-up step."""
    settings = ["train.micro_batch=1", "train.global_batch=2", f"train.precision={precision}"]
    engine = start_engine(load_config(None, settings))
    module = Stack(parameters)
    groups = [{"params": list(module.parameters()), "part": "all", "lr": 1e-3, "base_lr": 1e-3}]
    engine.prepare(module, torch.optim.AdamW(groups))
    engine.reset_optimizer(["exp_avg", "exp_avg_sq"], applied=1)
    for state in engine.optimizer.optimizer.state.values():  # type: ignore[attr-defined]
        state["exp_avg"].normal_()
        state["exp_avg_sq"].uniform_()
    return engine, module


def own_pieces(engine: Engine, module: nn.Module) -> dict[str, Tensor]:
    """Every piece of the state that this rank holds."""
    found = {}
    for name, parameter in module.named_parameters():
        pieces = {"": engine.parameter_pieces(parameter), **engine.optimizer_pieces(parameter)}
        found |= {f"{name}/{key}/{engine.rank}": values for key, held in pieces.items() for _, values in held}
    return found


def bits(engine: Engine, module: nn.Module) -> list[Tensor]:
    return [fingerprint(values) for values in own_pieces(engine, module).values()]


def measure(engine: Engine, module: Any, folder: Path, *, saves: Sequence[str], alone: bool) -> dict[str, Any]:
    """Measure all of one rank."""
    memory, found = Memory(), dict[str, Any]()
    before = bits(engine, module)
    found["held_gib"] = memory.now()

    def timed(name: str, work: Callable[[], object]) -> None:
        engine.barrier()
        with memory.watched():
            started = time.perf_counter()
            work()
            found[f"{name}_seconds"] = time.perf_counter() - started
        found[f"{name}_peak_gib"] = memory.peak

    writes = CheckpointWriter(folder, engine, engine.config, data_fingerprints={}, written=lambda _: None)

    def save(way: str, step: int) -> None:
        engine.config.checkpoint.background = way == "background"
        started = time.perf_counter()
        writes.save(module, Progress(step=step, applied=1))
        found[f"stall_{way}_seconds"] = time.perf_counter() - started
        writes.wait()

    for step, way in enumerate(saves, 1):
        timed("save" if way == "at_once" else "save_background", partial(save, way, step))
    writes.close()
    places = {"": step_folder(folder, len(saves))}
    pieces = own_pieces(engine, module)
    if not alone:
        places |= {"deepspeed_": folder / "deepspeed", "torch_": folder / "torch"}
        timed("deepspeed_save", lambda: engine._wrapped.save_checkpoint(str(folder), tag="deepspeed"))  # type: ignore[operator]
        timed("torch_save", lambda: torch_checkpoint.save(dict(pieces), checkpoint_id=places["torch_"]))
        timed("torch_load", lambda: torch_checkpoint.load(dict(pieces), checkpoint_id=places["torch_"]))
    for name in list(pieces):
        pieces.pop(name).zero_()  # and held by nothing else: a load makes the optimiser's anew
    timed("load", lambda: found.update(bytes_read=load_state(open_checkpoint(places[""]), module, engine)))
    found["same_bits"] = all(map(torch.equal, before, bits(engine, module)))
    for name, where in places.items():
        found[f"{name}size_gib"] = sum(file.stat().st_size for file in where.rglob("*")) / 2**30
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure in the ranks of a launch; 0 if every bit came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=2e8, metavar="N", help="about as many (%(default)g)")
    parser.add_argument(
        "--saves",
        nargs="+",
        choices=SAVES,
        default=list(SAVES),
        help="how to save, in this order; of the same ones the last counts (each once)",
    )
    parser.add_argument("--alone", action="store_true", help="nothing of DeepSpeed or torch beside it")
    parser.add_argument("--precision", choices=("fp32", "bf16_weights"), default="fp32", help="%(default)s")
    parser.add_argument("--work", type=Path, default=Path("runs/campaign"), help="for the checkpoints (%(default)s)")
    parser.add_argument("--record", type=Path, default=RECORD, help="appended to (%(default)s)")
    arguments = parser.parse_args(argv)
    engine, module = random_state(int(arguments.parameters), arguments.precision)
    arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work, ignore_cleanup_errors=True) as own:
        folder = Path(engine.gather_objects(own)[0])
        of_rank = measure(engine, module, folder, saves=arguments.saves, alone=arguments.alone)
        everyone = engine.gather_objects(of_rank)
        engine.barrier()
    line = {name: max(one[name] for one in everyone) for name in everyone[0] if name != "same_bits"}
    line = {name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()}
    line |= {
        "parameters": sum(p.ds_numel for p in module.parameters()), "processes": engine.world_size,
        "precision": arguments.precision,
        "malloc_mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
        "same_bits": all(one["same_bits"] for one in everyone),
        "packages": {name: version(name) for name in ("torch", "deepspeed")},
        "date": datetime.now(timezone.utc).isoformat("T", "seconds"),
    }  # fmt: skip
    if engine.is_main:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        JsonLines(arguments.record).append(line)
        print(json.dumps(line), flush=True)
    engine.close()
    return 0 if line["same_bits"] else 1


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
