"""A tiny run of the real command: its settings, its start, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_dist.checkpoint.contents import PARTS
from mfm_dist.checkpoint.files import read_checkpoint
from mfm_dist.checkpoint.pieces import Piece, TensorSpec, write_pieces
from tests.helpers.warm_python import warm_python

REPOSITORY = Path(__file__).parents[2]
SCENE_SIZE = (64, 128)
DEFAULTS = ["--config", str(REPOSITORY / "tests" / "defaults.yaml")]
"""Without it, the command would start from the quickstart."""
LARGE_REBUILDER = ["rebuilder.variant=stable", "rebuilder.depth=24", "rebuilder.width=1024", "rebuilder.heads=16",
                   "memory.checkpoint_rebuilder=true", "checkpoint.keep=2", "checkpoint.background=false",
                   "watchdog.seconds=3600"]  # fmt: skip
"""The one of configs/rebuilder/large.yaml; no write in the background, which copies all it writes."""
ON_TWO_NODES = ["model.backbone=mit_b0", "model.backbone_options={}", "data.crop=128x128", "rebuilder.grid=4",
                "train.micro_batch=1", "train.global_batch=4"]  # fmt: skip
"""A network around it that four ranks of a small machine can hold."""
KEEPS_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""With it, glibc gives back what is freed: a process takes what lives in it, and four large ones fit on a machine."""
SIGNALS = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "20"}
"""As ``mfm-train --launch`` sets them, but a stopped process is killed sooner."""


def tiny_overrides(scenes: Path, run: Path) -> list[str]:
    """Set up a run of four steps of two micro-batches that takes a second or two; it has BatchNorm and Dropout2d."""
    return [
        f"run.folder={run}", f"data.root={scenes}", "data.crop=64x64", "data.workers=0", "data.bad_sample_limit=0",
        "model.backbone=test_resnet", "model.backbone_options={out_indices: [1, 2, 3, 4]}",
        "model.decoder=daformer", "model.decoder_options={width: 16}",
        "mfm.enabled=true", "rebuilder.width=32", "rebuilder.heads=2", "rebuilder.depth=1", "rebuilder.grid=4",
        "optim.lr=1e-3", "optim.decoder_lr_factor=1", "optim.eps=1e-4", "optim.warmup_steps=0",
        "train.steps=4", "train.global_batch=4", "log.every=1", "eval.every=1000", "checkpoint.every=2",
        "eval.overlays=1", "debug.check_gradients=true",
    ]  # fmt: skip


