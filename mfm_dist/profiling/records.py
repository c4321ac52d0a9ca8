"""The records that measurements leave: figures beside what they were made with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mfm_dist.storage import write_atomically


def write_record(path: Path, command: Sequence[str], packages: Sequence[str], **figures: Any) -> None:
    """Write figures as JSON, after the command that made them, the date, and the versions of these packages.

    Args:
        command: what Python was told to run, and its arguments.
    """
    record = {
        "command": ["python", *command],
        "date": date.today().isoformat(),
        "packages": {name: version(name) for name in packages},
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")
