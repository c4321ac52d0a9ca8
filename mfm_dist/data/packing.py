"""Packs whole data sets into shards: several processes, progress, and going on where an earlier run stopped.

Nothing here loads torch before there is something to write, so finding everything complete takes no time.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

from mfm_dist.data.manifest import Recipe, ShardRecord, conflict, is_complete
from mfm_dist.errors import ConfigError, StorageError, UserError

if TYPE_CHECKING:
    from mfm_dist.data.shards import RawSample, ShardSetWriter

Report = Callable[[str], object]
"""Takes one line for the person who waits."""


class PackableSet(Protocol):
    """A data set that can be packed: its samples by number, and all that determines them."""

    @property
    def folder(self) -> Path:
        """Where its shards go."""

    @property
    def samples(self) -> int:
        """How many there are."""

    @property
    def shard_size(self) -> int:
        """Samples a shard."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Index = train id."""

    @property
    def bytes_per_sample(self) -> int:
        """Room asked for before packing."""

    @property
    def recipe(self) -> Recipe:
        """Everything that determines the bytes of the shards."""

    @property
    def command(self) -> str:
        """The command that packs it, without its ``--output``."""

    def sample(self, number: int) -> RawSample:
        """One sample; called in other processes."""


def pack(sets: Sequence[PackableSet], *, output: Path, workers: int, overwrite: bool, report: Report) -> None:
    """Writes what is missing of some data sets, all of them folders of ``output``.

    Args:
        overwrite: replace folders that hold other shards.

    Raises:
        ConfigError: folders hold other shards (all are named).
        DataError: a sample is impossible.
        StorageError: the disk is full, or ``output`` cannot be written to.
        UserError: a process was killed.
    """
    if all(conflict(one.folder, one.recipe) is None and is_complete(one.folder, one.recipe) for one in sets):
        report(f"{output} is complete: {', '.join(f'{one.folder.name} {one.samples}' for one in sets)} samples")
        return
    with _only_writer(output, report):
        conflicts = {one.folder: problem for one in sets if (problem := conflict(one.folder, one.recipe))}
        if conflicts and not overwrite:
            fix = "Choose another output folder, or replace it with --overwrite"
            raise ConfigError([f"{problem}. {fix}" for problem in conflicts.values()])
        _write(sets, conflicts, workers, report)


def _write(sets: Sequence[PackableSet], replaced: Iterable[Path], workers: int, report: Report) -> None:
    """Writes every shard that is missing, then completes the folders."""
    from mfm_dist.data.shards import ShardSetWriter, remove_shards

    for folder in replaced:
        remove_shards(folder)
    writers = [
        ShardSetWriter(
            one.folder,
            recipe=one.recipe,
            command=one.command,
            class_names=one.class_names,
            samples=one.samples,
            shard_size=one.shard_size,
        )
        for one in sets
    ]
    for one, writer in zip(sets, writers, strict=True):
        writer.require_free_space(one.bytes_per_sample)
    jobs = [
        _Job(one, writer, shard.number, shard.samples)
        for one, writer in zip(sets, writers, strict=True)
        for shard in writer.pending
    ]
    _make_shards(jobs, workers, report)
    for writer in writers:
        manifest = writer.finish()
        report(f"{writer.folder}: {manifest.samples} samples in {len(manifest.shards)} shards")


@dataclass(frozen=True)
class _Job:
    """One shard to be written."""

    source: PackableSet
    writer: ShardSetWriter
    number: int
    samples: range


def _make_shards(jobs: list[_Job], workers: int, report: Report) -> None:
    """Writes the shards in several processes and notes each one that is finished."""
    with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_end_with_the_parent) as pool:
        running = {pool.submit(_make_shard, job.source, job.number, job.samples): job for job in jobs}
        progress = _Progress(jobs, report)  # after the fork, because a bar starts a thread
        try:
            for future in as_completed(running):
                record = future.result()
                running[future].writer.add(record)
                progress.advance(running[future], record)
        except BrokenProcessPool as error:
            raise UserError("a packing process was killed, by a signal or for want of memory; run it again") from error
        finally:
            progress.close()
            pool.shutdown(wait=False, cancel_futures=True)


def _make_shard(source: PackableSet, number: int, samples: range) -> ShardRecord:
    """The unit of work of one process."""
    from mfm_dist.data.shards import write_shard

    return write_shard(source.folder, number, map(source.sample, samples), source.class_names)


def _end_with_the_parent() -> None:
    """Ends a pool process at once on Ctrl-C, and within a second when the command is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Progress:
    """A bar on a terminal, a line for each shard elsewhere."""

    def __init__(self, jobs: list[_Job], report: Report) -> None:
        self._report = report
        self._shards = len(jobs)
        self._done = 0
        self._images = 0
        self._started = time.monotonic()
        total = sum(len(job.samples) for job in jobs)
        self._bar = tqdm(total=total, unit="image", disable=not sys.stderr.isatty())

    def advance(self, job: _Job, record: ShardRecord) -> None:
        self._done += 1
        self._images += record.samples
        self._bar.set_description(job.source.folder.name)
        self._bar.update(record.samples)
        if self._bar.disable:
            rate = self._images / (time.monotonic() - self._started)
            self._report(
                f"{job.source.folder.name}/{record.file}: {record.samples} images, {record.bytes / 2**20:.1f} MiB "
                f"({self._done} of {self._shards} shards, {rate:.0f} images/s)"
            )

    def close(self) -> None:
        self._bar.close()


@contextmanager
def _only_writer(output: Path, report: Report) -> Iterator[None]:
    """Keeps a second process waiting until the first one is through with ``output``."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115  closed below, after waiting
    except OSError as error:
        raise StorageError(f"{output} cannot be written to: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"another process is writing to {output}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
