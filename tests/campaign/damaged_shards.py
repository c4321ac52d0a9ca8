#!/usr/bin/env python
"""Reads shards that are damaged in every way we know of; all that is bad must be named, all that is whole delivered.

python -m tests.campaign.damaged_shards [--count 1000] [--first 0] [--record FILE] [--summary FILE]

Each shard has 50 samples or more. It is read sample by sample, in a process of its own that is given 60 seconds, then
once through the training pipeline and once as a stream. One line of the record a shard; the sum goes into the summary.
A campaign that was interrupted goes on with the shards that are not on record.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from mfm_dist.config.schema import DataSection
from mfm_dist.data.pipeline import TrainPipeline
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import DataError
from mfm_dist.storage import JsonLines, write_atomically
from tests.helpers.damaged_shards import Damaged, damaged_shard, faults, outcome, stream_faults, streamed, whole_pixels

SECONDS = 60.0
"""After which a shard counts as hanging; one takes about a tenth of a second."""


def examine(number: int) -> dict[str, Any]:
    """Makes, reads and judges one shard."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        kind, damaged = damaged_shard(Path(work) / "shard", number)
        found = outcome(damaged)
        problems = faults(damaged, found, whole_pixels()) + through_the_pipeline(damaged, set(found.named))
        problems += stream_faults(damaged, streamed(damaged), whole_pixels())
    return {
        "shard": number,
        "kind": kind,
        "bad": len(damaged.bad),
        "named": len(found.named),
        "delivered": len(found.delivered),
        "faults": problems,
        "seconds": round(time.monotonic() - started, 3),
    }


def through_the_pipeline(damaged: Damaged, named: set[str]) -> list[str]:
    """One epoch of training blocks: replaced samples must be among those that were named."""
    reader = ShardReader(damaged.tar.parent, bad_limit=1.0)
    if not len(reader):
        return []
    pipeline = TrainPipeline(
        source=reader,
        target=reader,
        seed=0,
        data=DataSection(crop=(16, 24), workers=0),
        micro_batch=2,
        rank=0,
        world_size=1,
        blocks_per_step=1,
    )
    try:
        bad = {one.key for block in islice(pipeline, len(reader) // 2) for one in block.bad_samples}
    except DataError as error:
        return [] if "samples in a row cannot be used" in str(error) else [f"the pipeline ended: {error}"]
    return [f"the pipeline calls {key} bad, the reader does not" for key in sorted(bad - named)]


def guarded(number: int) -> dict[str, Any]:
    """``examine`` in a process that may crash or hang."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        sender.send(examine(number))

    process = context.Process(target=work)
    process.start()
    sender.close()
    record: dict[str, Any] = {"shard": number, "faults": []}
    try:
        if receiver.poll(SECONDS):
            record = receiver.recv()
        else:
            record["faults"] = [f"it hung for {SECONDS:g} s"]
    except EOFError:
        process.join(5)
        record["faults"] = [f"the process crashed with exit code {process.exitcode}"]
    process.kill()
    process.join()
    return record


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    faulty = [record for record in records if record["faults"]]
    return {
        "command": "python -m tests.campaign.damaged_shards",
        "date": date.today().isoformat(),
        "packages": {name: version(name) for name in ("torch", "torchvision", "numpy", "webdataset")},
        "shards": len(records),
        "bad_samples": sum(record.get("bad", 0) for record in records),
        "delivered_samples": sum(record.get("delivered", 0) for record in records),
        "crashes": sum("crashed" in text for record in faulty for text in record["faults"]),
        "hangs": sum("hung" in text for record in faulty for text in record["faults"]),
        "shards_with_a_fault": len(faulty),
        "shards_by_kind": dict(sorted(Counter(record.get("kind", "unknown") for record in records).items())),
        "slowest_seconds": max(record.get("seconds", SECONDS) for record in records),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 0 if nothing was other than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="shards (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first, which determines it (%(default)s)")
    parser.add_argument("--record", type=Path, default=Path("runs/campaign/damaged_shards.jsonl"))
    parser.add_argument("--summary", type=Path, default=Path("docs/benchmarks/damaged_shards.json"))
    arguments = parser.parse_args(argv)
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    lines = JsonLines(arguments.record)
    known = {record["shard"]: record for record in lines}
    records = []
    for number in range(arguments.first, arguments.first + arguments.count):
        record = known.get(number)
        if record is None:
            record = guarded(number)
            lines.append(record)
        records.append(record)
        for fault in record["faults"]:
            print(f"shard {number} ({record.get('kind', '?')}): {fault}")
    found = summary(records)
    write_atomically(arguments.summary, json.dumps(found, indent=1) + "\n")
    print(
        f"{found['shards']} shards, {found['bad_samples']} bad samples: {found['crashes']} crashes, {found['hangs']} "
        f"hangs, {found['shards_with_a_fault']} shards with a fault"
    )
    return 1 if found["shards_with_a_fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
