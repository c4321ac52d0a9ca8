#!/usr/bin/env python
"""What each rank holds of a run's state, by stage and precision: python tools/bench_ranks.py [overrides]

Each case is a start of real processes over gloo on CPUs that trains two steps on random pictures. Counted are live
tensors, each storage once, on the rank that holds most: after the second backward, before the step, and after the step
and the teacher's update. State is parameters, gradients, optimiser (Adam's two moments), its fp32 master, and teacher;
everything else that is alive counts as buffers, by name. What exists only within a backward (parameters that ZeRO-3
gathers) is sampled from a thread of its own, so its peak is a lower bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_dist.build import build_train_module, classes_without_data
from mfm_dist.config.loader import changed_keys, load_config, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.deepspeed_engine import parameter_shape
from mfm_dist.distributed.start import start_engine
from mfm_dist.errors import EXIT_DONE, tell_user_errors
from mfm_dist.optim import build_optimizer
from mfm_dist.run.signals import end_process
from mfm_dist.schedules import ema_decay_at
from mfm_dist.storage import write_atomically

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is searched, not the one above it
from mfm_dist.config.arguments import add_run_arguments, config_arguments
from mfm_dist.profiling.records import write_record
from mfm_dist.profiling.step import random_batch
from tools.live_tensors import GatheredPeak, StateCount
from tools.ranks import run_ranks

DEFAULT = [
    "model.backbone=convnext_base", "model.decoder=daformer", "model.decoder_options={width: 472}", "data.crop=64x64",
    "mfm.enabled=true", "rebuilder.width=128", "rebuilder.heads=4", "rebuilder.grid=2", "train.micro_batch=1",
    "train.global_batch=1",
]  # fmt: skip
"""Without --config: 100 M parameters in the student, in 374 tensors, on pictures so small that a step takes seconds."""
STEPS = 2
"""The first makes the optimiser's state."""
LAUNCHES = ("cpu_ddp", "cpu_zero0", "cpu_zero1", "cpu_zero2", "cpu_zero3")
PRECISIONS = ("fp32", "bf16", "bf16_weights")
BYTES = {
    "fp32": {"trainable": 20, "teacher": 4},
    "bf16": {"trainable": 20, "teacher": 4},
    "bf16_weights": {"trainable": 18, "teacher": 6},
}
"""Of a parameter under ZeRO 1 to 3, over all ranks together. Trainable: parameter (4, or 2 in bf16), master 4,
gradient 4, Adam 8; DDP and ZeRO-0 have no master. Teacher: 4, or with bf16 weights 4 and a bf16 copy of 2."""
PROMISE = 1.1
"""ZeRO-3 holds at most this much of the total over the number of ranks, beside buffers."""


def cases(launches: Sequence[str], precisions: Sequence[str], processes: int) -> list[tuple[str, str, int]]:
    """List (launch file, precision, processes) of every start: twice as many processes also at ZeRO-3."""
    found = [(launch, precision, processes) for precision in precisions for launch in launches]
    found += [("cpu_zero3", precision, 2 * processes) for precision in precisions if "cpu_zero3" in launches]
    return [case for case in found if case[1] != "bf16_weights" or case[0] in ("cpu_zero2", "cpu_zero3")]


def count_state(config: RunConfig) -> dict[str, Any] | None:
    """Train and count, in a rank. Rank 0 returns what the fullest rank holds, the others None."""
    engine = start_engine(config)
    module = build_train_module(config, classes_without_data(config))
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    teacher = sum(p.numel() for _, p in module.teacher_pairs())
    engine.prepare(module, build_optimizer(module, config.optim))
    count = StateCount(engine, module)
    found: dict[str, Any] = {}
    peak = GatheredPeak(module)
    for number in range(STEPS):
        batches = [random_batch(config, STEPS * number + i).to(engine.device) for i in range(engine.accumulation)]
        with peak:
            for batch in batches:
                engine.forward_backward(batch, config.mfm.loss_weight)
        del batches, batch
        found["after backward"] = count.now()
        engine.step()
        engine.update_teacher(ema_decay_at(engine.applied, 0.99))
        found["after step"] = count.now()
    found["gathered_peak_bytes"] = peak.bytes
    found["largest_parameter_bytes"] = max(4 * parameter_shape(p).numel() for p in module.parameters())
    everyone = engine.gather_objects(found)
    rank = max(range(len(everyone)), key=lambda r: sum(everyone[r]["after backward"]["state"].values()))
    engine.close()
    if not engine.is_main:
        return None
    return {"trainable": trainable, "teacher": teacher, "fullest_rank": rank, **everyone[rank]}


