"""What a run says of its steps: the numbers of metrics.jsonl, and the lines that a person sees."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mfm_dist.distributed.engine import Engine


class StartClock:
    """Measures what a start of a run takes, from the birth of the process on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By what they went to, in order."""
        self._since = process_began()

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
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime, the 22nd field (man 5 proc)
    except (OSError, ValueError, IndexError):
        return time.clock_gettime(CLOCK)


class StepLog:
    """Collects what every rank knows of its steps, and gives one record of them all."""

    def __init__(self, engine: Engine, *, images_per_step: int) -> None:
        """
        Args:
            images_per_step: source and target images of a global batch.
        """
        self.engine = engine
        self.images_per_step = images_per_step
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
        seconds = time.perf_counter() - self._since
        vector = torch.stack([*losses.values(), *measured.values()])
        waited = torch.tensor([self._waited / seconds], device=vector.device)
        squares = self.engine.update_squares("rebuilder")
        *means, data_wait_fraction = self.engine.mean(torch.cat([vector, squares.to(vector), waited])).tolist()
        means, squares_of_updates = means[:-3], [mean * self.engine.world_size for mean in means[-3:]]
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
        record["images_per_second"] = self.images_per_step * (step - self._step) / seconds
        record["data_wait_fraction"] = data_wait_fraction
        record["memory_gib"] = peak_memory_gib(self.engine.device)
        record |= {f"start_seconds/{name}": seconds for name, seconds in self.start_seconds.items()}
        self.start_seconds = {}
        self.begin(step)
        return record

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


def peak_memory_gib(device: torch.device) -> float:
    """Measure the peak GPU memory of this process, or its peak resident memory on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
        if bar and self.enabled and sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Count one step."""
        if self.bar is not None:
            self.bar.update()

    def show(self, record: Mapping[str, Any]) -> None:
        """Show the figures of one line of metrics.jsonl."""
        losses = {name.removeprefix("loss/"): value for name, value in record.items() if name.startswith("loss/")}
        text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        if self.bar is not None:
            self.bar.set_postfix_str(f"{text} {record['images_per_second']:.1f} images/s")
            return
        now, step = time.perf_counter(), record["step"]
        remaining = (now - self.started[0]) / max(step - self.started[1], 1) * (self.steps - step)
        self.line(
            f"step {step}/{self.steps}  {text}  {record['images_per_second']:.1f} images/s  "
            f"{int(remaining) // 60}:{int(remaining) % 60:02d} left"
        )

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
