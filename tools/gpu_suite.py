#!/usr/bin/env python
"""Ask a machine with one GPU everything that a machine without cannot answer, in three calls:

  tools/gpu_suite.py right [--out FOLDER]     is it right? tests, CPU against GPU, engines, waits, whole runs
  tools/gpu_suite.py fast  [--out FOLDER]     how fast is it? steps, a trace, encoding, evaluation, data
  tools/gpu_suite.py large [--out FOLDER]     how large may it be? Rebuilders of 14 M to 1 B, HRDA with MIC at 1024
  tools/gpu_suite.py table [--out FOLDER]     what was found, as Markdown

A call ends within 8.5 minutes. Each of its items runs in a process of its own with a time limit and leaves one line of
JSON in FOLDER/CALL.jsonl as it ends, so that a crash costs one item; what an item printed is in FOLDER/logs. Without a
GPU everything runs tiny, to see that it runs. Exit codes: 0 all items ended well, 1 some did not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is searched, not the one above it
from mfm_dist.batch import UDABatch
from mfm_dist.build import build_train_module, classes_without_data
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.start import start_engine
from mfm_dist.errors import EXIT_DONE, EXIT_ERROR
from mfm_dist.optim import build_optimizer
from mfm_dist.profiling.counting import count_step
from mfm_dist.profiling.step import random_batch, synchronise
from mfm_dist.run.cards import card_of, peak_flops
from mfm_dist.schedules import ema_decay_at
from mfm_dist.storage import JsonLines

REPOSITORY = Path(__file__).parent.parent
GPU_TESTS = (
    "tests/end_to_end/test_on_a_gpu.py", "tests/unit/distributed/test_arithmetic.py",
    "tests/unit/models/test_compiling.py", "tests/unit/profiling/test_throughput.py",
    "tests/distributed/test_deterministic.py",
)  # fmt: skip
"""Files with tests marked ``gpu``; of all others not even the imports are paid for."""
CALL_SECONDS = 510
"""Of a whole call, 8.5 minutes."""
PACKAGES = ("torch", "torchvision", "deepspeed", "accelerate", "timm", "webdataset", "numpy")
TINY = [
    "model.backbone=test_resnet", "model.backbone_options={out_indices: [1, 2, 3, 4]}", "model.weights=null",
    "model.decoder_options={width: 16}", "rebuilder.width=32", "rebuilder.heads=2", "rebuilder.depth=1",
    "rebuilder.grid=4", "data.crop=64", "train.precision=fp32",
]  # fmt: skip
"""Instead of what an item asks for, on a CPU."""
METHODS = ("source_only", "dacs", "daformer", "hrda", "mic", "oracle")
PRECISIONS = ("fp32", "bf16", "bf16_weights")
LOSSES_WITHIN, GRADIENTS_WITHIN = 1e-5, 5e-3
"""Of a step on the GPU, in IEEE fp32, from the same on the CPU: relative, of the norm of all gradients, where a pixel
whose two best classes are nearly tied may have another pseudo-label."""
SURE = "self_training.pseudo_threshold=0"
"""Weights drawn at random are sure of nothing, and by default all losses on targets would be 0."""


class Wrong(Exception):  # noqa: N818  what was found, not a fault of the tool
    """An item found what must not be; its figures say more."""

    def __init__(self, reason: str, **figures: Any) -> None:
        self.figures = figures
        super().__init__(reason)


@dataclass(frozen=True)
class Machine:
    """What the items run on."""

    out: Path
    tiny: bool
    """Whether there is no GPU, and everything is small."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    def config(self, *overrides: str) -> RunConfig:
        """Load MiT-B5 + DAFormer at 512 and these settings; something small without a GPU."""
        published = ["mfm.enabled=true", "model.weights=null", "model.backbone=mit_b5", "data.crop=512"]
        return load_config(None, [*published, *overrides, *(TINY if self.tiny else [])])


Figures = Mapping[str, Any]
Work = Callable[[Machine], Figures]


