"""Before the hours of training, a minute: accelerate launch ... -m mfm_dist.cluster.preflight --config RUN.yaml

Looks at every node of a launch: versions, devices, folders, shards, and whether a checkpoint that one node writes is
read on the others; then, if all is well, at the network and the clocks. Each thing wrong is one line with the node's
name and what to do about it. Exit code 0 if nothing is, else 2; ``preflight.json`` in the run folder says the same.
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
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mfm_dist.checkpoint import DamagedError, Progress, read_checkpoint, write_checkpoint
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig, is_stream
from mfm_dist.data.manifest import MANIFEST_FILE
from mfm_dist.data.reader import SampleError, ShardReader
from mfm_dist.distributed.launch import Launch
from mfm_dist.errors import EXIT_CONFIG, EXIT_HUNG, UserError
from mfm_dist.run.folder import slurm_job_tag
from mfm_dist.run.signals import end_process
from mfm_dist.storage import write_atomically

REPORT = "preflight.json"
LOOK_SECONDS = 20.0
"""For what one process looks at by itself; so much less than ``ANSWER_SECONDS`` that it may start late."""
CLOCK_SECONDS = 2.5
"""Clocks further off make log files and heartbeats misleading; NTP keeps them within milliseconds."""
NETWORK = "can the nodes reach one another? MFM_NETWORK in slurm/site.env names the interface between them"

Finding = tuple[str | None, str]
"""The node, None if it is not known or cannot be blamed alone; what is wrong, and what to do about it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, the same on every process."""
    parser = argparse.ArgumentParser(
        prog="python -m mfm_dist.cluster.preflight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        peers = Peers(launch, node)
        found, figures = inspect(config, launch, peers)
        peers.part()
    except RuntimeError as error:  # torch's, of its store
        reason = str(error).partition("\n")[0][:200]
        found, figures = [(None, f"no word from the first process ({reason}): {NETWORK}")], ""
        print(f"preflight: {node}: {found[0][1]}", flush=True)
    if launch.rank == 0:
        for line in lines_of(found):
            print(f"preflight: {line}", flush=True)
        if not found:
            print(f"preflight: all well, {figures}, {time.monotonic() - began:.1f} s", flush=True)
        write_report(config, launch, found)
    return EXIT_CONFIG if found else 0


def inspect(config: RunConfig, launch: Launch, peers: Peers) -> tuple[list[Finding], str]:
    """All that is wrong, the same on every process; and figures for a person."""
    mine = {
        "node": peers.node,
        "problems": inspect_node(config, launch, peers),
        "facts": {**versions(), "the device": peers.device.type},
    }
    found = peers.agree("look", mine, lambda said: judge_looks(said, peers), peers.seconds_left())
    if peers.rank == 0:
        shutil.rmtree(_probe(config, peers), ignore_errors=True)
    figures = f"{max(1, launch.world_size // launch.local_world_size)} node(s), {peers.world_size} process(es) on "
    figures += peers.device.type
    if found or peers.world_size == 1:
        return found, figures
    if peers.rank == 0:  # should a device take the process with it
        write_report(config, launch, [(None, f"the exchange of data between the processes did not end: {NETWORK}")])
    exchanged: dict[str, Any] = {"node": peers.node}

    def exchange() -> Iterable[str]:
        exchanged.update(peers.exchange())
        return ()

    exchanged["problems"] = run_checks({"the exchange of data with the others": exchange}, EXCHANGE_SECONDS)
    found, more = peers.agree("exchange", exchanged, judge_exchanges, GRACE_SECONDS)
    return found, f"{figures}{more}"


def inspect_node(config: RunConfig, launch: Launch, peers: Peers) -> list[str]:
    """What one process finds wrong with its device and, once a node, with the node."""
    run, scratch, probe = config.run.folder, config.data.scratch, _probe(config, peers)
    is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"

    def device() -> Iterator[str]:
        if problem := device_problem(peers.device):
            yield f"{peers.device} {problem}: have it looked at"

    def written() -> Iterator[str]:
        problems = write_probe(probe)
        if not problems:
            peers.announce("probe")
        yield from problems

    def seen() -> Iterator[str]:
        if peers.is_announced("probe", LOOK_SECONDS / 2):  # else the first node tells why
            yield from read_probe(probe)

    checks: dict[str, Callable[[], Iterable[str]]] = {}
    if peers.rank == 0:  # before all else, for the others wait for it
        checks[f"a checkpoint in run.folder={run}"] = written
    checks[f"device {peers.device}"] = device
    if is_first_of_node:
        checks["nvidia-smi"] = lambda: gpu_problems(launch)
        checks[f"run.folder={run}"] = lambda: folder_problems("run.folder", run, space_needed(config))
        if scratch is not None:
            checks[f"data.scratch={scratch}"] = lambda: folder_problems("data.scratch", scratch, PROBE)
        checks[f"data.root={config.data.root}"] = lambda: shard_problems(config)
        checks[f"the checkpoint that the first node wrote to run.folder={run}"] = seen
    return run_checks(checks, LOOK_SECONDS)


def judge_looks(said: Sequence[dict[str, Any] | None], peers: Peers) -> list[Finding]:
    """What the nodes found by themselves, who is missing, and who is unlike the others."""
    found: list[Finding] = []
    absent = []
    for rank, one in enumerate(said):
        if one is not None:
            found += [(one["node"], problem) for problem in one["problems"]]
        elif node := peers.node_of(rank):
            found.append((node, f"began and said nothing for {ANSWER_SECONDS:.0f} s: it is very slow, or hangs"))
        else:
            absent.append(str(rank))
    if absent:
        who = f"process(es) {', '.join(absent)} of {len(said)} did not come within {ANSWER_SECONDS:.0f} s"
        found.append((None, f"{who}: node-*.log of the job may say why; {NETWORK}"))
    present = [one for one in said if one is not None]
    found += unlike([one["node"] for one in present], [one["facts"] for one in present])
    return list(dict.fromkeys(found))


def judge_exchanges(said: Sequence[dict[str, Any] | None]) -> tuple[list[Finding], str]:
    """What the exchange of tensors showed, and its figures."""
    well = [one for one in said if one is not None and not one["problems"]]
    if len(well) < len(said):
        problems = [f"{one['node']}: {one['problems'][0]}" for one in said if one is not None and one["problems"]]
        reason = "; ".join(dict.fromkeys(problems)) or "some processes ended in it"
        return [(None, f"the processes cannot exchange data ({reason}): {NETWORK}")], ""
    faulty = "a cable, switch or memory is faulty; leave this node out (sbatch --exclude)"
    found: list[Finding] = [(one["node"], f"{one['wrong']}: {faulty}") for one in well if one["wrong"]]
    clocks = [one["clock"] for one in well]
    found += wrong_clocks([one["node"] for one in well], clocks)
    speed = min(one["gb_per_second"] for one in well)
    apart = 1000 * (max(clocks) - min(clocks))
    return list(dict.fromkeys(found)), f", all-reduce {speed:.2f} GB/s, clocks within {apart:.0f} ms"


def unlike(nodes: Sequence[str], found: Sequence[Mapping[str, str]]) -> Iterator[Finding]:
    """Nodes where something is not as on most; where there is no majority, all of them."""
    for name in found[0]:
        (usual, count), *others = Counter(one[name] for one in found).most_common()
        for node, one in zip(nodes, found, strict=True) if others else ():
            here = one[name]
            if here != usual or 2 * count <= len(found):
                other, there = next((n, o[name]) for n, o in zip(nodes, found, strict=True) if o[name] != here)
                yield node, f"{name} is {here}, on {other} it is {there}: it has to be the same on all nodes"


def wrong_clocks(nodes: Sequence[str], clocks: Sequence[float]) -> Iterator[Finding]:
    """Nodes whose clock is far from the median; of two that are apart, both."""
    middle = statistics.median(clocks)
    for node, clock in zip(nodes, clocks, strict=True):
        if abs(clock - middle) > CLOCK_SECONDS:
            yield node, f"its clock is {clock - middle:+.1f} s off the others': have NTP set up there"


def lines_of(found: Sequence[Finding]) -> list[str]:
    """For people."""
    return [f"{node}: {problem}" if node else problem for node, problem in found]


def write_report(config: RunConfig, launch: Launch, found: Sequence[Finding]) -> None:
    """Tell ``cluster.job`` what was found, and the nodes to stay away from, where others have nothing wrong with them.

    Where no node is to blame, another attempt may go well, and the code says so.
    """
    blamed = sorted({node for node, _ in found if node is not None})
    everywhere = len(blamed) >= max(1, launch.world_size // launch.local_world_size)
    code = 0 if not found else EXIT_CONFIG if blamed else EXIT_HUNG
    report = {"code": code, "problems": lines_of(found), "nodes": [] if everywhere else blamed, **slurm_job_tag()}
    with suppress(OSError):
        write_atomically(config.run.folder / REPORT, json.dumps(report, indent=1) + "\n")


def _probe(config: RunConfig, peers: Peers) -> Path:
    """Where the first node writes a checkpoint for the others."""
    return config.run.folder / f".preflight_{peers.token}"


if __name__ == "__main__":
    end_process(main())


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
            world_size=1,
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


ANSWER_SECONDS = 35.0
"""For every process to start, look at its node and say what it saw, counted from the start of the first process."""
EXCHANGE_SECONDS = 15.0
"""For the exchange of tensors."""
GRACE_SECONDS = 2.0
"""For what takes no time when all is well. The first process needs less than a minute, whatever the others do."""
ELEMENTS = 1 << 22
"""Of the all-reduce, float32: 16 MiB."""
ROUNDS = 4
NORMAL = 1 << 10
"""Side of the matrices multiplied on a device."""


class Peers:
    """All processes of the launch."""

    def __init__(self, launch: Launch, node: str) -> None:
        """Meet the first of them.

        Args:
            node: name of the node that this process is on.

        Raises:
            RuntimeError: torch's, if it is not to be found.
        """
        self.rank, self.world_size, self.node = launch.rank, launch.world_size, node
        on_gpu = not launch.use_cpu and 0 < launch.local_world_size <= torch.cuda.device_count()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
        self.token = uuid.uuid4().hex
        """The same on every process, and no other launch's."""
        if self.world_size > 1:
            self._store = _store(self.rank)
            self._store.set(f"node/{self.rank}", node)
            if self.rank == 0:
                self._store.set("token", self.token)
            self.token = self._store.get("token").decode()
        self._began = time.monotonic()

    def seconds_left(self) -> float:
        """Of ``ANSWER_SECONDS``."""
        return ANSWER_SECONDS - (time.monotonic() - self._began)

    def announce(self, what: str) -> None:
        """Tell the others that something is there now."""
        if self.world_size > 1:
            self._store.set(what, "true")

    def is_announced(self, what: str, seconds: float) -> bool:
        """Whether it is, or will be within that time."""
        return self.world_size == 1 or bool(self._hear(what, seconds))

    def node_of(self, rank: int) -> str | None:
        """Where a process runs, None if it has not come. For the first process to ask."""
        key = f"node/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def agree(self, stage: str, mine: Any, judge: Callable[[Sequence[Any]], Any], seconds: float) -> Any:
        """Every process says something, the first one judges, and all get its answer. Collective.

        Args:
            mine: anything that JSON holds, as is the answer.
            judge: called with what each process said, in order of rank, None for one that was silent until then.
            seconds: to wait for all of them.

        Raises:
            RuntimeError: torch's, if the first process gives no answer.
        """
        if self.world_size == 1:
            return judge([mine])
        if self.rank == 0:
            deadline = time.monotonic() + seconds
            others = [self._hear(f"{stage}/{rank}", deadline - time.monotonic()) for rank in range(1, self.world_size)]
            self._store.set(f"{stage}/answer", json.dumps(judge([mine, *others])))
        else:
            self._store.set(f"{stage}/{self.rank}", json.dumps(mine))
        answer = f"{stage}/answer"
        self._store.wait([answer], timedelta(seconds=seconds + EXCHANGE_SECONDS))
        return json.loads(self._store.get(answer))

    def exchange(self) -> dict[str, Any]:
        """Tensors between all processes: gloo, or NCCL where every process has a GPU of its own. Collective.

        Returns:
            ``clock``, in seconds since 1970, just after all had met; ``wrong``, what is with the sum of an all-reduce
            on this process, or None; ``gb_per_second``, its bus bandwidth, 2 (n - 1) / n times the bytes over the time,
            as NCCL's tests count it.

        Raises:
            RuntimeError: torch's, if some process is not reached.
        """
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        patience = timedelta(seconds=2 * EXCHANGE_SECONDS)  # the caller's ends first
        dist.init_process_group(
            backend, store=self._store, rank=self.rank, world_size=self.world_size, timeout=patience
        )
        dist.barrier()
        clock = time.time()
        wrong, speed = self._all_reduce()
        dist.destroy_process_group()
        return {"clock": clock, "wrong": wrong, "gb_per_second": speed}

    def _all_reduce(self) -> tuple[str | None, float]:
        pattern = torch.arange(ELEMENTS, device=self.device, dtype=torch.float32) % 1024
        expected = pattern * self.world_size + sum(range(self.world_size))
        seconds, problem = [], None
        for _ in range(ROUNDS):
            values = pattern + self.rank
            self._synchronise()
            began = time.perf_counter()
            dist.all_reduce(values)
            self._synchronise()
            seconds.append(time.perf_counter() - began)
            if wrong := int((values != expected).sum()):
                problem = f"an all-reduce came out wrong in {wrong} of {ELEMENTS} numbers"
        share = 2 * (self.world_size - 1) / self.world_size
        return problem, share * expected.nbytes / min(seconds) / 1e9

    def part(self) -> None:
        """Leave; the first process, which the others ask, last. Collective."""
        self.announce(f"left/{self.rank}")
        if self.rank == 0:
            deadline = time.monotonic() + GRACE_SECONDS
            for rank in range(1, self.world_size):
                self._hear(f"left/{rank}", deadline - time.monotonic())

    def _hear(self, key: str, seconds: float) -> Any:
        try:
            self._store.wait([key], timedelta(seconds=max(seconds, 0.001)))
            return json.loads(self._store.get(key))
        except RuntimeError:
            return None

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _store(rank: int) -> Any:
    """Kept by the launcher of the first node, or by the first process."""
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serves,
        timeout=timedelta(seconds=ANSWER_SECONDS),
        wait_for_workers=False,
    )
    return dist.PrefixStore("preflight", store)  # type: ignore[attr-defined]


def device_problem(device: torch.device) -> str | None:
    """Whether a device multiplies two matrices as another way of computing does."""
    generator = torch.Generator().manual_seed(0)
    # Small whole numbers: every product and sum is exact in float32, so that one wrong bit shows.
    a, b = (torch.randint(-8, 9, (NORMAL, NORMAL), generator=generator).float() for _ in range(2))
    try:
        product = (a.to(device) @ b.to(device)).cpu()
    except RuntimeError as error:
        return f"cannot multiply two matrices ({' '.join(str(error).split())[:200]})"
    expected = a @ b.sum(1)  # of the rows of the product, at a thousandth of the cost
    wrong = int((product.sum(1) != expected).sum())
    return f"multiplies wrongly ({wrong} of {NORMAL} rows)" if wrong else None
