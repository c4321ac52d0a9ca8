"""Before the hours of training, a minute: accelerate launch ... -m mfm_dist.cluster.preflight --config RUN.yaml

Looks at every node of a launch: versions, devices, folders, shards, whether a checkpoint that one node writes is read
on the others, the network and the clocks. Each thing wrong is one line with the node's name and what to do about it.
Exit code 0 if nothing is, else 2; ``preflight.json`` in the run folder says the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist

from mfm_dist.build import check_data, rendered_sets, sets_of
from mfm_dist.checkpoint.files import read_checkpoint, write_checkpoint
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.cluster.job import PREFLIGHT
from mfm_dist.config.class_files import DEFAULT, load_class_set
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig, is_stream
from mfm_dist.data.reader import ShardReader
from mfm_dist.distributed.launch import Launch
from mfm_dist.errors import EXIT_CONFIG, EXIT_HUNG, BadSample, DataError, StorageError, UserError
from mfm_dist.run.folder import RECORDED_PACKAGES, slurm_job_tag
from mfm_dist.run.signals import end_process
from mfm_dist.storage import write_atomically

LOOK_SECONDS = 20.0
"""For what a process looks at by itself."""
MEET_SECONDS = 35.0
"""For all to come and exchange what they saw. Together less than a minute, whatever the nodes do."""
SEEN_SECONDS = 5.0
"""For a file that one node wrote to be seen by the others."""
CLOCK_SECONDS = 2.5
"""Clocks further off make log files and heartbeats misleading; NTP keeps them within milliseconds."""
PROBE_BYTES = 16 << 20
"""Size of the checkpoint written to each folder, the least that must be free; also of what is all-reduced."""
NETWORK = "can the nodes reach one another? MFM_NETWORK in slurm/site.env names the interface between them"

Finding = tuple[str | None, str]
"""The node, None if it is not known or cannot be blamed alone; what is wrong, and what to do about it."""
Check = tuple[str, Callable[[], object], str]
"""What is tried; how, raising what is wrong; and what to do about it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m mfm_dist.cluster.preflight", description=__doc__)
    parser.add_argument("--config", type=Path, action="append", required=True, metavar="FILE", help="later ones win")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(argv)
    launch = Launch.from_environment()
    try:
        config = load_config(arguments.config, arguments.overrides)
        found, figures = inspect_node(config, launch)
    except UserError as error:
        if launch.rank == 0:
            print(error, file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:  # torch's, of its store
        found, figures = [(None, f"no word from the first process ({str(error)[:200]}): {NETWORK}")], ""
    if launch.rank == 0 or not figures:  # else the first process tells the same
        tell(config.run.folder, found, figures, launch)
    if found and launch.rank > 0:  # the launcher ends all processes when one has ended, and the first has to speak
        time.sleep(2 if figures else LOOK_SECONDS)
    return EXIT_CONFIG if found else 0


def inspect_node(config: RunConfig, launch: Launch) -> tuple[list[Finding], str]:
    """Return all that is wrong, and figures for a person if all processes have met. Collective.

    Raises:
        RuntimeError: torch's, if the first process is not to be found.
    """
    rank, world, patience = launch.rank, launch.world_size, timedelta(seconds=MEET_SECONDS)
    address = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(*address, is_master=serves, timeout=patience, wait_for_workers=False)  # type: ignore[attr-defined]
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    store.set(f"came/{rank}", node)
    on_gpu = not launch.use_cpu and 0 < launch.local_world_size <= torch.cuda.device_count()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    facts = {name: version(name) for name in RECORDED_PACKAGES} | {"python": platform.python_version()}
    said: dict[str, Any] = {"node": node, "facts": facts | {"the device": device.type}, "figures": ""}
    said["probe"] = f".preflight_{node}_{os.getpid()}"
    said["problems"] = run_checks(checks_of(config, launch, device, said["probe"]), LOOK_SECONDS)
    store.set(f"said/{rank}", "")
    found: list[Finding] = []
    meeting = partial(meet, config.run.folder, launch, device, store, said)
    apart = run_checks([("the exchange of data", lambda: found.extend(meeting()), NETWORK)], MEET_SECONDS)
    for folder in {config.run.folder, config.data.scratch or config.run.folder}:  # which may hang, too
        run_checks([("removal", partial(shutil.rmtree, folder / said["probe"], ignore_errors=True), "")], 1)
    if not apart:
        return found, said["figures"]
    found = [(node, problem) for problem in said["problems"]]
    for other in range(world if rank == 0 else 0):
        if not store.check([f"said/{other}"]):
            where = store.get(f"came/{other}").decode() if store.check([f"came/{other}"]) else None
            why = "it is very slow, or hangs" if where else f"it did not come; node-*.log may say why; {NETWORK}"
            found.append((where, f"process {other} of {world} said nothing in time: {why}"))
    return found or [(None, f"{node}: {apart[0]}")], ""


def checks_of(config: RunConfig, launch: Launch, device: torch.device, probe: str) -> Iterator[Check]:
    """List what a process tries on its device and, the first one of a node, for the node."""
    data, room = config.data, "free some space, or choose another folder"
    yield f"multiplying matrices on {device}", partial(multiply, device), "have it looked at"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        yield "a look at the GPUs", partial(inspect_gpus, launch), "see nvidia-smi there, or leave the node out"
        for key, folder in (("run.folder", config.run.folder), ("data.scratch", data.scratch)):
            if folder is not None:
                yield f"writing to {key}={folder}", partial(write_probe, folder, probe), room
        turn = Lock()
        for key, name in [(key, name) for key, names in sets_of(config).items() for name in names]:
            advice = f"is it mounted there? mfm-shards check {data.root / name}"
            yield f"reading data.{key}={data.root / name}", partial(read_samples, config, name, turn), advice
        advice = "name in data.classes the classes to train on, or pack a set again with --classes"
        yield "comparing the classes of the shards", partial(compare_classes, config, turn), advice


def meet(run: Path, launch: Launch, device: torch.device, store: Any, said: dict[str, Any]) -> list[Finding]:
    """Exchange what all have seen and, if that is well, a checkpoint and tensors; judge it, all alike. Collective.

    Adds ``figures`` to what this process has ``said``.
    """
    world, everything = launch.world_size, [said] * launch.world_size
    if world > 1:
        patience = timedelta(seconds=MEET_SECONDS - 5)  # whoever waits in the store keeps it from others
        dist.init_process_group("gloo", store=store, rank=launch.rank, world_size=world, timeout=patience)
        dist.all_gather_object(everything, said)
    found: list[Finding] = [(one["node"], problem) for one in everything for problem in one["problems"]]
    found += unlike([(one["node"], one["facts"]) for one in everything])
    said["figures"] = f"{len({one['node'] for one in everything})} node(s), {world} process(es) on {device.type}"
    if world > 1 and not found:
        what = f"reading what the first node wrote to run.folder={run}"
        read = partial(read_soon, run / everything[0]["probe"] / "step_00000000")
        problems = run_checks([(what, read, "it must be on a file system that all nodes share")], LOOK_SECONDS / 2)
        dist.barrier()
        clock = time.time()
        wrong, speed = all_reduce(launch, device)
        if wrong:
            cause = "a cable, switch or memory is faulty; leave this node out (sbatch --exclude)"
            problems.append(f"an all-reduce came out wrong in {wrong} numbers: {cause}")
        dist.all_gather_object(everything, {"node": said["node"], "problems": problems, "clock": clock, "speed": speed})
        clocks = [one["clock"] for one in everything]
        for one in everything:
            found += [(one["node"], problem) for problem in one["problems"]]
            if abs(off := one["clock"] - statistics.median(clocks)) > CLOCK_SECONDS:
                found.append((one["node"], f"its clock is {off:+.1f} s off the others': have NTP set up there"))
        said["figures"] += f", all-reduce {min(one['speed'] for one in everything):.2f} GB/s"
        said["figures"] += f", clocks within {1000 * (max(clocks) - min(clocks)):.0f} ms"
    return list(dict.fromkeys(found))


def all_reduce(launch: Launch, device: torch.device) -> tuple[int, float]:
    """Sum a tensor, by gloo, or NCCL on GPUs. Return how many numbers are wrong, and the bus bandwidth. Collective."""
    world, group = launch.world_size, dist.group.WORLD  # gloo
    if device.type == "cuda":
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl")  # type: ignore[assignment]
    pattern = torch.arange(PROBE_BYTES // 4, device=device, dtype=torch.float32) % 1024
    for _ in range(2):  # the first one connects
        values = pattern + launch.rank
        values[0].item()  # waits for the device
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        values[0].item()
        seconds = time.perf_counter() - began
    wrong = int((values != pattern * world + sum(range(world))).sum())
    # In GB/s, as NCCL's tests count it.
    return wrong, 2 * (world - 1) / world * PROBE_BYTES / seconds / 1e9


def run_checks(checks: Iterable[Check], seconds: float) -> list[str]:
    """Run all checks at the same time; return what is wrong, also of those that do not end in time."""
    found, deadline, pool = [], time.monotonic() + seconds, ThreadPoolExecutor(max_workers=32)
    for what, future, advice in [(what, pool.submit(check), advice) for what, check, advice in checks]:
        try:
            future.result(max(deadline - time.monotonic(), 0))
        except Exception as error:
            reason = " ".join(str(error).split())[:1000] or f"no answer in {seconds:.0f} s, it is very slow or hangs"
            found.append(f"{what} failed ({reason}): {advice}")
    return found


def multiply(device: torch.device) -> None:
    """Multiply two matrices on a device, and compare with another way of computing."""
    generator = torch.Generator().manual_seed(0)
    # Small whole numbers: every product and sum is exact in float32, so that one wrong bit shows.
    a, b = (torch.randint(-8, 9, (1024, 1024), generator=generator).float() for _ in range(2))
    if wrong := int(((a.to(device) @ b.to(device)).cpu().sum(1) != a @ b.sum(1)).sum()):
        raise ValueError(f"{wrong} of 1024 rows are wrong")


def inspect_gpus(launch: Launch) -> None:
    """Find GPUs that Slurm gave and torch lacks, or whose memory had errors that could not be corrected."""
    promised, usable = os.environ.get("SLURM_GPUS_ON_NODE"), torch.cuda.device_count()
    if promised and usable < min(int(promised), launch.local_world_size):
        raise ValueError(f"{usable} can be used, Slurm gave {promised}; an old driver looks like this too")
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=LOOK_SECONDS, check=True).stdout
        if errors := re.findall(r"^(\d+), ([1-9]\d*)$", answer, re.MULTILINE):
            raise ValueError(f"uncorrected memory errors, GPU and how many: {errors}")


def write_probe(folder: Path, name: str) -> None:
    """Write a checkpoint, read it, and look for room for one as large as the largest there."""
    tensors = {"student": {"probe": torch.rand(PROBE_BYTES // 4)}}
    classes, probe = load_class_set(DEFAULT), folder / name / "step_00000000"
    probe.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(probe, tensors, progress=Progress(), config={}, data={}, classes=classes, keep=1)
    read_checkpoint(probe)
    checkpoints = [path for path in folder.glob("checkpoints/step_*") if path.is_dir()]
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in checkpoints]
    free, needed = shutil.disk_usage(folder).free, max([PROBE_BYTES, *sizes])
    if free < needed:
        raise ValueError(f"{free / 2**30:.2f} GiB are free, {needed / 2**30:.2f} are needed")


def read_soon(probe: Path) -> None:
    """Read what another node wrote; network file systems may show a new file late."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not (probe / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    read_checkpoint(probe)


def read_samples(config: RunConfig, name: str, turn: Lock) -> None:
    """Decode five images of a shard set. Bad ones may be among them, as ``data.bad_sample_limit`` allows.

    Args:
        turn: held while an index is opened: numpy does so by Python's parser, which threads confuse (Python 3.11).
    """
    folder, limit = config.data.root / name, config.data.bad_sample_limit
    if is_stream(name) or name in rendered_sets(config):
        return  # nothing but reading it all checks a stream; scenes the run makes, finishes or checks itself
    with turn:
        reader = ShardReader(folder, bad_limit=limit)
    numbers = sorted({(len(reader) - 1) * part // 4 for part in range(5)})
    samples = [reader.read(number, with_label=False) for number in numbers]
    bad = [sample for sample in samples if isinstance(sample, BadSample)]
    if len(bad) == len(numbers) or (bad and limit == 0):
        raise ValueError(f"{len(bad)} of {len(numbers)} samples tried cannot be used, first {bad[0]}")


def compare_classes(config: RunConfig, turn: Lock) -> None:
    """Find shard sets whose classes are not those of the others, groups that none has, and labels that are missing.

    Sets that are not there or damaged are told where they are read, and not a second time.

    Args:
        turn: as for ``read_samples``.
    """
    named = {name for names in sets_of(config).values() for name in names if not is_stream(name)}
    if all((config.data.root / name).exists() for name in named - set(rendered_sets(config))):
        with turn, suppress(DataError, StorageError):
            check_data(config)


def unlike(told: Sequence[tuple[str, dict[str, str]]]) -> Iterator[Finding]:
    """Find the nodes where something is not as on most; where there is no majority, all of them."""
    for name in told[0][1]:
        values = [facts[name] for _, facts in told]
        for node, facts in told:
            if 2 * values.count(facts[name]) <= len(values):
                others = " or ".join(sorted(set(values) - {facts[name]}))
                yield node, f"{name} is {facts[name]}, elsewhere {others}: it has to be the same on all nodes"


def tell(folder: Path, found: Sequence[Finding], figures: str, launch: Launch) -> None:
    """Print what was found. For ``cluster.job``, write it and the nodes to stay away from, if others have none of it.

    Where no node is to blame, another attempt may go well, and the code says so.
    """
    problems = [f"{node}: {problem}" if node else problem for node, problem in found]
    print("".join(f"preflight: {line}\n" for line in problems or [f"all well, {figures}"]), end="", flush=True)
    blamed = sorted({node for node, _ in found if node})
    everywhere = len(blamed) >= launch.world_size // launch.local_world_size
    code = 0 if not found else EXIT_CONFIG if blamed else EXIT_HUNG
    report = {"code": code, "problems": problems, "nodes": [] if everywhere else blamed, **slurm_job_tag()}
    if launch.rank == 0:
        with suppress(OSError):
            write_atomically(folder / PREFLIGHT, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    end_process(main())
