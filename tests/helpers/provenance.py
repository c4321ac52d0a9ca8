"""What a line of a campaign's record says about where it comes from."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "accelerate", "deepspeed", "safetensors", "numpy", "pillow", "pyyaml")


def provenance(tree: Path) -> dict[str, Any]:
    """Name the commit of a clone (with a plus sign: changed since), the packages, the machine and the time."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=tree, capture_output=True, text=True, check=True
    )
    return {
        "commit": described.stdout.strip(),
        "packages": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(timezone.utc).isoformat("T", "seconds"),
    }
