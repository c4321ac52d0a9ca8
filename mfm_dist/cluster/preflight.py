"""Before the hours of training, a minute: accelerate launch ... -m mfm_dist.cluster.preflight --config RUN.yaml

Looks at every node of a launch: versions, devices, folders, shards, and whether a checkpoint that one node writes is
read on the others; then, if all is well, at the network and the clocks. Each thing wrong is one line with the node's
name and what to do about it. Exit code 0 if nothing is, else 2; ``preflight.json`` in the run folder says the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.ending import end_process
from mfm_dist.distributed.launch import Launch
from mfm_dist.distributed.preflight_checks import (
    ANSWER_SECONDS,
    EXCHANGE_SECONDS,
    GRACE_SECONDS,
    Peers,
    device_problem,
)
from mfm_dist.errors import EXIT_CONFIG, EXIT_HUNG, UserError
from mfm_dist.node_checks import (
    PROBE,
    folder_problems,
    gpu_problems,
    read_probe,
    run_checks,
    shard_problems,
    space_needed,
    versions,
    write_probe,
)
from mfm_dist.outcome import whose
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
        "problems": look(config, launch, peers),
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


def look(config: RunConfig, launch: Launch, peers: Peers) -> list[str]:
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
    report = {"code": code, "problems": lines_of(found), "nodes": [] if everywhere else blamed, **whose()}
    with suppress(OSError):
        write_atomically(config.run.folder / REPORT, json.dumps(report, indent=1) + "\n")


def _probe(config: RunConfig, peers: Peers) -> Path:
    """Where the first node writes a checkpoint for the others."""
    return config.run.folder / f".preflight_{peers.token}"


if __name__ == "__main__":
    end_process(main())
