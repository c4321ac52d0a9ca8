"""1,024 ranks and 1 B samples in 100,000 shards, without the pictures: python -m tests.campaign.scale

Simulated is what each rank would hold and compute: the order of the samples, which blocks it trains on, the index of
the shards, their manifest, read from a file, rare-class sampling and an order that is held (10 M samples each). Exact
cover is counted over all 1 B positions by a vectorised twin of the order, which is compared with the order itself at
100,000 positions. Memory is what the process grew by, in the end and at the most meanwhile. One record is appended to
docs/benchmarks/scale.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from mfm_dist.data.index import HELD_BYTES
from mfm_dist.data.manifest import MANIFEST_FILE, Manifest, Recipe
from mfm_dist.data.order import FEISTEL_ROUNDS, FeistelPermutation, LaneOrder, RareClassOrder, SampleOrder
from mfm_dist.data.shard_records import ShardRecord, ShardRecords
from mfm_dist.rng import Stream, keyed_generator
from mfm_dist.storage import JsonLines

RECORD = Path(__file__).parents[2] / "docs" / "benchmarks" / "scale.jsonl"
RANKS, SAMPLES, SHARDS, RARE, MICRO_BATCH = 1024, 1_000_000_000, 100_000, 10_000_000, 2
COMPARED = 100_000
CHUNK = 4_000_000
"""Positions that the twin computes at a time."""
MOST_MIB, MOST_SECONDS = 200.0, 1.0
CLASSES = 19


def scramble(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, as ``order._scramble``, of uint64 [n]."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permuted(permutation: FeistelPermutation, places: np.ndarray) -> np.ndarray:
    """Return what a Feistel permutation gives at these places, int64 [n]: its vectorised twin, written anew."""
    half = np.uint64(permutation._half_bits)
    mask = np.uint64((1 << permutation._half_bits) - 1)
    keys = [np.uint64(key) for key in permutation._keys]
    assert len(keys) == FEISTEL_ROUNDS
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (scramble(right ^ key) & mask)
        values[outside] = left << half | right
        outside = outside[values[outside] >= permutation.count]
    return values.astype(np.int64)


def memory_mib(field: str) -> float:
    """Return what this process holds in memory now (``VmRSS``) or held at the most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


def measured(name: str, work: Callable[[], Any], found: dict[str, Any]) -> Any:
    """Do ``work``; note its seconds, what memory it left behind, and what it took at the most."""
    Path("/proc/self/clear_refs").write_text("5")  # the most that was held counts from here on
    before, began = memory_mib("VmRSS"), time.perf_counter()
    result = work()
    found[name] = {
        "seconds": round(time.perf_counter() - began, 3),
        "mib": round(memory_mib("VmRSS") - before, 1),
        "peak_mib": round(memory_mib("VmHWM") - before, 1),
    }
    print(f"{name}: {found[name]}", flush=True)
    return result


def blocks_of(rank: int, ranks: int, blocks: int) -> int:
    """Return how many of the first ``blocks`` blocks a rank trains on: those k with k mod ranks = rank."""
    return len(range(rank, blocks, ranks))


def cover(order: SampleOrder, samples: int) -> dict[str, Any]:
    """Count how often an epoch visits each sample, by the twin; compare the twin with the order itself."""
    generator = keyed_generator(order.seed, order.stream, 0)
    permutation = FeistelPermutation(samples, generator)
    seen = np.zeros(samples, dtype=bool)
    for first in range(0, samples, CHUNK):
        seen[permuted(permutation, np.arange(first, min(first + CHUNK, samples)))] = True
    places = np.random.default_rng(0).integers(0, samples, COMPARED)
    twin = permuted(permutation, places)
    differ = sum(order.sample_at(int(place), 0) != value for place, value in zip(places, twin.tolist(), strict=True))
    return {"samples": samples, "visited": int(seen.sum()), "compared": COMPARED, "twin_differs": int(differ)}


def lanes_cover(samples: int, shards: int, lanes: int) -> dict[str, Any]:
    """Walk one epoch of a lane order, block by block; say how many samples it visits and how often at most."""
    starts = np.linspace(0, samples, shards + 1).astype(np.int64)
    order = LaneOrder(starts, lanes=lanes, window=1000, micro_batch=1, seed=0, stream=Stream.SOURCE_ORDER)
    visits = np.zeros(samples, dtype=np.int64)
    for position in range(lanes * order.length):
        visits[order.sample_at(position, 0)] += 1
    twice = int((visits > 1).sum())
    return {"samples": samples, "unvisited": int((visits == 0).sum()), "twice": twice, "lanes": lanes}


def a_record(number: int, samples: int) -> ShardRecord:
    """One shard as a manifest has it."""
    return ShardRecord(
        file=f"{number:06d}.tar",
        samples=samples,
        bytes=samples * 100_000,
        sha256=f"{number + 1:064x}",
        index_sha256=f"{number + 2:064x}",
        image_sizes={"1024x2048": samples},
        pixel_counts={f"class {k}": samples * 10_000 * k for k in range(CLASSES)},
        classes_sha256=f"{number + 3:064x}",
    )


