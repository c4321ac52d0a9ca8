#!/usr/bin/env python
"""Probe the Rebuilder of a run on validation images, and write RUN/probe.json, which the report shows.

How much of the hidden part it rebuilds, against no parameters at all; where the gradient of MFM's loss points, seen
from the true labels; how sure and how right the teacher is. docs/methods.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfm_dist.build import open_folder
from mfm_dist.distributed.arithmetic import set_fp32_math
from mfm_dist.errors import EXIT_DONE, ConfigError, StorageError, tell_user_errors
from mfm_dist.inference.evaluation import OneProcess
from mfm_dist.inference.open_run import open_train_module
from mfm_dist.inference.probe import probe, read_batches, why_no_probe
from mfm_dist.run.folder import PROBE
from mfm_dist.storage import write_atomically


def probe_run(run: Path) -> dict[str, Any]:
    """Probe the newest checkpoint of a run; samples that cannot be used are named on stderr.

    Raises:
        UserError: ConfigError or DataError with what is missing.
    """
    module, checkpoint = open_train_module(run)
    data = module.config.data
    if data.validation is None:
        raise ConfigError(f"there is nothing to probe: {why_no_probe(module.config)}")
    reader = open_folder(data, data.validation, module.classes if data.classes else None)
    if reader.classes is None or (difference := module.classes.difference(reader.classes)):
        raise ConfigError(f"{data.validation} is not labelled with the classes of {run}: {difference or 'no labels'}")
    batches, bad = read_batches(reader, data)
    for sample in bad:
        print(f"left out: {sample}", file=sys.stderr)
    set_fp32_math(module.config.train.fp32_math)
    found = probe(module.to(OneProcess().device), batches, checkpoint)
    return {"step": checkpoint.progress.step, **found}


def show(found: dict[str, Any]) -> str:
    """Return what was found, for people."""
    lines = [f"step {found['step']}, {found['images']} validation images", ""]
    lines.append(f"{'agreement with the pseudo-label':<34} visible  hidden")
    for name, at in found["agreement"].items():
        lines.append(f"  {name:<32} {number(at['visible']):>7} {number(at['hidden']):>7}")
    lines.append(f"  {'rebuilder - diffusion':<32} {'':>7} {number(found['rebuilder_minus_diffusion'], '+.3f'):>7}")
    lines += ["", "cosine of MFM's gradient to that of the true labels, 95 %"]
    for name, at in found["alignment"].items():
        cosine, low, high = (number(at[key], "+.2f") for key in ("cosine", "low", "high"))
        lines.append(f"  {name:<32} {cosine:>7}  [{low}, {high}]")
    calibration = found["calibration"]
    rest = {
        "share of MFM's gradient through the Rebuilder": found["gradient_share"],
        "change of what is rebuilt, by one step": found["output_change"],
        "teacher: calibration error": calibration["expected_error"],
        "teacher: pseudo-weight": calibration["pseudo_weight"],
        "teacher: accuracy of the pseudo-label": calibration["accuracy"],
    }
    return "\n".join([*lines, "", *(f"{name:<46} {number(value):>6}" for name, value in rest.items())])


def number(value: float | None, form: str = ".3f") -> str:
    """Write a figure; a dash where there was nothing to measure."""
    return "-" if value is None else format(value, form)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder; its newest checkpoint is probed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    found = probe_run(arguments.run)
    text = json.dumps(found, indent=1, allow_nan=False)
    try:
        write_atomically(arguments.run / PROBE, text + "\n")
    except OSError as error:
        raise StorageError(f"{arguments.run / PROBE} cannot be written: {error}") from error
    print(text if arguments.json else show(found))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
