"""Time the training step part by part, and beside it the same passes in a bare PyTorch loop."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from mfm_dist.batch import UDABatch
from mfm_dist.build import (
    Readers,
    build_train_module,
    classes_without_data,
    open_readers,
    render_scenes,
    train_pipeline,
)
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.engine import Engine
from mfm_dist.distributed.launch import Launch
from mfm_dist.distributed.start import start_engine
from mfm_dist.errors import ConfigError
from mfm_dist.optim import build_optimizer
from mfm_dist.run.folder import RunFolder
from mfm_dist.run.watchdog import Watchdog
from mfm_dist.schedules import ema_decay_at, mfm_weight
from mfm_dist.storage import OF_KERNEL, read_json, read_text
from mfm_dist.train_module import TrainModule
from mfm_dist.trainer import Trainer

PARTS = ("data wait", "teacher", "forward", "backward", "optimiser + EMA")
SQUARE = 32
"""Side of the squares that random labels lie in, in pixels: a feature of the last map of most encoders."""
MEMORY_STEPS = 2
"""Steps before memory is read: the first makes the optimiser's state, the second has everything at once."""

StepFunction = Callable[[list[UDABatch]], None]


class PartClock:
    """Time between marks: events in the GPU's stream, which wait for nothing, or the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.runs = False

    def start(self) -> None:
        """Begin a step; before this, marks do nothing."""
        self.runs = True
        self.mark("start")

    def mark(self, part: str) -> None:
        """Count what was done since the last mark as ``part``."""
        if not self.runs:
            return
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def pop(self) -> dict[str, float]:
        """Stop and return seconds by part since the start, none without one. The device must be idle."""
        seconds: dict[str, float] = {}
        for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False):
            passed = before.elapsed_time(after) / 1000 if self.on_gpu else after - before
            seconds[part] = seconds.get(part, 0.0) + passed
        self.marks, self.runs = [], False
        return seconds


def mark_backward(engine: Engine, clock: PartClock) -> None:
    """Have every backward of the engine mark the clock from now on."""
    backward = engine.backward

    def marked(loss: Tensor) -> None:
        clock.mark("forward")
        backward(loss)
        clock.mark("backward")

    engine.backward = marked  # type: ignore[method-assign]


@dataclass
class Setting:
    """The networks with or without MFM, and the two ways to step them. They share weights and optimiser."""

    module: TrainModule
    trainer: Trainer
    engine_step: StepFunction
    bare_step: StepFunction
    clock: PartClock
    memory_gib: float = 0.0


def build_trainer(config: RunConfig, readers: Readers) -> Trainer:
    """Build what a run of ``config`` trains with, for single steps: nothing is written or watched, no signal heard."""
    engine = start_engine(config)
    module = build_train_module(config, readers.classes)
    engine.prepare(module, build_optimizer(module, config.optim, fused=engine.fuses_optimizer))
    run = RunFolder(config.run.folder, writes=False)
    watchdog = Watchdog(run.path, rank=0, world_size=1, seconds=0, start="", on_hang=print)
    return Trainer(engine, module, readers, run, {}, watchdog, asked_to_stop=lambda: None)


def build_setting(config: RunConfig, readers: Readers) -> Setting:
    """Build the two ways to step, and the clock that both mark."""
    trainer = build_trainer(config, readers)
    module, engine = trainer.module, trainer.engine
    clock = PartClock(engine.device)
    mark_backward(engine, clock)
    if module.teacher is not None:
        module.teacher.register_forward_pre_hook(lambda *_: clock.mark("forward"))
        module.teacher.register_forward_hook(lambda *_: clock.mark("teacher"))

    def engine_step(batches: list[UDABatch]) -> None:
        trainer.progress.step = 0  # the schedule may be shorter than the measurement
        clock.start()
        trainer.train_step(batches)
        trainer.settle(leave=1)
        clock.mark("optimiser + EMA")

    return Setting(module, trainer, engine_step, bare_twin(config, module, engine), clock)


def bare_twin(config: RunConfig, module: TrainModule, engine: Engine) -> StepFunction:
    """Build the same passes in a plain loop: no engine, Accelerate, schedule, running means or console."""
    device, optimizer = engine.device, engine.optimizer
    parameters = [p for p in module.parameters() if p.requires_grad]
    limit = config.train.clip_norm or float("inf")
    weight = mfm_weight(0, config.mfm)
    updates = count(1)
    averaged, current = [], []
    if module.teacher is not None:
        averaged = [p.data for p in module.teacher.segmentor.parameters()]
        current = [p.data for p in module.student.parameters()]

    def step(batches: list[UDABatch]) -> None:
        for batch in batches:
            on_device = batch.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16"):
                output = module(on_device, weight)
            (output.total / len(batches)).backward()
        nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if averaged:
            decay = ema_decay_at(next(updates), config.self_training.ema_decay)
            torch._foreach_lerp_(averaged, current, 1.0 - float(decay))

    return step


class Blocks:
    """The stream of blocks that all four ways draw from, at the pace of training: new pictures for every step."""

    def __init__(self, config: RunConfig, readers: Readers) -> None:
        self._count = config.blocks_per_step
        self._blocks: Iterator[UDABatch] = iter(train_pipeline(config, readers, 0, 1, first_block=0))

    def take(self, round_number: int) -> list[UDABatch]:
        """Return the blocks of one step, numbered by the round: all four draw the same jitter, blur and masks in it."""
        first = round_number * self._count
        return [replace(next(self._blocks), block=first + number) for number in range(self._count)]


def random_batch(config: RunConfig, number: int) -> UDABatch:
    """Make pictures of noise: neither memory nor time depends on what they show.

    Labels lie in squares, so that some features are of one class, as DAFormer's feature distance asks.
    """
    generator = torch.Generator().manual_seed(number)
    size = (config.train.micro_batch, *config.data.crop)
    images = torch.randint(0, 256, (2, size[0], 3, *size[1:]), generator=generator, dtype=torch.uint8)
    squares = (size[0], *(-(-side // SQUARE) for side in config.data.crop))
    label = torch.randint(0, len(classes_without_data(config)), squares, generator=generator, dtype=torch.uint8)
    label = label.repeat_interleave(SQUARE, 1).repeat_interleave(SQUARE, 2)[:, : size[1], : size[2]].contiguous()
    return UDABatch(
        source_image=images[0],
        source_label=label,
        target_image=images[1],
        target_valid=torch.ones(size, dtype=torch.bool),
        labelled_target_image=images[0] if config.data.target_labelled else None,
        labelled_target_label=label if config.data.target_labelled else None,
        block=number,
    )


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured_step(step: StepFunction, take: Callable[[], list[UDABatch]], device: torch.device) -> dict[str, float]:
    """Measure seconds of one step, data included, and of its wait for data."""
    synchronise(device)
    started = time.perf_counter()
    batches = take()
    waited = time.perf_counter() - started
    step(batches)
    synchronise(device)
    return {"step": time.perf_counter() - started, "data wait": waited}


def peak_gib(work: Callable[[], None], device: torch.device) -> float:
    """Measure the most memory that torch holds for what ``work`` makes: weights, optimiser, activations."""
    if device.type == "cuda":
        fill_workspaces(device)
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronise(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    # A CPU has no such counter, and the resident size keeps what was freed before: torch's profiler lists every
    # allocation and release of the allocator.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = read_json(path, limit=1 << 34)["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(size for _, size in changes)) / 2**30


def fill_workspaces(device: torch.device) -> None:
    """Have cuBLAS take its workspaces, 32 MiB a thread on a Hopper, which would count to what comes first."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(8, 8, device=device, dtype=dtype, requires_grad=True)
        functional.linear(weight, weight).sum().backward()


