"""One HTML page about a run, or about several side by side: mfm-report RUN [RUN ...] [--output FILE]

The page is one file that opens offline. Everything that a run folder lacks is named on the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mfm_dist.errors import EXIT_DONE, StorageError, tell_user_errors
from mfm_dist.report.page import render
from mfm_dist.report.run import read_runs
from mfm_dist.storage import write_atomically


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(argv)
    folders: list[Path] = arguments.runs
    output: Path = arguments.output or folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")
    page = render(read_runs(folders), images=arguments.images)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page)
    except OSError as error:
        raise StorageError(f"{output} cannot be written ({error}); choose another place with --output") from error
    print(f"{output} ({len(page.encode()) / 2**20:.1f} MiB)")
    return EXIT_DONE


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="mfm-report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders; the first gives the order")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html, or comparison.html, in the first run folder"
    )
    parser.add_argument(
        "--images", type=_count, default=4, metavar="N", help="validation images to show, 0 for none (default: 4)"
    )
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of images, 0 or more, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
