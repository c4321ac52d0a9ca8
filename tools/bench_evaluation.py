#!/usr/bin/env python
"""Time the evaluation of large pictures, part by part: python tools/bench_evaluation.py [--json FILE]

Embedded scenes of 1024 x 2048 pixels and the quickstart's network with its initial weights. "Before" is the form that
this one replaced, which stands here as a plain twin: one thread that reads, predicts and counts in turn. Both take
turns in every round, and their counts have to be equal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is searched, not the one above it
from mfm_dist.build import build_student
from mfm_dist.classes import IGNORE_INDEX, ClassSet
from mfm_dist.config.arguments import image_size, whole
from mfm_dist.config.loader import load_config
from mfm_dist.data.pipeline import EvaluationSet
from mfm_dist.data.reader import Sample, ShardReader
from mfm_dist.distributed.arithmetic import set_fp32_math
from mfm_dist.errors import EXIT_DONE
from mfm_dist.inference.evaluation import OneProcess, evaluate, evaluation_mode
from mfm_dist.inference.metrics import boundary_counts, boundary_width, confusion_matrix
from mfm_dist.inference.predict_labels import most_probable, predict_logits
from mfm_dist.models.layers import resize
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.profiling.records import write_record
from mfm_dist.profiling.step import cpu_name
from mfm_dist.shards.scene_shards import write_scenes

STRIDE = 4
"""Of the logits that are enlarged to the picture's size."""


def confusion_before(label: Tensor, prediction: Tensor, count: int) -> Tensor:
    """Pick out what is labelled, and count pairs of classes in 64 bits."""
    counts = label != IGNORE_INDEX
    pairs = label[counts].long() * count + prediction[counts].long()
    return torch.bincount(pairs, minlength=count**2).reshape(count, count)


def near_before(label: Tensor, width: int) -> Tensor:
    """Compare the lowest value of every square with its highest."""
    reduced = []
    for of_two in (torch.minimum, torch.maximum):
        values, side = label, 2 * width + 1
        for dim in (0, 1):
            length = 1
            while length < side:
                step = min(length, side - length)
                left = values.shape[dim] - step
                values = of_two(values.narrow(dim, 0, left), values.narrow(dim, step, left))
                length += step
        reduced.append(values)
    return F.pad(reduced[0] != reduced[1], [width] * 4, value=True)


def boundary_before(label: Tensor, prediction: Tensor, count: int) -> Tensor:
    """Count boundary pixels in three passes."""
    label, prediction = label.byte(), prediction.byte()
    prediction = prediction.masked_fill(label == IGNORE_INDEX, IGNORE_INDEX)
    width = boundary_width(label.shape[0], label.shape[1])
    of_label = label.masked_fill(~near_before(label, width), IGNORE_INDEX)
    of_prediction = prediction.masked_fill(~near_before(prediction, width), IGNORE_INDEX)
    of_both = of_label.masked_fill(of_label != of_prediction, IGNORE_INDEX)
    counts = [torch.bincount(part.flatten(), minlength=256)[:count] for part in (of_label, of_prediction, of_both)]
    return torch.stack(counts)


@torch.no_grad()
def evaluate_before(student: Segmentor, reader: ShardReader, ranks: OneProcess, count: int) -> Tensor:
    """Score all pictures one after another; return the confusion matrix."""
    confusion = torch.zeros(count, count, dtype=torch.int64)
    with evaluation_mode(student, ranks):
        for number in range(len(reader)):
            sample = reader.read(number)
            assert isinstance(sample, Sample)
            assert sample.label is not None
            prediction = predict_logits(student, sample.image, ranks.device).argmax(dim=1)[0].cpu()
            confusion += confusion_before(sample.label, prediction, count)
            boundary_before(sample.label, prediction, count)
    return confusion


