"""What a run says of its steps: the numbers of metrics.jsonl, and the lines that a person sees."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mfm_dist.distributed.engine import Engine
from mfm_dist.errors import CorruptFileError
from mfm_dist.run.cards import card_of, peak_flops
from mfm_dist.storage import OF_KERNEL, read_text


class StartClock:
    """Measures what a start of a run takes, from the birth of the process on; imports are done when this is made."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By what they went to, in order."""
        self._since = process_began()
        self.lap("imports")

    def lap(self, name: str) -> None:
        """Count the time since the last lap as this."""
        now = time.clock_gettime(CLOCK)
        self.seconds[name] = now - self._since
        self._since = now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())


CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""The one that Linux counts the starts of processes by."""


def process_began() -> float:
    """Return when this process began, by ``CLOCK``; now, where /proc does not say."""
    try:
        fields = read_text(Path("/proc/self/stat"), OF_KERNEL).rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime, the 22nd field (man 5 proc)
    except (OSError, CorruptFileError, ValueError, IndexError):
        return time.clock_gettime(CLOCK)


class StepLog:
    """Collects what every rank knows of its steps, and gives one record of them all."""

    def __init__(self, engine: Engine, *, images_per_step: int, count_flop: Callable[[], int] | None = None) -> None:
        """
        Args:
            engine: with the module prepared, whose forwards are timed.
            images_per_step: source and target images of a global batch.
            count_flop: counts the floating-point operations of a global batch. Called once, on rank 0 of a run on GPUs,
                with the first record, for it takes seconds.
        """
        self.engine = engine
        self.images_per_step = images_per_step
        self._count_flop = count_flop if engine.is_main and engine.device.type == "cuda" else None
        self._forwards = ForwardClock(engine.module, engine.device)
        self._flop: int | None = None
        self.grad_norms: Mapping[str, Tensor] = {}
        """Of the last step, by part."""
        self.start_seconds: dict[str, float] = {}
        """Of this start, by what they went to; the first record tells them."""
        self.begin(0)

    def begin(self, step: int) -> None:
        """Forget what was collected, and count from ``step`` and now on."""
        self._losses, self._measured = RunningMean(), RunningMean()
        self._map_norms: Tensor | None = None
        self._waited = 0.0
        self._forwards.clear()
        self._step, self._since = step, time.perf_counter()

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count the losses of one micro-batch, and what was measured of it: names with a ``/``."""
        self._losses.add({name: value for name, value in losses.items() if "/" not in name})
        self._measured.add({name: value for name, value in losses.items() if "/" in name})

    def measured_step(self, mfm_weight: float, map_norms: Tensor) -> None:
        """Note of the last step the weight of MFM and the gradients at the encoder's last map."""
        self._mfm_weight, self._map_norms = mfm_weight, map_norms

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        began = time.perf_counter()
        yield
        waited = time.perf_counter() - began
        if self.start_seconds:
            self.start_seconds.setdefault("first_batch", waited)
        self._waited += waited

    @contextmanager
    def no_training(self) -> Iterator[None]:
        """Leave the time spent inside, an evaluation's, out of the throughput."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def record(self, step: int) -> dict[str, Any]:
        """Take means over the steps since the last record and over ranks, in one all-reduce. Collective."""
        losses, measured = self._losses.pop(), self._measured.pop()
        seconds, steps, world_size = time.perf_counter() - self._since, step - self._step, self.engine.world_size
        vector = torch.stack([*losses.values(), *measured.values()])
        of_ranks = torch.zeros(world_size)  # each fills its own place, so the sum tells all of them apart
        of_ranks[self.engine.rank] = (self._waited + self._forwards.seconds()) / steps
        times = torch.cat([torch.tensor([self._waited / seconds]), of_ranks]).to(vector)
        squares = self.engine.update_squares("rebuilder").to(vector)
        found = self.engine.mean(torch.cat([vector, squares, times])).tolist()
        means, found = found[: len(vector)], found[len(vector) :]
        squares_of_updates, data_wait_fraction, own_times = [world_size * x for x in found[:3]], found[3], found[4:]
        record: dict[str, Any] = {"step": step}
        record |= {
            name if "/" in name or name == "pseudo_weight" else f"loss/{name}": value
            for name, value in zip([*losses, *measured], means, strict=True)
        }
        if self._map_norms is not None:
            record |= self._of_the_rebuilder(squares_of_updates)
        record |= {f"grad_norm/{part}": float(norm) for part, norm in self.grad_norms.items()}
        # Layers of one part share its name; the last one of them learns fastest, and stands for all.
        record |= {f"lr/{group['name']}": group["lr"] for group in self.engine.optimizer.param_groups}
        record["images_per_second"] = self.images_per_step * steps / seconds
        record["data_wait_fraction"] = data_wait_fraction
        record |= spread_of_ranks(own_times) | memory_gib(self.engine.device) | self._utilisation(seconds / steps)
        record |= {f"start_seconds/{name}": seconds for name, seconds in self.start_seconds.items()}
        self.start_seconds = {}
        self.begin(step)
        return record

    def _utilisation(self, seconds: float) -> dict[str, float]:
        """Say how many TFLOP/s a GPU made of what the networks need in a step, and of its highest rate, where known."""
        if self._count_flop is None:
            return {}
        if self._flop is None:
            self._flop = self._count_flop()
        flops = self._flop / seconds / self.engine.world_size
        card = card_of(torch.cuda.get_device_name(self.engine.device))
        train = self.engine.config.train
        peak = card and peak_flops(card, train.precision, tf32=train.fp32_math == "tf32")
        return {"tflops": flops / 1e12} | ({"mfu": flops / peak} if peak else {})

    def _of_the_rebuilder(self, squares: Sequence[float]) -> dict[str, float]:
        """Describe the last measured step: MFM's gradient and weight, and how far the Rebuilder went.

        Args:
            squares: as ``Engine.update_squares`` gives them, of all ranks.
        """
        assert self._map_norms is not None
        method, mfm = self._map_norms.tolist()
        found = {"mfm/grad_ratio": mfm / method if method else 0.0, "mfm/lambda_eff": self._mfm_weight}
        direction, update, weights = squares
        numel = sum(group["numel"] for group in self.engine.optimizer.param_groups if group["part"] == "rebuilder")
        if direction:
            found["rebuilder/update_rms"] = math.sqrt(direction / numel)
            found["rebuilder/update_over_weight"] = math.sqrt(update / weights)
        return found


class RunningMean:
    """Means of named scalars since the last ``pop``, kept on the device so that adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one observation of every name."""
        if not values:
            return
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count += 1

    def pop(self) -> dict[str, Tensor]:
        """Return the means by name, and start anew."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


