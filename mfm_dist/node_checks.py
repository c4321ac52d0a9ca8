"""What one process can tell of its node before training: devices, folders, shards, versions.

Each problem is half a sentence that says what to do; whoever tells it puts the node's name before it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mfm_dist.checkpoint import DamagedError, Progress, read_checkpoint, write_checkpoint
from mfm_dist.config.schema import RunConfig, is_stream
from mfm_dist.data.manifest import MANIFEST_FILE
from mfm_dist.data.reader import SampleError, ShardReader
from mfm_dist.distributed.launch import Launch
from mfm_dist.errors import UserError

COMPARED = ("torch", "deepspeed", "accelerate", "webdataset", "timm", "numpy", "safetensors")
PROBE = 16 << 20
"""Bytes written to each folder, and the least that must be free."""
SAMPLES_READ = 5
"""Of each shard set, from its first to its last."""
SEEN_SECONDS = 5.0
"""Network file systems may show a new file late."""


def run_checks(checks: Mapping[str, Callable[[], Iterable[str]]], seconds: float) -> list[str]:
    """Every problem that checks find, by the name of what they look at; one that does not end is a problem, too."""
    found: list[str] = []
    begun: list[str] = []

    def run() -> None:
        for name, check in checks.items():
            begun.append(name)
            try:
                found.extend(check())
            except Exception as error:
                found.append(f"{name} failed ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [*found, f"{begun[-1]} gave no answer within {seconds:.0f} s: it is very slow there, or hangs"]
    return found


def gpu_problems(launch: Launch) -> Iterator[str]:
    """GPUs that are missing, or whose memory has had errors that could not be corrected."""
    promised = os.environ.get("SLURM_GPUS_ON_NODE")
    if promised and torch.cuda.device_count() < min(int(promised), launch.local_world_size):
        yield (
            f"{torch.cuda.device_count()} GPUs can be used, Slurm gave {promised}: see nvidia-smi there; a driver that "
            "is too old for this torch looks like this too"
        )
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        for line in answer.splitlines():
            index, _, errors = line.partition(", ")
            if errors.isdigit() and int(errors):
                yield f"GPU {index} had {errors} uncorrected memory errors: have it reset, or leave the node out"


def folder_problems(key: str, folder: Path, needed: int) -> Iterator[str]:
    """Whether a folder takes a file, holds it, and has room for ``needed`` bytes."""
    path = folder / f".preflight_{uuid.uuid4().hex}"
    content = os.urandom(1 << 16) * (PROBE >> 16)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != content:
            yield f"{key}={folder} gives back other bytes than were written: do not use this disk"
        free = shutil.disk_usage(folder).free
        if free < needed:
            yield f"{key}={folder} has {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} are needed: free some space"
    except OSError as error:
        yield f"{key}={folder} cannot be written ({error}): free some space, or choose another folder"
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def shard_problems(config: RunConfig) -> Iterator[str]:
    """Whether the shard sets open, and images spread over each of them decode.

    Single images may be bad, as ``data.bad_sample_limit`` allows; training names and counts them.
    """
    data = config.data
    for key, name in (("source", data.source), ("target", data.target), ("validation", data.validation)):
        folder = data.root / name
        if is_stream(name) or (data.render_scenes and not (folder / MANIFEST_FILE).is_file()):
            continue  # a stream, which nothing but reading it checks; or shards that this run will make or finish
        check = f"is it mounted there? python tools/check_shards.py {folder}"
        try:
            reader = ShardReader(folder, bad_limit=data.bad_sample_limit)
        except UserError as error:
            yield f"data.{key}: {error}: {check}"
            continue
        last = len(reader) - 1
        numbers = sorted({last * part // (SAMPLES_READ - 1) for part in range(SAMPLES_READ)} if last >= 0 else ())
        bad = [problem for number in numbers if (problem := _unreadable(reader, number))]
        if not numbers:
            yield f"data.{key}: {folder} holds no samples: make the shards again"
        elif len(bad) == len(numbers) or (bad and data.bad_sample_limit == 0):
            yield f"data.{key}: {len(bad)} of {len(numbers)} samples tried cannot be used, first {bad[0]}: {check}"


def _unreadable(reader: ShardReader, number: int) -> str | None:
    try:
        reader.read(number, with_label=False)
    except SampleError as error:
        return str(error)
    return None


def write_probe(folder: Path) -> list[str]:
    """A checkpoint for another node to read."""
    try:
        folder.mkdir(parents=True)
        write_checkpoint(
            folder / "step_00000000",
            {"student": {"probe": torch.arange(1000.0)}},
            progress=Progress(),
            config={},
            data={},
            keep=1,
        )
    except OSError as error:
        return [f"a checkpoint could not be written below {folder.parent} ({error}): free some space"]
    return []


def read_probe(folder: Path) -> list[str]:
    """What the first node wrote, read here, by its checksums and its values."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not (folder / "latest").exists():
        if time.monotonic() > deadline:
            shared = "it must be on a file system that all nodes share"
            return [f"does not see what the first node wrote to run.folder={folder.parent}: {shared}"]
        time.sleep(0.1)
    try:
        same = torch.equal(read_checkpoint(folder / "step_00000000").tensors("student")["probe"], torch.arange(1000.0))
    except (DamagedError, KeyError) as error:
        return [f"cannot read a checkpoint that the first node wrote below {folder.parent} ({error}): is it shared?"]
    return [] if same else [f"reads other values below {folder.parent} than the first node wrote: do not use this disk"]


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    found = {"python": platform.python_version()}
    for name in COMPARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "nothing"
    return found | {"CUDA": str(torch.version.cuda)}


def space_needed(config: RunConfig) -> int:
    """Bytes for the next checkpoint, as large as the last one, which stays until it is written."""
    checkpoints = [folder for folder in (config.run.folder / "checkpoints").glob("step_*") if folder.is_dir()]
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in checkpoints]
    return max([PROBE, *sizes])
