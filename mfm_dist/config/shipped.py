"""Files that come with the package: ``configs/`` and ``slurm/``, beside it in a clone, inside it once installed.

python -m mfm_dist.config.shipped [PATH]     where a file or folder of them is, to copy it or to hand it on

A path such as ``configs/quickstart.yaml`` means the file in the working folder if there is one, else the one that is
shipped; paths inside configurations and launch files too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mfm_dist.errors import EXIT_DONE, ConfigError, tell_user_errors

PACKAGE = Path(__file__).parents[1]
PACKED = PACKAGE / "_shipped"
"""Where setup.py puts them into a wheel."""
SHIPPED = PACKED if PACKED.is_dir() else PACKAGE.parent
FOLDERS = ("configs", "slurm")


def find_shipped(path: Path) -> Path:
    """Return the path itself where something is there; else that of what is shipped under it; else the path itself."""
    if path.parts[:1] not in [(folder,) for folder in FOLDERS] or ".." in path.parts or path.exists():
        return path
    shipped = SHIPPED / path
    return shipped if shipped.exists() else path


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m mfm_dist.config.shipped", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", nargs="?", type=Path, metavar="PATH", help="such as configs or slurm/train_mfm.sh")
    path: Path | None = parser.parse_args(argv).path
    if path is None:
        files = (file for folder in FOLDERS for file in (SHIPPED / folder).rglob("*") if file.is_file())
        print(*sorted(str(file.relative_to(SHIPPED)) for file in files), sep="\n")
    elif (found := find_shipped(path)).exists():
        print(found)
    else:
        raise ConfigError(f"{path} is neither here nor shipped; without PATH, all that is shipped is listed")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
