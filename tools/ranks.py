"""Starts a tool's own processes: the ranks of a measurement, as ``accelerate launch`` starts those of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfm_dist.errors import ConfigError

LAUNCH_FILES = Path(__file__).parent.parent / "configs" / "accelerate"
MINUTES = 20
"""A start that takes longer than this hangs."""
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run_ranks(script: Path, arguments: Sequence[str], *, launch: str, processes: int) -> Any:
    """Run ``script --worker FILE arguments`` on so many CPU processes; return what rank 0 wrote to FILE, as JSON.

    Args:
        launch: a file of configs/accelerate, by its name without the ending.

    Raises:
        ConfigError: with the end of what the processes said, if they did not end well.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        command += ["--config_file", str(LAUNCH_FILES / f"{launch}.yaml"), "--num_processes", str(processes)]
        command += ["--main_process_port", "0", str(script), "--worker", str(answer), *arguments]
        done = subprocess.run(
            command,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * MINUTES,
            check=False,
        )
        if done.returncode != 0:
            how = f"{launch}, {processes} processes, ended with code {done.returncode}"
            raise ConfigError(f"{how}:\n{done.stdout[-3000:]}")
        return json.loads(answer.read_text())
