"""What ``rebuilder.variant`` stands for: defaults that files and the command line then change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {},
    "stable": {
        "mfm": {"loss_on": "hidden", "mask": "exact", "gradient_budget": 0.5},
        "rebuilder": {"peri_norm": True, "depth_scaling": True, "readout": 2},
        "optim": {"rebuilder_base_width": 512},
    },
}
"""Settings by section that differ from the schema's defaults, which are the paper's. Where each comes from, and what a
run is without it, stands in docs/stability.md."""
