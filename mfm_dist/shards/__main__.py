"""Make and check shards: mfm-shards make DATA_SET [...], mfm-shards check DIR [...]

make: pack downloads or one's own images, or render the embedded scenes; check: verify every byte, image and label.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mfm_dist.config.arguments import Command, run_named
from mfm_dist.shards import check, make

COMMANDS: dict[str, Command] = {"make": make.main, "check": check.main}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_named(COMMANDS, __doc__, "mfm-shards", argv)


if __name__ == "__main__":
    sys.exit(main())
