"""Before the hours of training, a minute: accelerate launch ... -m mfm_dist.preflight --config RUN.yaml

Looks at every node of a launch: versions, devices, network, clocks, folders, shards, and whether a checkpoint that one
node writes is read on another. Each thing wrong is one line with the node's name and what to do about it. Exit code 0
if nothing is, else 2; ``preflight.json`` in the run folder says the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mfm_dist.checkpoint import DamagedError, Progress, read_checkpoint, write_checkpoint
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig, is_stream
from mfm_dist.data.manifest import MANIFEST_FILE
from mfm_dist.data.reader import SampleError, ShardReader
from mfm_dist.distributed.ending import end_process
from mfm_dist.distributed.launch import Launch
from mfm_dist.distributed.preflight_checks import Peers, device_problem
from mfm_dist.errors import EXIT_CONFIG, UserError
from mfm_dist.outcome import whose
from mfm_dist.whole_folder import write_atomically

REPORT = "preflight.json"
COMPARED = ("torch", "deepspeed", "accelerate", "webdataset", "timm", "numpy", "safetensors")
CLOCK_SECONDS = 5.0
"""Clocks further apart make log files and heartbeats misleading; NTP keeps them within milliseconds."""
PROBE = 16 << 20
"""Bytes written to each folder, and the least that must be free."""
SAMPLES_READ = 5
"""Of each shard set, from its first to its last."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, the same on every process."""
    parser = argparse.ArgumentParser(
        prog="python -m mfm_dist.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(argv)
    launch = Launch.from_environment()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        if launch.rank == 0:
            print(error, file=sys.stderr)
        return error.exit_code
    began = time.monotonic()
    peers = Peers(launch)
    found, figures = inspect(config, launch, peers)
    lines = [f"{node}: {problem}" for node, problem in found]
    if launch.rank == 0:
        for line in lines:
            print(f"preflight: {line}", flush=True)
        if not lines:
            print(f"preflight: all well, {figures}, {time.monotonic() - began:.1f} s", flush=True)
        # Nodes to stay away from, where others have nothing wrong with them.
        nodes = sorted({node for node, _ in found}) if len({node for node, _ in found}) < _count_nodes(launch) else []
        report = {"code": EXIT_CONFIG if lines else 0, "problems": lines, "nodes": nodes, **whose()}
        with suppress(OSError):
            write_atomically(config.run.folder / REPORT, json.dumps(report, indent=1) + "\n")
    peers.close()
    return EXIT_CONFIG if lines else 0


def inspect(config: RunConfig, launch: Launch, peers: Peers) -> tuple[list[tuple[str, str]], str]:
    """All that is wrong, as (node, what and what to do), the same on every process; and figures for a person."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    own = [f"{peers.device} {problem}: have it looked at" for problem in [device_problem(peers.device)] if problem]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        own += node_problems(config, launch)
    probe = config.run.folder / f".preflight_{peers.gather(uuid.uuid4().hex)[0]}"
    if peers.rank == 0:
        own += write_probe(probe)
    nodes = peers.gather(node)
    wrong, bandwidth = peers.all_reduce()
    if wrong:
        own.append(f"{wrong}: a cable, switch or memory is faulty; leave this node out (sbatch --exclude)")
    if peers.rank == peers.world_size - 1:
        own += read_probe(probe)
    found = [(nodes[rank], problem) for rank, problems in enumerate(peers.gather(own)) for problem in problems]
    if peers.rank == 0:
        shutil.rmtree(probe, ignore_errors=True)
    found += unlike(nodes, peers.gather(versions()))
    clocks = peers.clocks()
    found += wrong_clocks(nodes, clocks)
    figures = [f"{len(set(nodes))} node(s), {peers.world_size} process(es) on {peers.device.type}"]
    if peers.world_size > 1:
        figures.append(f"all-reduce {min(peers.gather(bandwidth)):.2f} GB/s")
        figures.append(f"clocks within {1000 * (max(clocks) - min(clocks)):.0f} ms")
    return list(dict.fromkeys(found)), ", ".join(figures)


def node_problems(config: RunConfig, launch: Launch) -> list[str]:
    """What one process can see of its node alone."""
    problems = [*gpu_problems(launch), *folder_problems("run.folder", config.run.folder, _space_needed(config))]
    if config.data.scratch is not None:
        problems += folder_problems("data.scratch", config.data.scratch, PROBE)
    return [*problems, *shard_problems(config)]


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
    """What another node wrote, read here, by its checksums and its values."""
    deadline = time.monotonic() + 5  # network file systems may show a new file late
    while not (folder / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if not folder.parent.exists():
        return [f"does not see {folder.parent}: run.folder must be on a file system that all nodes share"]
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


def unlike(nodes: Sequence[str], found: Sequence[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Nodes whose versions are not those of the first."""
    for node, other in zip(nodes, found, strict=True):
        for name, here in other.items():
            if here != found[0][name]:
                yield node, f"{name} is {here}, on {nodes[0]} it is {found[0][name]}: install the same on all nodes"


def wrong_clocks(nodes: Sequence[str], clocks: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Nodes whose clock is far from the median."""
    middle = statistics.median_low(clocks)
    for node, clock in zip(nodes, clocks, strict=True):
        if abs(clock - middle) > CLOCK_SECONDS:
            yield node, f"its clock is {clock - middle:+.1f} s off the others': have NTP set up there"


def _space_needed(config: RunConfig) -> int:
    """Bytes for the next checkpoint, as large as the last one, which stays until it is written."""
    checkpoints = [folder for folder in (config.run.folder / "checkpoints").glob("step_*") if folder.is_dir()]
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in checkpoints]
    return max([PROBE, *sizes])


def _count_nodes(launch: Launch) -> int:
    return max(1, launch.world_size // launch.local_world_size)


if __name__ == "__main__":
    end_process(main())
