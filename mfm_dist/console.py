"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Console:
    """Rank 0's output; on other ranks every call does nothing."""

    def __init__(self, *, enabled: bool, steps: int, start: int) -> None:
        self.enabled = enabled
        self.steps = steps
        self.started = (time.perf_counter(), start)
        self.bar: tqdm[Any] | None = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update()

    def show(self, record: Mapping[str, Any]) -> None:
        """The figures of one line of metrics.jsonl."""
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
        """One line that stays."""
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
