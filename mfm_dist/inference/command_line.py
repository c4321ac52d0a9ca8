"""What the commands that use a trained segmentor ask for."""

from __future__ import annotations

import argparse
from pathlib import Path


def model_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of ``mfm-<command>``, which wants a run or an export."""
    parser = argparse.ArgumentParser(
        prog=f"mfm-{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, help="run folder; the student of its newest checkpoint is taken")
    model.add_argument("--model", type=Path, metavar="EXPORT", help="folder of an export")
    return parser
