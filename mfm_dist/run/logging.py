"""What a run says of its steps: the numbers of metrics.jsonl, and the lines that a person sees."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mfm_dist.distributed.engine import Engine


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
        self.begin(0)

    def begin(self, step: int) -> None:
        """Forget what was collected, and count from ``step`` and now on."""
        self._losses = RunningMean()
        self._waited = 0.0
        self._step, self._since = step, time.perf_counter()

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count the losses of one micro-batch."""
        self._losses.add(losses)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def no_training(self) -> Iterator[None]:
        """Leave the time spent inside, an evaluation's, out of the throughput."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def record(self, step: int) -> dict[str, Any]:
        """Take means over the steps since the last record and over ranks, in one all-reduce. Collective."""
        names, losses = self._losses.pop()
        seconds = time.perf_counter() - self._since
        waited = torch.tensor([self._waited / seconds], device=losses.device)
        *means, data_wait_fraction = self.engine.mean(torch.cat([losses, waited])).tolist()
        record: dict[str, Any] = {"step": step}
        record |= {
            name if name == "pseudo_weight" else f"loss/{name}": value for name, value in zip(names, means, strict=True)
        }
        record |= {f"grad_norm/{part}": float(norm) for part, norm in self.grad_norms.items()}
        record |= {f"lr/{group['name']}": group["lr"] for group in self.engine.optimizer.param_groups}
        record["images_per_second"] = self.images_per_step * (step - self._step) / seconds
        record["data_wait_fraction"] = data_wait_fraction
        record["memory_gib"] = peak_memory_gib(self.engine.device)
        self.begin(step)
        return record


class RunningMean:
    """Means of named scalars since the last ``pop``, kept on the device so that adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one observation of every name."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count += 1

    def pop(self) -> tuple[list[str], Tensor]:
        """Return names and the vector of their means, and start anew."""
        names = list(self._sums)
        means = torch.stack([self._sums[name] for name in names]) / max(self._count, 1)
        self._sums, self._count = {}, 0
        return names, means


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
