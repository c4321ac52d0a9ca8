"""What a run will need, before it is paid for: mfm-profile plan CONFIG.yaml [options] [section.key=value ...]

Memory of a rank by component at every ZeRO stage, what fits, exchange, step time, checkpoint, hours and energy, and
where more GPUs stop paying. Nothing is trained and no GPU is needed. Files end in .yaml or .yml; all in any order.

memory      the state as ZeRO cuts it, and what is saved for the backward, counted on fake tensors. A tenth of the GPU
            is left to CUDA, NCCL and gaps, which has not been measured. checkpoint_copy lies in main memory
compute     of a micro-batch: 8 us a kernel, or the time that its bytes and FLOP take by the card's data sheet, if that
            is longer; then clipping, optimiser and EMA alike. With --gpu cpu the network is timed here, at two smaller
            crops. ZeRO-3's own work in Python comes on top
exchange    what a rank sends (rings) over the bandwidth of the link; nothing overlaps
checkpoint  each rank's share, copied at 2 GB/s while training waits, then hashed and written at 0.5 GB/s
hours       steps x (compute + exchange) and the stalls of checkpoints; no evaluation, no start, no wait for data
GPUs        from one on: as many images, in larger batches where there are more ranks than micro-batches
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_dist.config.arguments import whole
from mfm_dist.config.loader import load_config
from mfm_dist.errors import EXIT_DONE, ConfigError, CorruptFileError, first_line, tell_user_errors
from mfm_dist.profiling.plan import ADAPTER, GPUS, PAYS, Cluster, make_plan
from mfm_dist.storage import read_json

COMPONENTS = (
    *("parameters", "gradients", "optimiser", "master", "teacher", "frozen", "buffers", "activations"),
    *("reduction_bucket", "unreduced_gradients", "gathered_parameters", "hpz_copies", "checkpoint_copy", "total"),
)
"""What memory goes to, in the order that is shown."""


def lines_of(plan: Mapping[str, Any]) -> Iterator[str]:
    """Show a plan to a person."""
    kind = f"{plan['nodes']} x {plan['gpus']} {plan['gpu']}"
    yield f"{plan['trained_parameters'] / 1e6:.1f} M trained parameters, {plan['precision']}, on {kind}"
    for precision, stages in plan["memory_gib_by_precision"].items():
        names = [name for name in COMPONENTS if any(name in held for held in stages.values())]
        own = precision == plan["precision"]
        yield f"\nGiB of a rank, {precision}" + (" (the run's)" if own else "")
        yield f"{'':<22}" + "".join(f"{'ZeRO-' + stage:>12}" for stage in stages)
        for name in names:
            yield f"{name:<22}" + "".join(f"{held.get(name, 0):>12.2f}" for held in stages.values())
        if own:
            said = ("yes" if plan["fits"][stage] else "NO" for stage in stages)
            yield f"{'fits ' + format(plan['gpu_memory_gib'], 'g') + ' GiB':<22}" + "".join(f"{x:>12}" for x in said)
    stage, seconds = plan["recommended_stage"], plan["step_seconds"]
    yield (
        "\nnothing fits: memory.lean, memory.checkpoint_*, bf16_weights, more GPUs"
        if stage is None
        else (f"\nrecommended: {'DDP' if stage == '0' else 'ZeRO-' + stage}")
    )
    yield (
        f"step {seconds['total']:.3f} s: compute {seconds['compute']:.3f}, exchange {seconds['exchange']:.3f} "
        f"({plan['exchange_gib']:.2f} GiB a rank)"
    )
    stall = plan["checkpoint_seconds"]
    yield (
        f"checkpoint {plan['checkpoint_gib']:.2f} GiB; training waits {stall['stall']:.2f} s, "
        f"written in {stall['write']:.1f} s"
    )
    yield f"{plan['hours']:.1f} hours, {plan['gpu_hours']:.0f} GPU-hours" + _energy(plan["kwh"])
    heads = {"GPUs": 6, "ZeRO": 6, "batch": 6, "steps": 7, "step, s": 8, "hours": 8, "GPU-hours": 10, "kWh": 8}
    yield "\n" + " ".join(f"{head:>{width}}" for head, width in heads.items())
    for row in plan["scale"]:
        if row["stage"] is None:
            yield f"{row['gpus']:>6}  does not fit"
            continue
        kwh = "" if row["kwh"] is None else f"{row['kwh']:.0f}"
        yield (
            f"{row['gpus']:>6} {row['stage']:>6} {row['global_batch']:>6} {row['steps']:>7} "
            f"{row['step_seconds']:>8.3f} {row['hours']:>8.2f} {row['gpu_hours']:>10.0f} {kwh:>8}"
        )
    yield "A batch above train.global_batch is another training, of fewer steps."
    if plan["pays_up_to_gpus"] is not None:
        yield f"Up to {plan['pays_up_to_gpus']} GPUs each does at least {PAYS:.0%} of what one does at best."


def _energy(kwh: float | None) -> str:
    return "" if kwh is None else f", {kwh:.0f} kWh of GPUs at their full power"


def draw(plan: Mapping[str, Any], file: Path) -> None:
    """Draw hours and GPU-hours over GPUs, as the ending of the file's name says (png, svg, pdf)."""
    from matplotlib.figure import Figure

    rows = [row for row in plan["scale"] if row["stage"] is not None]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("hours", "gpu_hours"):
        axes.loglog([row["gpus"] for row in rows], [row[name] for row in rows], "o-", label=name.replace("_", "-"))
    axes.set(xlabel="GPUs", title=f"{plan['trained_parameters'] / 1e6:.0f} M parameters on {plan['gpu']}")
    axes.legend()
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def read_link(text: str) -> tuple[float | None, float]:
    """Read ``--link``: GB/s between nodes, or within the only one; or what preflight wrote, with both.

    Raises:
        ConfigError: it is neither.
    """
    try:
        if (value := float(text)) > 0:
            return None, value
        raise ConfigError(f"--link {text}: GB/s must be above 0")
    except ValueError:
        pass
    try:
        found = read_json(Path(text))
        within, across = float(found["within_gb_s"]), float(found["across_gb_s"])
        if min(within, across) > 0:
            return within, across
        what = "no bandwidth above 0"
    except (OSError, CorruptFileError, ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
    raise ConfigError(f"--link {text} is neither GB/s nor the link.json of a preflight ({what})")


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """Put together what the arguments say. Raises ConfigError."""
    card = GPUS.get(arguments.gpu)
    within = card.nvlink if card else ADAPTER
    across = ADAPTER
    if arguments.link:
        given, across = read_link(arguments.link)
        within = given or (across if arguments.nodes == 1 else within)
    gib = arguments.gpu_memory or (card.gib if card else float("inf"))
    return Cluster(nodes=arguments.nodes, gpus=arguments.gpus, gpu=arguments.gpu, gib=gib, within=within, across=across)


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="mfm-profile plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | section.key=value", help="later ones win")
    parser.add_argument("--nodes", type=whole(1, 1024), default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--gpus", type=whole(1, 64), default=1, metavar="G", help="of a node (%(default)s)")
    parser.add_argument("--gpu", choices=[*GPUS, "cpu"], default="h100", help="(%(default)s)")
    parser.add_argument("--gpu-memory", type=_gib_above_0, metavar="GiB", help="instead of the card's own")
    parser.add_argument("--link", metavar="GB/s|FILE", help="between nodes; FILE: link.json, which preflight writes")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw hours over GPUs (.png, .svg, .pdf)")
    arguments = parser.parse_intermixed_args(argv)
    files = [Path(word) for word in arguments.words if word.endswith((".yaml", ".yml")) and "=" not in word]
    overrides = [word for word in arguments.words if Path(word) not in files]
    plan = make_plan(load_config(files or None, overrides), cluster_of(arguments))
    if arguments.plot:
        draw(plan, arguments.plot)
    print(json.dumps(_without_infinity(plan), indent=1) if arguments.json else "\n".join(lines_of(plan)))
    return EXIT_DONE


def _gib_above_0(text: str) -> float:
    if not 0 < (value := float(text)) < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1,000,000")
    return value


def _without_infinity(value: Any) -> Any:
    """Return the same with null for infinite numbers, which JSON has none of."""
    if isinstance(value, dict):
        return {key: _without_infinity(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_infinity(one) for one in value]
    return None if value == float("inf") else value