def run_train(
    arguments: Sequence[str],
    *,
    launch: str | None = None,
    processes: int = 2,
    timeout: float = 240,
    cwd: Path = REPOSITORY,
    module: str = "mfm_dist.train",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the real command, alone or below ``accelerate launch`` with a file of configs/accelerate."""
    return run_module(
        module,
        [*DEFAULTS, *arguments],
        launch=launch,
        processes=processes,
        timeout=timeout,
        cwd=cwd,
        environment=environment,
    )


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    launch: str | None = None,
    processes: int = 2,
    timeout: float = 240,
    cwd: Path = REPOSITORY,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a module as a program, alone or below ``accelerate launch`` with a file of configs/accelerate."""
    command = ["-m"]
    if launch is not None:
        file = REPOSITORY / "configs" / "accelerate" / f"{launch}.yaml"
        command += ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
        if not launch.endswith("single"):
            command += ["--num_processes", str(processes)]
        command += ["--main_process_port", "0", "-m"]
    return run_python([*command, module, *arguments], timeout=timeout, cwd=cwd, environment=environment)


def run_python(
    arguments: Sequence[str],
    *,
    timeout: float = 240,
    cwd: Path = REPOSITORY,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Python, as a process forked from one that has imported what takes long.

    It is started afresh where ``environment`` shows GPUs or sets ``KEEPS_NOTHING``, which are read at a start.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    if not variables["CUDA_VISIBLE_DEVICES"] and not KEEPS_NOTHING.keys() <= variables.keys():
        variables |= warm_python(REPOSITORY)
    command = [variables.get("PYTHON_EXEC", sys.executable), *arguments]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout, check=False)


class Start:
    """One start of a run below ``accelerate launch``, or alone."""

    def __init__(
        self,
        run: Path,
        arguments: list[str],
        *,
        launch: str | None,
        module: str = "mfm_dist.train",
        tree: Path = REPOSITORY,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            tree: the clone whose code runs.
            environment: variables beside those of this process.
        """
        command = [sys.executable, "-m"]
        if launch is not None:
            file = tree / "configs" / "accelerate" / f"{launch}.yaml"
            command += ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
            command += ["--main_process_port", "0", "-m"]
        self.run = run
        self.started = time.time()
        self.log = run.with_name(f"{run.name}_{self.started}.log")
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                [*command, module, *DEFAULTS, *arguments],
                cwd=tree, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **SIGNALS, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                     "PYTHONPATH": str(tree), **(environment or {})},
            )  # fmt: skip

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            assert self.launcher.poll() is None, f"ended before {what}: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"not within 90 s: {what}: {self.log.read_text()}"
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        metrics = self.run / "metrics.jsonl"
        self.wait_for(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), f"step {step}")

    def wait_for_ranks(self, count: int) -> dict[int, int]:
        """Process of each rank, once its watchdog runs."""

        def ranks() -> dict[int, int]:
            files = [self.run / "heartbeats" / f"rank_{rank:05d}.json" for rank in range(count)]
            fresh = [read_json(file) for file in files if file.exists() and file.stat().st_mtime > self.started]
            return {report["rank"]: report["process"] for report in fresh if report}

        self.wait_for(lambda: len(ranks()) == count, "all ranks")
        return ranks()

    def output(self) -> str:
        """All that was written, when it has ended."""
        self.launcher.wait(timeout=90)
        return self.log.read_text()

    def outcome(self) -> dict[str, Any]:
        return read_json(self.run / "outcome.json")


def result_of(output: str) -> dict[str, Any]:
    """Return the JSON of the RESULT line, which is the last line of a finished run."""
    last = output.strip().splitlines()[-1]
    assert last.startswith("RESULT "), output[-3000:]
    result: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    return result


def final_tensors(run: Path, step: int = 4) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint of a run, by part and name."""
    return checkpoint_tensors(run / "checkpoints" / f"step_{step:08d}")


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint, by part and name, and each rank's own BatchNorm statistics."""
    checkpoint = read_checkpoint(folder)
    found = {f"{part}/{name}": value for part in PARTS for name, value in checkpoint.tensors(part).items()}
    ranks = range(checkpoint.world_size)
    return found | {f"buffers/{rank}/{name}": one for rank in ranks for name, one in checkpoint.buffers(rank).items()}


def rewrite_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Give a checkpoint of one process other tensors, by part and name, and vouch for them."""
    pieces = [Piece(name, 0, tensor.flatten()) for name, tensor in tensors.items()]
    size, chunks = write_pieces(folder / "rank_00000.safetensors", pieces)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["rank_00000.safetensors"] = {"bytes": size, "sha256": chunks}
    specs = {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    manifest["tensors"] = {name: spec.to_tree() for name, spec in specs.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def assert_equal_bits(first: Path, second: Path, step: int = 4) -> None:
    """Compare every tensor of the checkpoints of two runs."""
    a, b = final_tensors(first, step), final_tensors(second, step)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def metrics_of(run: Path) -> list[dict[str, float]]:
    """Read the lines of metrics.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timing = ("images_per_second", "data_wait_fraction", "memory_gib", "memory_reserved_gib", "slowest_rank",
              "rank_spread", "tflops", "mfu")  # fmt: skip
    return [{k: v for k, v in line.items() if k not in timing and not k.startswith("start_seconds/")} for line in lines]


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that may be missing or half written; {} if so."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        return values
    except (OSError, ValueError):
        return {}
