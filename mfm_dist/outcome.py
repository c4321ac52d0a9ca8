"""outcome.json: how the last start of a run ended, for scripts that cannot see a rank's exit code.

``accelerate launch`` turns every exit code of a rank into 1.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from mfm_dist.storage import write_atomically

OUTCOME = "outcome.json"


def write_outcome(folder: Path, *, code: int, reason: str, step: int) -> None:
    """Say how it ended. A full disk must not hide the reason, which the console tells too.

    Args:
        folder: the run folder.
        step: global batches consumed, -1 if training did not begin.
    """
    text = json.dumps({"code": code, "reason": reason, "step": step, **whose()}) + "\n"
    with suppress(OSError):
        write_atomically(folder / OUTCOME, text)


def whose() -> dict[str, str]:
    """Which Slurm job says it, if any: one that is refused the folder of another leaves its word there too."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"job": job} if job else {}