def build_and_weigh(config: RunConfig, readers: Readers, blocks: Blocks, device: torch.device) -> Setting:
    """Build a setting, run its first steps, and measure the memory that this took."""
    built: list[Setting] = []

    def build_and_step() -> None:
        built.append(build_setting(config, readers))
        for _ in range(MEMORY_STEPS):
            built[0].engine_step(blocks.take(0))

    memory = peak_gib(build_and_step, device)
    built[0].memory_gib = memory
    built[0].clock.pop()
    return built[0]


def measure(config: RunConfig, *, steps: int, warmup: int) -> dict[str, Any]:
    """Measure all figures, under the JSON file's names; times in seconds, ``rounds`` holds every single one.

    Raises:
        UserError: for shards that are missing or damaged, or networks that cannot be built.
    """
    if Launch.from_environment().world_size > 1:
        raise ConfigError("mfm-profile measures one process: start it as it is, not with accelerate launch")
    render_scenes(config)
    configs = {name: with_mfm(config, enabled) for name, enabled in (("without", False), ("with", True))}
    device = start_engine(config).device
    readers = open_readers(config)
    blocks = Blocks(config, readers)
    settings = {name: build_and_weigh(configs[name], readers, blocks, device) for name in configs}
    ways: list[tuple[str, str, StepFunction]] = [
        way
        for name, setting in settings.items()
        for way in ((name, "engine", setting.engine_step), (name, "bare", setting.bare_step))
    ]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    for number in range(warmup + steps):
        twice: dict[tuple[str, str], list[dict[str, float]]] = {(name, kind): [] for name, kind, _ in ways}
        for name, kind, step in (*ways, *ways[::-1]):  # there and back: a drift of the machine falls on all alike
            found = measured_step(step, lambda: blocks.take(number), device)  # noqa: B023 - called at once
            twice[name, kind].append({**found, **settings[name].clock.pop()})
        if number >= warmup:
            for name in settings:
                rounds[name].append({kind: _mean(twice[name, kind]) for kind in ("engine", "bare")})
    images = config.images_per_step
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "images_per_step": images,
        **{name: summary(rounds[name], images) | {"memory_gib": settings[name].memory_gib} for name in settings},
        "rounds": rounds,
    }


def _mean(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: statistics.fmean(one[part] for one in measured) for part in measured[0]}


def with_mfm(config: RunConfig, enabled: bool) -> RunConfig:
    config = deepcopy(config)
    config.mfm.enabled = enabled
    return config


def median_and_quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "quartile_low": low, "quartile_high": high}


def summary(rounds: Sequence[Mapping[str, Any]], images: int) -> dict[str, Any]:
    """Return medians over the rounds of one setting."""

    def net(way: Mapping[str, float]) -> float:
        return way["step"] - way["data wait"]

    step = median_and_quartiles([one["engine"]["step"] for one in rounds])
    return {
        "step_seconds": step,
        "images_per_second": images / step["median"],
        "part_seconds": {part: statistics.median(one["engine"].get(part, 0.0) for one in rounds) for part in PARTS},
        "bare_step_seconds": median_and_quartiles([one["bare"]["step"] for one in rounds]),
        "engine_over_bare": median_and_quartiles([net(one["engine"]) / net(one["bare"]) for one in rounds]),
    }


def cpu_name() -> str:
    """Return the CPU's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = read_text(info, OF_KERNEL).splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