def about(machine: Machine) -> Figures:
    """Say what this machine is, and which types CUDA's autocast gives."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "packages": {}, "tiny": machine.tiny}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found["packages"][name] = version(name)
    image, weight = torch.ones(1, 4, 8, 8, device=machine.device), torch.ones(4, 4, 1, 1, device=machine.device)
    with torch.autocast(machine.device.type, dtype=torch.bfloat16):
        low = F.conv2d(image, weight)
        made = {
            "conv2d": low, "linear": F.linear(low, weight[:, :, 0, :1].expand(-1, -1, 8).mean(1) @ image[0, 0].mT),
            "layer_norm": F.layer_norm(low, [8]), "interpolate": F.interpolate(low, scale_factor=2.0, mode="bilinear"),
            "softmax": low.softmax(1), "gelu": F.gelu(low),
        }  # fmt: skip
    found["autocast"] = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in made.items()}
    if not machine.tiny:
        found |= {
            "card": torch.cuda.get_device_name(), "memory_gib": torch.cuda.mem_get_info()[1] / 2**30,
            "cuda": torch.version.cuda, "cpus": os.cpu_count(), "capability": torch.cuda.get_device_capability(),
            "tf32_by_default": {"matmul": torch.backends.cuda.matmul.allow_tf32,
                                "convolution": torch.backends.cudnn.allow_tf32},
        }  # fmt: skip
    return found


def run_tests(machine: Machine) -> Figures:
    """Run the tests that need a GPU; if time is up, those that have ended count."""
    side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    output, code = machine.out / "logs" / "pytest.log", None
    with suppress(subprocess.TimeoutExpired):
        code = _run(["-m", "pytest", *GPU_TESTS, "-m", "gpu", "-vv", *side_by_side], seconds=240, output=output)
    outcomes = outcomes_of(output.read_text())
    found: dict[str, Any] = {"passed": [*outcomes.values()].count("PASSED")}
    found["failed"] = [test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    if code not in (0, 5):  # 5: there are none
        raise Wrong("not all had ended" if code is None else f"{len(found['failed'])} tests failed", **found)
    return found


def outcomes_of(said: str) -> dict[str, str]:
    """Read the outcome of each test from what ``pytest -v`` says, with or without pytest-xdist, whole or cut off."""
    outcome = "(PASSED|FAILED|ERROR|SKIPPED)"
    alone = re.findall(rf"^(tests/.+?) {outcome}\b", said, re.MULTILINE)
    beside = re.findall(rf"^\[gw\d+\] \[ *\d+%\] {outcome} (tests/.+?) *$", said, re.MULTILINE)
    return {**dict(alone), **{test: found for found, test in beside}}


def equality(machine: Machine) -> Figures:
    """Compare one step of each method on the CPU with the same on the GPU, in IEEE fp32; note TF32 and bf16."""
    found: dict[str, Any] = {}
    for method in METHODS[1:2] if machine.tiny else METHODS:
        small = [] if machine.tiny else ["model.backbone=mit_b0", "data.crop=256", "rebuilder.grid=8"]
        config = machine.config(f"method.name={method}", *small, "self_training.jitter_prob=0", SURE)
        torch.manual_seed(0)
        module = build_train_module(config, classes_without_data(config))
        batch = module.draw(random_batch(config, 0))
        ours = losses_and_gradients(deepcopy(module), batch, torch.device("cpu"))
        for name, tf32, precision in (("ieee", False, "fp32"), ("tf32", True, "fp32"), ("bf16", False, "bf16")):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            theirs = losses_and_gradients(deepcopy(module), batch, machine.device, precision)
            loss = max(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(ours[0], theirs[0], strict=True))
            gradient = float((ours[1] - theirs[1]).norm() / ours[1].norm())
            found[f"{method}, {name}"] = {"losses": loss, "gradients": gradient}
            print(method, name, found[f"{method}, {name}"], flush=True)
    wrong = [
        name
        for name, one in found.items()
        if name.endswith("ieee") and (one["losses"] > LOSSES_WITHIN or one["gradients"] > GRADIENTS_WITHIN)
    ]
    if wrong:
        raise Wrong(f"not equal: {', '.join(wrong)}", **found)
    return found


def losses_and_gradients(
    module: torch.nn.Module, batch: UDABatch, device: torch.device, precision: str = "fp32"
) -> tuple[list[float], torch.Tensor]:
    """Run forward and backward of a micro-batch; return the losses and all gradients in one vector, on the CPU."""
    module.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        output = module(batch.to(device), 1.0)
    output.total.backward()
    gradients = [p.grad.flatten().double().cpu() for p in module.parameters() if p.grad is not None]
    return [float(loss) for loss in output.losses.values()], torch.cat(gradients)


def engines(machine: Machine) -> Figures:
    """Train four steps under each engine and precision, alone over NCCL; compare the losses with one process's."""
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    starts = [("alone", None), ("zero1", 1), ("zero2", 2), ("zero3", 3)]
    for precision in PRECISIONS[:1] if machine.tiny else PRECISIONS:
        for name, stage in starts[::2] if machine.tiny else starts:
            if precision == "bf16_weights" and stage not in (2, 3):
                continue
            step = partial(few_losses, precision=precision, stage=stage)
            try:
                found[f"{name}, {precision}"] = in_process(step, machine, seconds=60)["losses"]
            except Wrong as failure:
                failed[f"{name}, {precision}"] = str(failure)
    if "alone, fp32" not in found:
        raise Wrong("there is nothing to compare with", failed=failed, losses=found)
    far = {}
    for name, losses in found.items():
        alone = found.get(f"alone, {name.split(', ')[1]}", found["alone, fp32"])
        far[name] = max(abs(a - b) / abs(a) for a, b in zip(alone, losses, strict=True))
    limits = {"fp32": 1e-4, "bf16": 2e-2, "bf16_weights": 5e-2}
    wrong = [name for name, one in far.items() if not one <= limits[name.split(", ")[1]]]
    if wrong or failed:
        raise Wrong(f"losses differ or failed: {', '.join([*wrong, *failed])}", far=far, failed=failed, losses=found)
    return {"far": far}


