#!/usr/bin/env python
"""``mfm-profile plan`` from a clone in which nothing is installed: python tools/plan.py"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is searched, not the one above it
from mfm_dist.profiling.plan_command import main

if __name__ == "__main__":
    sys.exit(main())
