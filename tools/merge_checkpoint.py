#!/usr/bin/env python
"""Merge a checkpoint into one safetensors file of whole tensors: python tools/merge_checkpoint.py CHECKPOINT FILE

CHECKPOINT is a folder checkpoints/step_XXXXXXXX of a run, every byte of which is verified. FILE gets student/NAME,
teacher/NAME, rebuilder/NAME (parameters; BatchNorm statistics are averaged over ranks) and optimizer/PARAMETER/KEY, or
what --part names. One tensor at a time is in memory. For the segmentor alone there is mfm-export.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mfm_dist.checkpoint.contents import PARTS
from mfm_dist.checkpoint.files import open_checkpoint
from mfm_dist.checkpoint.pieces import write_tensors
from mfm_dist.errors import EXIT_DONE, ConfigError, StorageError, tell_user_errors
from mfm_dist.storage import atomic_file


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("output", type=Path, metavar="FILE", help="a new .safetensors file")
    parser.add_argument("--part", choices=PARTS, help="only this part, under the names that it has there")
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        raise ConfigError(f"{arguments.output}: there is something of that name; choose another")
    if not arguments.checkpoint.is_dir():
        raise ConfigError(f"{arguments.checkpoint}: no folder; give one of a run's checkpoints/step_XXXXXXXX")
    checkpoint = open_checkpoint(arguments.checkpoint)
    prefix = f"{arguments.part}/" if arguments.part else ""
    specs = {name.removeprefix(prefix): spec for name, spec in checkpoint.specs.items() if name.startswith(prefix)}
    if not specs:
        raise ConfigError(f"{checkpoint.path} has no {arguments.part}")
    try:
        with atomic_file(arguments.output) as file:
            write_tensors(file, specs, (tensor for _, tensor in checkpoint.stream(prefix)))
    except OSError as error:
        raise StorageError(f"{arguments.output} cannot be written: {error}") from error
    size = sum(spec.nbytes for spec in specs.values()) / 2**30
    print(f"{arguments.output}: {len(specs)} tensors of step {checkpoint.progress.step}, {size:.3f} GiB")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
