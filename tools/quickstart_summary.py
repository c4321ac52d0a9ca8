#!/usr/bin/env python
"""The last three lines of the quickstart: the result, where to look, what to try next."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(run: Path) -> int:
    """Print the lines for a finished run."""
    scores = [json.loads(path.read_text()) for path in sorted((run / "eval").glob("step_*.json"))]
    first, last = scores[0], scores[-1]
    result = "there is nothing to score it with (data.validation=null)"
    if last["miou"] is not None and first["miou"] is not None:
        result = f"target mIoU {first['miou']:.1f} % at step 0, {last['miou']:.1f} % at step {last['step']}"
    print(f"Adapted to the camera streets without one of their labels: {result}.")
    print(f"Open {run}/report.html in a browser: curves, classes, and what student, teacher and Rebuilder see.")
    print(
        "Try next: make quickstart-source-only (the same without adaptation), or, after . .venv/bin/activate, any "
        "setting: mfm-train run.folder=runs/mine mfm.mask_ratio=0.6 (all settings: mfm-train --help)."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