def write_manifest(file: Path, shards: int, samples: int) -> None:
    """Write the manifest of a data set."""
    records = ShardRecords(a_record(number, samples // shards) for number in range(shards))
    recipe = Recipe(generator="folder", version=1, arguments={})
    file.write_text(Manifest(name="a", classes=None, recipe=recipe, command="none", shards=records).to_json())


def read_manifest(shards: int, samples: int, per_rank: dict[str, Any]) -> None:
    """Measure what a manifest takes that is read; another process writes it, whose memory does not count."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / MANIFEST_FILE
        writer = get_context("fork").Process(target=write_manifest, args=(file, shards, samples))
        writer.start()
        writer.join()
        manifest = measured("manifest", lambda: Manifest.read(file), per_rank)
        per_rank["manifest"]["json_mib"] = round(file.stat().st_size / 2**20, 1)
    assert len(manifest.shards) == shards


def rare_classes(samples: int, per_rank: dict[str, Any]) -> None:
    """Measure rare-class sampling where each sample has enough of about every second class, which is much."""
    shard = min(1000, samples)
    pixels = np.random.default_rng(0).integers(0, 6000, (2 * shard, CLASSES), dtype=np.uint32)

    def statistics() -> Iterator[np.ndarray]:
        for number in range(samples // shard):
            yield pixels[number % shard :][:shard]

    names = tuple(f"class {k}" for k in range(CLASSES))
    drawn = measured(
        "rare_class_sampling",
        lambda: RareClassOrder(statistics(), class_names=names, temperature=0.01, min_pixels=3000, seed=0),
        per_rank,
    )
    measured("first_rare_batch", lambda: [drawn.sample_at(10**9 + i, 0) for i in range(MICRO_BATCH)], per_rank)
    per_rank["rare_class_sampling"] |= {"samples": drawn.count}


def simulate(*, ranks: int, samples: int, shards: int, rare: int) -> dict[str, Any]:
    """Return everything that was measured of one rank, and of all ranks together."""
    per_rank: dict[str, Any] = {}
    order = measured("order", lambda: SampleOrder(count=samples, seed=0, stream=Stream.SOURCE_ORDER), per_rank)
    last = samples // MICRO_BATCH - 1 - (samples // MICRO_BATCH - 1) % ranks
    measured("first_batch", lambda: [order.sample_at(MICRO_BATCH * last + i, 0) for i in range(MICRO_BATCH)], per_rank)
    starts = measured("starts", lambda: np.linspace(0, samples, shards + 1).astype(np.int64), per_rank)
    lanes = LaneOrder(starts, lanes=ranks, window=1000, micro_batch=MICRO_BATCH, seed=0, stream=Stream.SOURCE_ORDER)
    measured("first_batch_of_lanes", lambda: lanes.sample_at(MICRO_BATCH * last, 0), per_rank)
    held = SampleOrder(count=rare, seed=0, stream=Stream.SOURCE_ORDER)
    measured("order_that_is_held", lambda: held.sample_at(0, 0), per_rank)
    read_manifest(shards, samples, per_rank)
    rare_classes(rare, per_rank)
    per_rank["indexes"] = {"mib": HELD_BYTES / 2**20, "peak_mib": HELD_BYTES / 2**20}
    blocks = samples // MICRO_BATCH
    shares = [blocks_of(rank, ranks, blocks) for rank in range(ranks)]
    return {
        "ranks": ranks,
        "samples": samples,
        "shards": shards,
        "per_rank": per_rank,
        "cover": cover(order, samples),
        "lanes": lanes_cover(min(samples, 1_000_000), min(shards, 1000), min(ranks, 64)),
        "blocks": {"all": sum(shares), "imbalance": max(shares) - min(shares)},
    }


def broken(found: dict[str, Any]) -> list[str]:
    """List the promises that a simulation breaks."""
    cover, per_rank = found["cover"], found["per_rank"]
    first = per_rank["order"]["seconds"] + per_rank["first_batch"]["seconds"]
    held = sum(part["mib"] for part in per_rank.values())
    meanwhile = max(part["peak_mib"] - part["mib"] for part in per_rank.values())
    checks = {
        "an epoch visits every sample once": cover["visited"] == cover["samples"],
        "the twin is the order": cover["twin_differs"] == 0,
        "lanes visit every sample": found["lanes"]["unvisited"] == 0,
        "lanes visit few twice": found["lanes"]["twice"] < found["lanes"]["lanes"],
        "every block has its rank": found["blocks"]["all"] == found["samples"] // MICRO_BATCH,
        "ranks differ by one block at most": found["blocks"]["imbalance"] <= 1,
        "the first batch's samples are known in a second": first < MOST_SECONDS,
        "a rank holds little, all together and at the most": held + meanwhile < MOST_MIB,
    }
    return [name for name, kept in checks.items() if not kept]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the simulation; return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.scale", description=__doc__)
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE", help="(%(default)s)")
    arguments = parser.parse_args(argv)
    found = simulate(ranks=RANKS, samples=SAMPLES, shards=SHARDS, rare=RARE)
    found["broken"] = broken(found)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    JsonLines(arguments.record).append({"date": date.today().isoformat(), "machine": machine, **found})
    print(json.dumps(found, indent=1))
    return 1 if found["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