def total_bytes(launch: str, precision: str, *, trainable: int, teacher: int) -> int:
    """Return the state of one run over all ranks together, every number once."""
    each = BYTES[precision]
    master = 0 if launch in ("cpu_ddp", "cpu_zero0") else 4
    return trainable * (each["trainable"] - 4 + master) + teacher * each["teacher"]


def with_ratios(case: tuple[str, str, int], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a case as the JSON file has it: what was counted, the total, and how much of it a rank holds."""
    launch, precision, processes = case
    total = total_bytes(launch, precision, trainable=found["trainable"], teacher=found["teacher"])
    state = max(sum(found[when]["state"].values()) for when in ("after backward", "after step"))
    return {
        "launch": launch,
        "precision": precision,
        "processes": processes,
        "total_bytes": total,
        "rank_bytes": state,
        "of_total": state / total,
        "of_share": state * processes / total,
        **found,
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown, one line a case, MiB."""
    roles = list(results[0]["after backward"]["state"])
    heads = ["launch", "ranks", "precision", *roles, "state", "of total", "x N", "after step", "buffers"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for one in results:
        state, buffers = one["after backward"]["state"], one["after backward"]["buffers"]
        held = {name: size for name, size in buffers.items() if size >= 2**20}
        gathered = f"; gathered within {one['gathered_peak_bytes'] / 2**20:.0f}" if one["gathered_peak_bytes"] else ""
        cells = [one["launch"].removeprefix("cpu_"), str(one["processes"]), one["precision"]]
        cells += [f"{size / 2**20:.0f}" for size in (*state.values(), sum(state.values()))]
        cells += [f"{one['of_total']:.3f}", f"{one['of_share']:.3f}"]
        cells += [f"{sum(one['after step']['state'].values()) / 2**20:.0f}"]
        cells += [", ".join(f"{name} {size / 2**20:.0f}" for name, size in held.items()) + gathered]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, " ".join(DEFAULT))
    parser.add_argument("--launch", nargs="*", choices=LAUNCHES, default=list(LAUNCHES), help="launch files (all)")
    parser.add_argument("--precision", nargs="*", choices=PRECISIONS, default=list(PRECISIONS), help="(all)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="ranks; ZeRO-3 also on 2 N (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    base = DEFAULT if arguments.config is None else []
    config = load_config(arguments.config, [*base, *arguments.overrides])
    if arguments.worker is not None:
        if (found := count_state(config)) is not None:
            write_atomically(arguments.worker, json.dumps(found))
        return EXIT_DONE
    results: list[dict[str, Any]] = []
    for launch, precision, processes in cases(arguments.launch, arguments.precision, arguments.processes):
        passed_on = [*config_arguments(arguments.config or ()), *arguments.overrides]
        passed_on += [f"train.precision={precision}"]
        passed_on += [f"train.global_batch={config.train.micro_batch * processes}"]
        found = run_ranks(Path(__file__), passed_on, launch=launch, processes=processes)
        results.append(with_ratios((launch, precision, processes), found))
        one = results[-1]
        print(f"{launch} {precision} {processes}: {one['rank_bytes'] / 2**20:.0f} MiB, ", end="")
        print(f"{one['of_share']:.3f} of total / N", flush=True)
        if arguments.json:  # after each case: a later one may not fit the machine
            write_record(
                arguments.json,
                ["tools/bench_ranks.py", *(sys.argv[1:] if argv is None else argv)],
                ("torch", "deepspeed", "accelerate", "timm"),
                changed=changed_keys(to_tree(RunConfig()), config),
                bytes_a_parameter=BYTES,
                results=results,
            )
    first = results[0]
    print(f"trainable {first['trainable']:,}, teacher {first['teacher']:,}; MiB of one rank after the backward")
    print(table(results))
    worst = max((one["of_share"] for one in results if one["launch"] == "cpu_zero3"), default=None)
    if worst is not None:
        print(f"ZeRO-3, largest share x N: {worst:.3f} (promised: at most {PROMISE})")
    return EXIT_DONE


if __name__ == "__main__":
    end_process(main())
