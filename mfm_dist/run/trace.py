"""A chrome trace of some steps of a run, by ``log.profile``: what the CPU and the GPU of rank 0 did when."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mfm_dist.config.schema import ProfileSection


class StepTrace:
    """Records the steps that ``log.profile`` names, once in a start of the run; does nothing on other ranks."""

    def __init__(self, settings: ProfileSection, folder: Path, *, enabled: bool, say: Callable[[str], object]) -> None:
        self.settings = settings
        self.folder = folder
        self._say = say
        self._left = settings.steps if enabled else 0
        self._profiler: profile | None = None

    def before_step(self, step: int) -> None:
        """Begin to record where it is time, and end after as many steps as were asked for.

        Args:
            step: global batches consumed so far.
        """
        if self._profiler is not None:
            self._left -= 1
            if self._left == 0:
                self.close()
        elif self._left and step >= self.settings.start:
            self._first = step
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def close(self) -> None:
        """Write what was recorded, also of a run that ends amid it. A full disk ends no run: it says so."""
        if self._profiler is None:
            return
        profiler, self._profiler, self._left = self._profiler, None, 0
        path = self.folder / f"trace_{self._first:08d}.json.gz"
        unfinished = path.with_name(f".{path.name}")  # the ending makes it compressed
        try:
            profiler.stop()
            profiler.export_chrome_trace(str(unfinished))
            os.replace(unfinished, path)
        except (OSError, RuntimeError) as error:
            self._say(f"{path} could not be written: {error}")
        else:
            self._say(f"trace of steps from {self._first} on: {path}; open it in ui.perfetto.dev or chrome://tracing")