class ForwardClock:
    """Times the forwards of a module: by events in the GPU's stream, which wait for nothing, or the host's clock.

    Of a step on several ranks they tell which one is slow: everything else waits for the others in between. Forwards in
    a CUDA graph are not timed: nobody may wait for an event that was captured with them.
    """

    KEPT = 1000
    """Newest forwards that the time of all is estimated from."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began: Any = None
        self.clear()
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def clear(self) -> None:
        """Forget all forwards."""
        self._spans: deque[tuple[Any, Any]] = deque(maxlen=self.KEPT)
        self._count = 0

    def seconds(self) -> float:
        """Return the time of all forwards since ``clear``; waits for the GPU to end the last one."""
        if not self._spans:
            return 0.0
        if self._on_gpu:
            self._spans[-1][1].synchronize()
            each = [began.elapsed_time(ended) / 1000 for began, ended in self._spans]
        else:
            each = [ended - began for began, ended in self._spans]
        return sum(each) / len(each) * self._count

    def _start(self, *_: Any) -> None:
        self._began = self._now()

    def _stop(self, *_: Any) -> None:
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            return
        self._spans.append((self._began, self._now()))
        self._count += 1

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def spread_of_ranks(own_times: Sequence[float]) -> dict[str, float]:
    """Name the rank that takes longest for its own part of a step, data and forward, and how far they lie apart.

    Args:
        own_times: by rank, in any unit.

    Returns:
        nothing of a single rank; ``rank_spread`` is slowest minus fastest, as a share of the mean.
    """
    if len(own_times) == 1:
        return {}
    slowest, mean = max(own_times), sum(own_times) / len(own_times)
    return {"slowest_rank": own_times.index(slowest), "rank_spread": (slowest - min(own_times)) / mean}


def memory_gib(device: torch.device) -> dict[str, float]:
    """Measure this process's peak in GiB: on a GPU allocated and reserved, since the last call; on a CPU resident."""
    if device.type == "cuda":
        found = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"memory_gib": found[0] / 2**30, "memory_reserved_gib": found[1] / 2**30}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


SPREAD_WORTH_A_WORD = 0.1
"""Of ``rank_spread``, from which the console names the slowest rank."""


class Console:
    """Rank 0's output; on other ranks every call does nothing."""

    def __init__(self, *, enabled: bool, steps: int) -> None:
        self.enabled = enabled
        self.steps = steps
        self.bar: tqdm[Any] | None = None
        self.begin(0, bar=False)

    def begin(self, step: int, *, bar: bool = True) -> None:
        """Count from ``step`` and now on."""
        self.started = (time.perf_counter(), step)
        if self.bar is not None:
            self.bar.n = step
        elif bar and self.enabled and sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Count one step."""
        if self.bar is not None:
            self.bar.update()

    def show(self, record: Mapping[str, Any]) -> None:
        """Show the figures of one line of metrics.jsonl."""
        losses = {name.removeprefix("loss/"): value for name, value in record.items() if name.startswith("loss/")}
        text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        speed = f"{record['images_per_second']:.1f} images/s"
        speed += f", {record['mfu']:.0%} MFU" if "mfu" in record else ""
        if record.get("rank_spread", 0.0) > SPREAD_WORTH_A_WORD:
            speed += f", rank {record['slowest_rank']} slowest (spread {record['rank_spread']:.0%})"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{text} {speed}")
            return
        now, step = time.perf_counter(), record["step"]
        remaining = (now - self.started[0]) / max(step - self.started[1], 1) * (self.steps - step)
        self.line(f"step {step}/{self.steps}  {text}  {speed}  {int(remaining) // 60}:{int(remaining) % 60:02d} left")

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