def parts_of(reader: ShardReader, device: torch.device, count: int) -> dict[str, Callable[[], object]]:
    """Return the parts of scoring one picture, each as it was and as it is."""
    sample = reader.read(0)
    assert isinstance(sample, Sample)
    label = sample.label
    assert label is not None
    height, width = label.shape
    small = torch.randn(1, count, height // STRIDE, width // STRIDE, device=device)
    logits = resize(small, (height, width))
    wide = logits.argmax(dim=1)[0]
    narrow, here, before = wide.byte(), label.to(device), wide.cpu()
    return {
        "decode": lambda: reader.read(0),
        "resize": lambda: resize(small, (height, width)),
        "argmax, before": lambda: logits.argmax(dim=1)[0],
        "argmax": lambda: most_probable(logits[0]).byte(),
        "confusion, before": lambda: confusion_before(label, before, count),
        "confusion": lambda: confusion_matrix(here, narrow, count),
        "boundary, before": lambda: boundary_before(label, before, count),
        "boundary": lambda: boundary_counts(here, narrow, count),
    }


def seconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Time one call: by the clock, and what it costs: on a CPU that of this process, which other work disturbs less."""
    began = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, own = time.perf_counter() - began[0], time.process_time() - began[1]
    return wall, wall if device.type == "cuda" else own


def measure(images: int, size: tuple[int, int], rounds: int, workers: int) -> dict[str, Any]:
    """Measure all, medians over rounds, under the names that the JSON file has."""
    set_fp32_math("ieee")  # as a run's evaluation is by default
    ranks = OneProcess()
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(
            Path(folder), train=0, val=images, size=size, seed=0, shard_size=images, workers=1,
            report=lambda _: None, only=["camera_val"],
        )  # fmt: skip
        reader = ShardReader(Path(folder) / "camera_val")
        classes = reader.classes
        assert classes is not None
        torch.manual_seed(0)
        student = build_student(load_config([Path("configs/quickstart.yaml")], ["model.weights=null"]), classes)
        student.to(ranks.device)
        whole_ones = {
            "before": lambda: evaluate_before(student, reader, ranks, len(classes)),
            "now": lambda: evaluate_now(student, reader, ranks, workers, classes),
        }
        if not torch.equal(whole_ones["before"](), whole_ones["now"]()):
            raise AssertionError("both forms must count the same")
        works = {**parts_of(reader, ranks.device, len(classes)), **whole_ones}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                times[name].append(seconds(work, ranks.device))
    wall, cost = ({name: statistics.median(t[of] for t in times[name]) for name in works} for of in (0, 1))
    metric, metric_before = (cost[f"confusion{of}"] + cost[f"boundary{of}"] for of in ("", ", before"))
    return {
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(), "workers": workers, "images": images, "size": size, "rounds": rounds,
        "milliseconds": {name: round(1000 * cost[name], 2) for name in works if name not in whole_ones},
        "images_per_second": {name: round(images / wall[name], 3) for name in whole_ones},
        "confusion_over_before": round(cost["confusion"] / cost["confusion, before"], 3),
        "metric_over_before": round(metric / metric_before, 3),
        "whole_over_before": round(cost["now"] / cost["before"], 3),
        "whole_over_before_by_the_clock": round(wall["now"] / wall["before"], 3),
    }  # fmt: skip


def evaluate_now(student: Segmentor, reader: ShardReader, ranks: OneProcess, workers: int, classes: ClassSet) -> Tensor:
    """Score all pictures as a run does; return the confusion matrix."""
    items = EvaluationSet(reader, rank=0, world_size=1, workers=workers)
    scores, _ = evaluate(student, items, ranks, step=0, classes=classes)
    return torch.tensor(scores.confusion)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=whole(1), default=4, metavar="N", help="pictures (%(default)s)")
    parser.add_argument("--size", type=image_size(1), default=(1024, 2048), metavar="HxW", help="1024x2048")
    parser.add_argument("--rounds", type=whole(1), default=5, metavar="N", help="medians are over (%(default)s)")
    parser.add_argument("--workers", type=whole(0), default=2, metavar="N", help="threads that decode (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here")
    arguments = parser.parse_args(argv)
    found = measure(arguments.images, arguments.size, arguments.rounds, arguments.workers)
    for name, value in found["milliseconds"].items():
        print(f"{name:<20} {value:>10.2f} ms")
    speeds = found["images_per_second"]
    print(f"whole: {speeds['before']:.3f} images/s before, {speeds['now']:.3f} now; x {found['whole_over_before']:.3f}")
    print(f"metric: x {found['metric_over_before']:.3f}, its confusion matrix x {found['confusion_over_before']:.3f}")
    if arguments.json:
        command = ["tools/bench_evaluation.py", *(sys.argv[1:] if argv is None else argv)]
        write_record(arguments.json, command, ("torch", "torchvision"), **found)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