def few_losses(machine: Machine, *, precision: str, stage: int | None) -> Figures:
    """Return the losses of four steps of a small network."""
    small = [] if machine.tiny else ["model.backbone=mit_b0", "data.crop=256", "rebuilder.grid=8"]
    config = machine.config(*small, SURE, f"train.precision={precision}", "optim.lr=1e-3", "optim.warmup_steps=0")
    engine, batches = prepared(config, stage)
    return {"losses": [float(one_step(engine, batches[number % 2], number)) for number in range(4)]}


def prepared(config: RunConfig, stage: int | None = None, leaves: Sequence[str] = ()) -> tuple[Engine, list[UDABatch]]:
    """Start the engine of a launch alone, at a ZeRO stage or without DeepSpeed; draw two micro-batches."""
    if stage is not None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {**alone, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
        if leaves:
            said = {"zero_optimization": {"stage": 3, "leaf_module": {"classes": list(leaves)}}}
            with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
                json.dump(said, file)
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = file.name
    config.train.global_batch = config.train.micro_batch
    torch.manual_seed(0)
    engine = start_engine(config)
    module = build_train_module(config, classes_without_data(config))
    batches = [module.draw(random_batch(config, block)).to(engine.device) for block in range(2)]
    engine.prepare(module, build_optimizer(module, config.optim, fused=engine.fuses_optimizer))
    return engine, batches


def one_step(engine: Engine, batch: UDABatch, number: int) -> torch.Tensor:
    """Train one step as ``Trainer.train_step`` does; return the loss, on the device."""
    engine.set_learning_rates(1.0)
    engine.forward_backward(batch, engine.config.mfm.loss_weight)
    result = engine.step()
    if engine.config.method.name not in ("source_only", "oracle"):
        engine.update_teacher(ema_decay_at(number + 1, engine.config.self_training.ema_decay))
    return result.loss


def syncs(machine: Machine) -> Figures:
    """Count where a step waits for the GPU, by the warnings that torch gives."""
    if machine.tiny:
        return {"waits": None}
    engine, batches = prepared(machine.config("train.precision=bf16"))
    for number in range(3):
        one_step(engine, batches[number % 2], number)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        one_step(engine, batches[0], 3)
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(one.filename).name}:{one.lineno}" for one in said if "called a synchronizing" in str(one.message)]
    return {"waits": len(places), "places": places}


