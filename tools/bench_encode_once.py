#!/usr/bin/env python
"""One call of the encoder for all terms beside one each: python tools/bench_encode_once.py [--rounds N] [--json FILE]

Forward, backward and AdamW of MiT-B0 with the DAFormer decoder on 2 + 2 random images of 128 x 256, each method with
MFM, in turns on one thread. What is counted is the process's own time on the CPU, so that other work on the machine
matters little. On a GPU the gain is in kernels (mfm-profile kernels); a CPU launches none, and must not lose.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mfm_dist.build import build_train_module, classes_without_data
from mfm_dist.config.arguments import whole
from mfm_dist.config.loader import load_config
from mfm_dist.errors import EXIT_DONE
from mfm_dist.optim import build_optimizer
from mfm_dist.profiling.counting import blank_batch
from mfm_dist.profiling.records import write_record
from mfm_dist.profiling.step import cpu_name

NETWORK = [
    *("model.backbone=mit_b0", "model.decoder=daformer", "data.crop=128x256", "train.micro_batch=2"),
    *("mfm.enabled=true", "rebuilder.grid=4x8", "rebuilder.width=128", "rebuilder.heads=4", "mic.mask_block_pixels=32"),
]
METHODS = {
    "dacs": ["method.name=dacs"],
    "daformer": ["method.name=daformer"],
    "hrda": ["method.name=hrda"],
    "mic": ["method.name=mic", "mic.base_method=hrda"],
}
FORMS = ("auto", "never")


def measure(overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure a method under both forms; the first round of each is not counted."""
    modules = {}
    for form in FORMS:
        config = load_config(None, [*NETWORK, *overrides, f"train.encode_once={form}"])
        torch.manual_seed(0)
        modules[form] = build_train_module(config, classes_without_data(config))
    assert modules["auto"].encodes_once, "MiT has no BatchNorm"
    optimizers = {form: build_optimizer(module, module.config.optim) for form, module in modules.items()}
    generator = torch.Generator().manual_seed(0)

    def noise(values: torch.Tensor) -> torch.Tensor:
        most = 256 if values.dim() == 4 else 19
        return values if values.dtype == torch.bool else values.random_(0, most, generator=generator)

    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(rounds + 1):
        batch = blank_batch(modules["auto"].config, number).map(noise)
        for form in FORMS[:: 1 if number % 2 else -1]:
            began = time.process_time()
            modules[form](modules[form].draw(batch), 1.0).total.backward()
            optimizers[form].step()
            optimizers[form].zero_grad()
            seconds[form].append(time.process_time() - began)
    kept = {form: times[1:] for form, times in seconds.items()}
    ratios = [once / each for once, each in zip(kept["auto"], kept["never"], strict=True)]
    return {
        "cpu_seconds": {form: statistics.median(times) for form, times in kept.items()},
        "once_over_each_quartiles": statistics.quantiles(ratios, n=4),
        "rounds": kept,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "methods", nargs="*", choices=[*METHODS, []], metavar="METHOD", help=f"{', '.join(METHODS)}; all"
    )
    parser.add_argument("--rounds", type=whole(2), default=10, metavar="N", help="timed rounds (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here, every single time too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in arguments.methods or METHODS:
        found[name] = measure(METHODS[name], arguments.rounds)
        low, middle, high = found[name]["once_over_each_quartiles"]
        own = found[name]["cpu_seconds"]["auto"]
        print(
            f"{name:<9} {own:6.2f} s of CPU, one call over one each {middle:.3f} ({low:.3f} to {high:.3f})", flush=True
        )
        if arguments.json:
            command = ["tools/bench_encode_once.py", *(sys.argv[1:] if argv is None else argv)]
            write_record(arguments.json, command, ("torch", "timm"), device=cpu_name(), network=NETWORK, methods=found)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
