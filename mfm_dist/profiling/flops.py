"""Count parameters and operations of a run: mfm-profile flops mfm.enabled=true

Three tables: the segmentor's forward and the Rebuilder's forward, by module, for one image; and the whole training
step by loss term. MAC is one multiply-add, which is what fvcore counts; FLOP is twice that. Without --config the
network is the published one, MiT-B5 with the DAFormer decoder at 512x512. No weights are read and no data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mfm_dist.config.arguments import add_run_arguments, image_size
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.errors import EXIT_DONE, tell_user_errors
from mfm_dist.profiling.counting import (
    ForwardCost,
    TermCost,
    build_without_storage,
    count_forward,
    count_step,
    rebuilder_inputs,
    torch_mac,
    with_zeros,
)
from mfm_dist.profiling.records import write_record
from mfm_dist.train_module import TrainModule

RULE = (
    "forward: multiply-adds of convolutions and matrix products; backward: twice the forward of what is trained (one\n"
    "product for the gradient of each factor), nothing for the teacher. Not counted: recomputation, augmentation,\n"
    "losses, norms, optimiser, EMA."
)


def measure(config: RunConfig, size: tuple[int, int]) -> dict[str, Any]:
    """Make all counts, as plain numbers under the names that the JSON file has.

    Args:
        config: of the run.
        size: height and width of the image whose segmentation is counted.
    """
    module = build_without_storage(config)
    result: dict[str, Any] = {
        "size": list(size),
        "crop": list(config.data.crop),
        "segmentor": _segmentor(module, size),
        "rebuilder": _rebuilder(module, config.data.crop),
        "step": {
            "micro_batch": config.train.micro_batch,
            "micro_batches": config.blocks_per_step,
            "terms": {name: _term(cost) for name, cost in count_step(config).items()},
        },
    }
    flop = sum(term["flop"] for term in result["step"]["terms"].values())
    result["step"]["flop_micro_batch"] = flop
    result["step"]["flop_global_batch"] = flop * config.blocks_per_step
    return result


def _segmentor(module: TrainModule, size: tuple[int, int]) -> dict[str, Any]:
    counted = count_forward(with_zeros(module.student), torch.zeros(1, 3, *size))
    return _forward(counted, torch_mac(module.student, torch.empty(1, 3, *size, device="meta")))


def _rebuilder(module: TrainModule, crop: tuple[int, int]) -> dict[str, Any] | None:
    if module.rebuilder is None:
        return None
    image = torch.empty(1, 3, *crop, device="meta")
    last, maps, mask = rebuilder_inputs(module.student, module.rebuilder, image, module.config.mfm)
    counted = count_forward(with_zeros(module.rebuilder), last, maps, mask)
    by_torch = torch_mac(module.rebuilder, last.to("meta"), [feature.to("meta") for feature in maps], mask)
    return _forward(counted, by_torch)


def _forward(counted: ForwardCost, by_torch: int) -> dict[str, Any]:
    return {
        **asdict(counted.total),
        "flop": counted.total.flop,
        "fvcore_total": counted.fvcore_total,
        "torch_counter_flop": 2 * by_torch,
        "operators": dict(counted.operators),
        "unsupported": dict(counted.unsupported),
        "modules": {name: {**asdict(cost), "flop": cost.flop} for name, cost in counted.modules.items()},
    }


def _term(cost: TermCost) -> dict[str, Any]:
    return {"forward_mac": dict(cost.forward), "backward_mac": dict(cost.backward), "flop": cost.flop}


def forward_lines(title: str, found: Mapping[str, Any], depth: int) -> Iterator[str]:
    """Show one forward as a table by module, and what must be known to read it."""
    yield f"\n{title}"
    yield f"{'module':<44} {'parameters':>12} {'GMAC':>10} {'GFLOP':>10} {'other, G':>10}"
    for name, cost in found["modules"].items():
        level = name.count(".") + 1 if name else 0
        if level > depth or not (cost["parameters"] or cost["mac"] or cost["other"]):
            continue
        label = "  " * level + (name.rpartition(".")[2] or "all")
        figures = f"{cost['mac'] / 1e9:10.3f} {cost['flop'] / 1e9:10.3f} {cost['other'] / 1e9:10.3f}"
        yield f"{label:<44} {cost['parameters']:12,} {figures}"
    shares = sorted(found["operators"].items(), key=lambda item: -item[1])
    yield "fvcore by operator, G: " + ", ".join(f"{name} {number / 1e9:.3f}" for name, number in shares)
    total, reference = 2 * found["fvcore_total"] / 1e9, found["torch_counter_flop"] / 1e9
    yield (
        f"check: torch's counter gives {reference:.3f} GFLOP, ours / torch's = {found['flop'] / 1e9 / reference:.4f}; "
        f"2 x fvcore's sum (GMAC + other) = {total:.3f}, {total / reference:.4f} of torch's"
    )
    missing = ", ".join(f"{name} ({calls} calls)" for name, calls in found["unsupported"].items())
    yield f"operators that nothing counts: {missing or 'none'}"


def step_lines(step: Mapping[str, Any], crop: Sequence[int]) -> Iterator[str]:
    """Show the training step as a table by term."""
    images = step["micro_batch"]
    yield f"\n3. training step, {images} source and {images} target images of {crop[0]}x{crop[1]} (one micro-batch)"
    terms = step["terms"]
    parts = list(dict.fromkeys(part for term in terms.values() for part in term["forward_mac"]))
    columns = [*(f"{part}, GMAC" for part in parts), "forward, GFLOP", "backward, GFLOP", "sum, GFLOP"]
    yield f"{'term':<22}" + "".join(f"{column:>17}" for column in columns)
    for name, term in terms.items():
        forward, backward = (2 * sum(term[key].values()) for key in ("forward_mac", "backward_mac"))
        figures = [*(term["forward_mac"].get(part, 0) for part in parts), forward, backward, term["flop"]]
        yield f"{name:<22}" + "".join(f"{figure / 1e9:17.3f}" for figure in figures)
    total = step["flop_micro_batch"]
    whole = [""] * (len(columns) - 1)
    yield f"{'all':<22}" + "".join(f"{text:>17}" for text in whole) + f"{total / 1e9:17.3f}"
    if "mfm" in terms:
        without = total - terms["mfm"]["flop"]
        yield f"the MFM term adds {100 * terms['mfm']['flop'] / without:.1f} % to the other terms' {without / 1e9:.3f}"
    yield f"a step of train.global_batch ({step['micro_batches']} micro-batches): {step['flop_global_batch'] / 1e9:.3f}"
    yield RULE


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="mfm-profile flops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser, "the published network")
    parser.add_argument("--size", type=image_size(1), metavar="HxW", help="of the segmented image (default: data.crop)")
    parser.add_argument("--depth", type=int, default=2, help="levels of modules to show (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all counts here")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    size = arguments.size or config.data.crop
    found = measure(config, size)
    model = config.model
    print(f"{model.backbone} {model.backbone_options or ''} + {model.decoder} {model.decoder_options or ''}")
    if model.pretrained or model.weights:
        print("model.pretrained and model.weights are ignored: counts depend on shapes alone")
    segmentor = f"1. segmentor, forward, one image of {size[0]}x{size[1]}, evaluation mode"
    print(*forward_lines(segmentor, found["segmentor"], arguments.depth), sep="\n")
    if found["rebuilder"] is None:
        print("\n2. Rebuilder: none in this configuration")
    else:
        title = f"2. Rebuilder, forward, one image of {found['crop'][0]}x{found['crop'][1]}"
        print(*forward_lines(title, found["rebuilder"], arguments.depth), sep="\n")
    print(*step_lines(found["step"], found["crop"]), sep="\n")
    if arguments.json:
        command = ["-m", "mfm_dist.profiling", "flops", *(sys.argv[1:] if argv is None else argv)]
        write_record(arguments.json, command, ("torch", "timm", "fvcore"), **found)
    return EXIT_DONE