def whole_runs(machine: Machine) -> Figures:
    """Train on embedded scenes with the real command: the same bits twice, and after a stop by SIGTERM (75)."""
    steps = 4 if machine.tiny else 60
    size = ["scenes.train=8", "scenes.val=2"] if machine.tiny else ["scenes.train=60", "scenes.val=10"]
    base = [
        "--config",
        "configs/quickstart.yaml",
        f"data.root={machine.out / 'scenes'}",
        "data.render_scenes=true",
        *size,
    ]
    base += [
        f"train.steps={steps}",
        "train.deterministic=true",
        "log.every=1",
        "checkpoint.every=10",
        "eval.every=1000",
    ]
    runs = {name: machine.out / f"run_{name}" for name in ("once", "again")}
    stopped = machine.out / "run_stopped"
    for run in (*runs.values(), stopped):  # of an earlier call
        shutil.rmtree(run, ignore_errors=True)
    codes = [_run(_train(run, base), seconds=120) for run in runs.values()]
    if codes != [0, 0]:
        raise Wrong(f"a run ended with {codes}; its log says why")
    if machine.tiny:
        return {"same_bits": same_weights(runs["once"], runs["again"], steps)}
    with (machine.out / "logs" / "stopped.log").open("w") as log:
        process = subprocess.Popen([sys.executable, *_train(stopped, base)], cwd=REPOSITORY, stdout=log, stderr=log)
        metrics = stopped / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 20):
            time.sleep(0.05)
        process.terminate()
        code = process.wait(timeout=60)
    resumed = _run(_train(stopped, base), seconds=120)
    found = {
        "stopped": code,
        "resumed": resumed,
        "same_bits": same_weights(runs["once"], runs["again"], steps),
        "same_bits_resumed": same_weights(runs["once"], stopped, steps),
    }
    if found != {"stopped": 75, "resumed": 0, "same_bits": True, "same_bits_resumed": True}:
        raise Wrong("runs that must be the same are not", **found)
    return found


def _train(run: Path, settings: Sequence[str]) -> list[str]:
    return ["-m", "mfm_dist.train", *settings, f"run.folder={run}"]


