#!/usr/bin/env python
"""Memory of the Rebuilder's two variants by grid: python tools/bench_rebuilder.py [--json FILE]

The peak of one forward and backward of a Rebuilder alone, above its weights: activations, gradients and temporaries, as
tools/bench_memory.py counts them. Its maps are those of MiT-B5 for a crop of 512 x 512 pixels, random, with gradients;
two images; fp32. Nothing is read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mfm_dist.config.arguments import whole
from mfm_dist.config.variants import VARIANTS
from mfm_dist.errors import EXIT_DONE
from mfm_dist.methods.mfm import draw_mask
from mfm_dist.models.rebuilder import Rebuilder
from mfm_dist.profiling.records import write_record
from mfm_dist.profiling.step import cpu_name, peak_gib

CROP = 512
CHANNELS, STRIDES = (64, 128, 320, 512), (4, 8, 16, 32)
"""Maps of MiT-B5."""


def peak_mib(variant: str, *, grid: int, depth: int, width: int, ratio: float, device: torch.device) -> float:
    """Measure one forward and backward, MiB."""
    torch.manual_seed(0)
    rebuilder = Rebuilder(
        channels=CHANNELS, strides=STRIDES, embed_channels=CHANNELS[-1], width=width, depth=depth, grid=grid,
        **VARIANTS[variant].get("rebuilder", {}),
    ).to(device)  # fmt: skip
    maps = [
        torch.randn(2, channels, CROP // stride, CROP // stride, device=device, requires_grad=True)
        for channels, stride in zip(CHANNELS, STRIDES, strict=True)
    ]
    mask = draw_mask(2, rebuilder.grid, ratio, torch.Generator().manual_seed(0), exact=True)

    def step() -> None:
        total = torch.stack([out.square().mean() for out in rebuilder(maps[-1], maps, mask)]).sum()
        total.backward()

    peak = peak_gib(step, device) * 1024
    assert all(p.grad is not None for p in rebuilder.parameters())
    return peak


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all, under the names that the JSON file has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"width": arguments.width, "device": device}
    peaks = [
        {"grid": grid, "depth": depth, "ratio": ratio}
        | {name: peak_mib(name, grid=grid, depth=depth, ratio=ratio, **sizes) for name in VARIANTS}
        for grid, depth, ratio in product(arguments.grids, arguments.depths, arguments.ratios)
    ]
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    return {"device": name, "width": arguments.width, "peak_mib": peaks}


def table(peaks: Sequence[dict[str, Any]]) -> str:
    """Return Markdown, one line a size."""
    lines = ["| grid | depth | mask ratio | paper, MiB | stable, MiB | of paper |", "|---|---|---|---|---|---|"]
    for one in peaks:
        paper, stable = one["paper"], one["stable"]
        sizes = f"{one['grid']} x {one['grid']} | {one['depth']} | {one['ratio']}"
        lines.append(f"| {sizes} | {paper:.0f} | {stable:.0f} | {stable / paper:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=whole(1), nargs="+", default=[16, 32, 64], metavar="N", help="16 32 64")
    parser.add_argument("--depths", type=whole(1), nargs="+", default=[2, 8], metavar="N", help="blocks (2 8)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4, 0.8], metavar="X", help="mask ratios (.4 .8)")
    parser.add_argument("--width", type=whole(16), default=512, metavar="N", help="channels (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here")
    arguments = parser.parse_args(argv)
    found = measure(arguments)
    print(table(found["peak_mib"]))
    if arguments.json:
        command = ["tools/bench_rebuilder.py", *(sys.argv[1:] if argv is None else argv)]
        write_record(arguments.json, command, ("torch",), **found)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