def same_weights(first: Path, second: Path, step: int) -> bool:
    """Compare the checkpoints of two runs, bit by bit."""
    folders = [run / "checkpoints" / f"step_{step:08d}" for run in (first, second)]
    names = {path.name for path in folders[0].glob("*.safetensors")}
    return bool(names) and all(
        (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in sorted(names)
    )


def _run(arguments: Sequence[str], *, seconds: float, output: Path | None = None) -> int:
    """Run Python and return its exit code; asked to end by SIGTERM when its time is up, which is raised then.

    Args:
        output: where what it says goes at once, so that nothing of it is lost; None: the item's log.
    """
    found = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with output.open("w") if output else nullcontext() as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=REPOSITORY, env=dict(os.environ) | {"PYTHONPATH": found},
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            raise


def time_steps(machine: Machine, *overrides: str, stage: int | None = None, leaves: Sequence[str] = ()) -> Figures:
    """Train 30 steps after 10 on noise: time, throughput, memory, use of the card."""
    warmup, steps = (1, 2) if machine.tiny else (10, 30)
    config = machine.config(*overrides)
    engine, batches = prepared(config, stage, leaves)
    seconds, began = [], time.perf_counter()
    for number in range(warmup + steps):
        before = time.perf_counter()
        one_step(engine, batches[number % 2], number)
        synchronise(engine.device)
        seconds.append(time.perf_counter() - before)
    median = statistics.median(seconds[warmup:])
    flop = sum(term.flop for term in count_step(config).values())
    found = {
        "step_ms": 1000 * median,
        "images_per_second": 2 * config.train.micro_batch / median,
        "first_step_s": seconds[0],
        "all_s": time.perf_counter() - began,
        "tflops": flop / median / 1e12,
    }
    if engine.device.type == "cuda":
        card = card_of(torch.cuda.get_device_name())
        found |= {
            "gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
        found |= (
            {"mfu": flop / median / peak_flops(card, config.train.precision, tf32=config.train.fp32_math == "tf32")}
            if card
            else {}
        )
    return found


def trace(machine: Machine) -> Figures:
    """Trace three steps: kernels of one, how busy the GPU is, what takes longest; the trace is in the folder."""
    engine, batches = prepared(machine.config("train.precision=bf16"))
    steps = 1 if machine.tiny else 3
    for number in range(1 if machine.tiny else 10):
        one_step(engine, batches[number % 2], number)
    synchronise(engine.device)
    on_gpu = engine.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as traced:
        began = time.perf_counter()
        for number in range(steps):
            one_step(engine, batches[number % 2], number)
        synchronise(engine.device)
        wall = time.perf_counter() - began
    traced.export_chrome_trace(str(machine.out / "trace.json.gz"))
    kind = "CUDA" if on_gpu else "CPU"
    events = [
        event for event in traced.key_averages() if event.device_type.name == kind and not event.is_user_annotation
    ]

    def took(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6

    top = sorted(events, key=took, reverse=True)[:30]
    return {
        "kernels": sum(event.count for event in events) / steps,
        "busy": sum(map(took, events)) / wall,
        "top_ms": {event.key[:80]: round(1000 * took(event) / steps, 3) for event in top},
    }


def encode(machine: Machine) -> Figures:
    """Time one encode of six images, forward and backward, against three of two."""
    config = machine.config("train.precision=bf16")
    module = build_train_module(config, classes_without_data(config)).to(machine.device)
    module.to(memory_format=torch.channels_last)
    height, width = config.data.crop
    images = torch.randn(6, 3, height, width, device=machine.device).to(memory_format=torch.channels_last)

    def run(parts: int) -> None:
        for part in images.chunk(parts):
            with torch.autocast(machine.device.type, dtype=torch.bfloat16):
                maps = module.student.encode(part)
            torch.stack([feature.float().square().mean() for feature in maps]).sum().backward()

    times: dict[int, list[float]] = {1: [], 3: []}
    for number in range(2 if machine.tiny else 20):
        for parts in times:
            synchronise(machine.device)
            before = time.perf_counter()
            run(parts)
            synchronise(machine.device)
            if number:
                times[parts].append(time.perf_counter() - before)
    one, three = (1000 * statistics.median(times[parts]) for parts in (1, 3))
    return {"one_of_6_ms": one, "three_of_2_ms": three, "three_over_one": three / one}


def evaluation(machine: Machine) -> Figures:
    """Time evaluation, part by part (tools/bench_evaluation.py)."""
    size = ["--size", "64x128", "--images", "1", "--rounds", "1"] if machine.tiny else ["--images", "8"]
    return _measured(machine, ["tools/bench_evaluation.py", *size])


def data(machine: Machine) -> Figures:
    """Time the data pipeline with several numbers of workers."""
    folder = machine.out / "scenes_large"
    size = ["--train", "40", "--val", "2", "--height", "512", "--width", "1024"]
    _run(["-m", "mfm_dist.shards", "make", "scenes", "--output", str(folder), *size], seconds=60)
    arguments = ["-m", "mfm_dist.profiling", "data", f"data.root={folder}", "data.crop=512x512", "--rounds", "5"]
    return _measured(machine, [*arguments, "--workers", "2", "8", "16"])


def _measured(machine: Machine, arguments: Sequence[str]) -> Figures:
    """Run a tool that has ``--json``, and return what it found."""
    file = machine.out / "logs" / f"found_{os.getpid()}.json"
    if code := _run([*arguments, "--json", str(file)], seconds=120):
        raise Wrong(f"ended with code {code}")
    found = json.loads(file.read_text())
    return {key: value for key, value in found.items() if key not in ("command", "date", "packages", "rounds")}


def lab(machine: Machine) -> Figures:
    """Give what is left of the call to the stability lab, several processes on the card; its runs can go on later."""
    folders = ["--records", str(machine.out / "lab_records"), "--runs", str(machine.out / "lab_runs")]
    code = EXIT_DONE
    with suppress(subprocess.TimeoutExpired):
        code = _run(["tools/lab.py", "run", "E0", "--gpu", "--workers", "6", *folders], seconds=LAB_SECONDS - 30)
    if code not in (EXIT_DONE, EXIT_ERROR):
        raise Wrong(f"ended with code {code}: runs need a clone without changes")
    return {}


LAB_SECONDS = 150


@dataclass(frozen=True)
class Item:
    """One question."""

    work: Work
    seconds: float
    """Its time limit."""
    on_cpu: bool = True
    """Whether it is asked, tiny, where there is no GPU."""


def _steps(*overrides: str, seconds: float = 60, on_cpu: bool = False, **form: Any) -> Item:
    return Item(lambda machine: time_steps(machine, *overrides, **form), seconds, on_cpu)


def _rebuilders() -> Iterator[tuple[str, Item]]:
    sizes = {
        "14M": [], "300M": ["rebuilder.width=1024", "rebuilder.depth=24", "rebuilder.heads=16"],
        "1B": ["rebuilder.width=2048", "rebuilder.depth=20", "rebuilder.heads=32"],
    }  # fmt: skip
    leaves = ["Block"]  # of MiT and of the Rebuilder
    forms: dict[str, dict[str, Any]] = {
        "plain": {}, "ZeRO-2": {"stage": 2}, "ZeRO-3": {"stage": 3}, "ZeRO-3, leaves": {"stage": 3, "leaves": leaves},
    }  # fmt: skip
    for size, overrides in sizes.items():
        for name, form in forms.items():
            on_cpu = (size, name) == ("14M", "plain")
            item = _steps("train.precision=bf16", "rebuilder.variant=stable", *overrides, on_cpu=on_cpu, **form)
            yield f"Rebuilder {size}, {name}", item


CALLS: dict[str, dict[str, Item]] = {
    "right": {
        "about": Item(about, 60),
        "tests": Item(run_tests, 260, on_cpu=False),
        "CPU against GPU": Item(equality, 90),
        "engines": Item(engines, 200, on_cpu=False),
        "waits": Item(syncs, 60, on_cpu=False),
        "whole runs": Item(whole_runs, 200, on_cpu=False),
    },
    "fast": {
        "about": Item(about, 60),
        "fp32": _steps("train.precision=fp32"),
        "fp32, TF32": _steps("train.precision=fp32", "train.fp32_math=tf32"),
        "bf16": _steps("train.precision=bf16", on_cpu=True),
        "bf16, without MFM": _steps("train.precision=bf16", "mfm.enabled=false"),
        "bf16, encodes apart": _steps("train.precision=bf16", "train.encode_once=never"),
        "trace": Item(trace, 60),
        "one encode": Item(encode, 45),
        "bf16, compiled": _steps("train.precision=bf16", "train.compile=true", seconds=150),
        "bf16, captured": _steps("train.precision=bf16", "train.cuda_graph=true"),
        "bf16, compiled and captured": _steps(
            "train.precision=bf16", "train.compile=true", "train.cuda_graph=true", seconds=150
        ),
        "evaluation": Item(evaluation, 90, on_cpu=False),
        "bf16, micro-batch 4": _steps("train.precision=bf16", "train.micro_batch=4", "train.global_batch=4"),
        "bf16, micro-batch 8": _steps("train.precision=bf16", "train.micro_batch=8", "train.global_batch=8"),
        "bf16, micro-batch 16": _steps("train.precision=bf16", "train.micro_batch=16", "train.global_batch=16"),
        "data": Item(data, 120, on_cpu=False),
    },
    "large": {
        "about": Item(about, 60),
        **dict(_rebuilders()),
        "HRDA, MIC, MFM at 1024": _steps(
            "train.precision=bf16",
            "method.name=mic",
            "mic.base_method=hrda",
            "mfm.view=fused",
            "data.crop=1024",
            "memory.lean=true",
            "memory.checkpoint_backbone=true",
            seconds=90,
        ),
        "lab": Item(lab, LAB_SECONDS, on_cpu=False),
    },
}
"""By value: what comes last is what a call may run out of time for."""


def in_process(work: Work, machine: Machine, *, seconds: float, log: Path | None = None) -> dict[str, Any]:
    """Do ``work`` in a process of its own and return its figures.

    A fork, which has torch loaded already; this process never touches the GPU.

    Args:
        log: where its output goes, and that of all that it starts and that dies with it; None: where this one's goes.

    Raises:
        Wrong: it found something, failed, or did not end in time.
    """
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(work, machine, sending, log))
    child.start()
    sending.close()
    answer: dict[str, Any] | None = None
    late = not receiving.poll(seconds)
    with suppress(EOFError):  # it died
        answer = None if late else json.loads(receiving.recv_bytes())
    with suppress(ProcessLookupError):
        (os.killpg if log else os.kill)(child.pid or 0, signal.SIGKILL)
    child.join()
    if answer is None:
        raise Wrong(f"no answer within {seconds:.0f} s" if late else "died without an answer")
    figures: dict[str, Any] = answer["figures"]
    if answer["reason"]:
        raise Wrong(answer["reason"], **figures)
    return figures


def _answer(work: Work, machine: Machine, sending: Any, log: Path | None) -> None:
    """Do ``work`` and send what came of it; in the process that is made for it."""
    if log is not None:
        os.setpgrp()
        sys.stdout = sys.stderr = file = log.open("a", buffering=1)
        for descriptor in (1, 2):  # of whatever it starts
            os.dup2(file.fileno(), descriptor)
    reason, figures = "", {}
    try:
        figures = dict(work(machine))
    except Wrong as wrong:
        reason, figures = str(wrong), wrong.figures
    except BaseException as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:1000]
    sys.stdout.flush()
    sending.send_bytes(json.dumps({"reason": reason, "figures": figures}, default=str).encode())
    time.sleep(60)  # until it is killed: nothing of CUDA or DeepSpeed can fail on the way out


def ask(call: str, machine: Machine, only: Sequence[str]) -> bool:
    """Ask everything of a call, or some of it; tell whether all ended well."""
    began, well = time.monotonic(), True
    lines = JsonLines(machine.out / f"{call}.jsonl")
    (machine.out / "logs").mkdir(parents=True, exist_ok=True)
    for name, item in CALLS[call].items():
        if (only and name not in only) or (machine.tiny and not item.on_cpu and not only):
            continue
        left = CALL_SECONDS - (time.monotonic() - began)
        line: dict[str, Any] = {"call": call, "item": name, "outcome": "well", "tiny": machine.tiny}
        before = time.monotonic()
        try:
            if left < 5:
                raise Wrong("no time was left")
            log = machine.out / "logs" / f"{call}_{re.sub('[^A-Za-z0-9]+', '_', name)}.log"
            line["figures"] = in_process(item.work, machine, seconds=min(item.seconds, left), log=log)
        except Wrong as wrong:
            line |= {"outcome": str(wrong), "figures": wrong.figures}
            well = False
        line["seconds"] = round(time.monotonic() - before, 1)
        line["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        lines.append(line)
        print(json.dumps(line), flush=True)
    return well


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Show what was found as Markdown, every item of every call, the newest line of each."""
    found = {(line["call"], line["item"]): line for line in lines if not line["tiny"]}
    rows = ["| call | question | outcome | s | figures |", "|---|---|---|---|---|"]
    for call, items in CALLS.items():
        for name in items:
            line = found.get((call, name))
            if line is None:
                rows.append(f"| {call} | {name} | not measured yet | | |")
                continue
            figures = ", ".join(f"{key} {_short(value)}" for key, value in line["figures"].items())
            rows.append(
                f"| {call} | {name} | {line['outcome']} | {line['seconds']:.0f} | {figures} |".replace("\n", " ")
            )
    return "\n".join(rows)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {_short(one)}" for key, one in list(value.items())[:8]) + ")"
    return str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=[*CALLS, "table"])
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"), metavar="FOLDER", help="%(default)s")
    parser.add_argument("--only", nargs="+", default=[], metavar="ITEM", help="ask these alone")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    if arguments.call == "table":
        print(table([line for call in CALLS for line in JsonLines(out / f"{call}.jsonl")]))
        return EXIT_DONE
    if unknown := set(arguments.only) - set(CALLS[arguments.call]):
        parser.error(f"--only {' '.join(sorted(unknown))}: {arguments.call} asks {', '.join(CALLS[arguments.call])}")
    # Asked elsewhere: where NVML is missing, to count starts CUDA, and the items are forks of this process.
    count = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], capture_output=True
    )
    machine = Machine(out, tiny=not int(count.stdout))
    return EXIT_DONE if ask(arguments.call, machine, arguments.only) else EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
