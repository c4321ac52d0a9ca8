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
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

from mfm_dist.data.manifest import Recipe, ShardRecord, conflict, is_complete
from mfm_dist.errors import ConfigError, DataError, StorageError, UserError

if TYPE_CHECKING:
    from mfm_dist.shards.writer import RawSample, ShardSetWriter

Report = Callable[[str], object]
"""Takes one line for the person who waits."""

NAMED = 20
"""Unusable samples that a message names; with more of them beyond the limit, packing stops early."""


class UnusableSampleError(DataError):
    """A sample that its source holds in a form that cannot be packed.

    Attributes:
        key: of the sample.
        reason: which file, and what is wrong with it.
        expected: whether the data set is known for such samples, so that they do not count as mistakes.
    """

    def __init__(self, *, key: str, reason: str, expected: bool) -> None:
        self.key = key
        self.reason = reason
        self.expected = expected
        super().__init__(reason)


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
    def bad_limit(self) -> float:
        """Share of the samples that may be unusable; those are left out and named."""

    @property
    def recipe(self) -> Recipe:
        """Everything that determines the bytes of the shards."""

    @property
    def command(self) -> str:
        """The command that packs it, without its ``--output``."""

    def sample(self, number: int) -> RawSample:
        """One sample; called in other processes. Raises UnusableSampleError."""


def pack(sets: Sequence[PackableSet], *, output: Path, workers: int, overwrite: bool, report: Report) -> None:
    """Writes what is missing of some data sets, all of them folders of ``output``.

    Args:
        overwrite: replace folders that hold other shards.

    Raises:
        ConfigError: folders hold other shards (all are named).
        DataError: more samples are unusable than may be; they are named, and whole shards are kept.
        StorageError: the disk is full, or ``output`` cannot be written to.
        UserError: a process was killed.
    """
    if all(conflict(one.folder, one.recipe) is None and is_complete(one.folder, one.recipe) for one in sets):
        report(f"{output} is complete: {', '.join(f'{one.folder.name} {one.samples}' for one in sets)} samples")
        return
    with only_writer(output, report):
        conflicts = {one.folder: problem for one in sets if (problem := conflict(one.folder, one.recipe))}
        if conflicts and not overwrite:
            fix = "Choose another output folder, or replace it with --overwrite"
            raise ConfigError([f"{problem}. {fix}" for problem in conflicts.values()])
        _write(sets, conflicts, workers, report)


def _write(sets: Sequence[PackableSet], replaced: Iterable[Path], workers: int, report: Report) -> None:
    """Writes every shard that is missing, then completes the folders."""
    from mfm_dist.shards.writer import ShardSetWriter, remove_shards

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
        if manifest.left_out:
            report(f"{writer.folder}: {len(manifest.left_out)} samples left out:{_some(manifest.left_out.values())}")


@dataclass(frozen=True)
class _Job:
    """One shard to be written."""

    source: PackableSet
    writer: ShardSetWriter
    number: int
    samples: range


@dataclass(frozen=True)
class _Made:
    """What came of a job."""

    record: ShardRecord
    mistakes: int
    """Samples left out that the data set is not known for."""


def _make_shards(jobs: list[_Job], workers: int, report: Report) -> None:
    """Writes the shards in several processes and notes each one that is finished."""
    with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_end_with_the_parent) as pool:
        running = {pool.submit(_make_shard, job.source, job.number, job.samples): job for job in jobs}
        progress = _Progress(jobs, report)  # after the fork, because a bar starts a thread
        withheld = _Withheld()
        try:
            for future in as_completed(running):
                job, made = running[future], future.result()
                if made.mistakes:
                    withheld.add(job, made)
                else:
                    job.writer.add(made.record)
                progress.advance(job, made.record)
            withheld.release()
        except BrokenProcessPool as error:
            raise UserError("a packing process was killed, by a signal or for want of memory; run it again") from error
        finally:
            progress.close()
            pool.shutdown(wait=False, cancel_futures=True)


def _make_shard(source: PackableSet, number: int, samples: range) -> _Made:
    """The unit of work of one process."""
    import torch

    from mfm_dist.shards.writer import write_shard

    torch.set_num_threads(1)  # there are as many processes as cores
    unusable: list[UnusableSampleError] = []

    def usable() -> Iterator[RawSample]:
        for index in samples:
            try:
                yield source.sample(index)
            except UnusableSampleError as error:
                unusable.append(error)

    record = write_shard(source.folder, number, usable(), source.class_names)
    left_out = {error.key: error.reason for error in unusable}
    return _Made(replace(record, left_out=left_out), sum(not error.expected for error in unusable))


@dataclass
class _Withheld:
    """Shards that lack samples by mistake. They count only when all is done and few enough are missing."""

    _waiting: dict[Path, list[tuple[_Job, _Made]]] = field(default_factory=dict)
    """By folder."""

    def add(self, job: _Job, made: _Made) -> None:
        """Raises DataError as soon as it is certain that too many samples are unusable, and there are many to name."""
        waiting = self._waiting.setdefault(job.source.folder, [])
        waiting.append((job, made))
        if _mistakes(waiting) > max(_allowed(job), NAMED):
            raise _refusal([waiting])

    def release(self) -> None:
        """Takes in the shards of each set within its limit; raises DataError for the others, to be made again."""
        refused = []
        for waiting in self._waiting.values():
            if _mistakes(waiting) > _allowed(waiting[0][0]):
                refused.append(waiting)
                continue
            for job, made in waiting:
                job.writer.add(made.record)
        if refused:
            raise _refusal(refused)


def _mistakes(waiting: list[tuple[_Job, _Made]]) -> int:
    return sum(made.mistakes for _, made in waiting)


def _refusal(refused: list[list[tuple[_Job, _Made]]]) -> DataError:
    parts = []
    for waiting in refused:
        job = waiting[0][0]
        reasons = sorted(reason for _, made in waiting for reason in made.record.left_out.values())
        parts.append(
            f"{job.source.folder}: {_mistakes(waiting)} of {job.source.samples} samples cannot be used, "
            f"{_allowed(job)} may be:{_some(reasons)}"
        )
    advice = (
        "Get those files again and repeat the command, or leave such samples out with --bad-limit SHARE. "
        "What is finished is kept"
    )
    return DataError("\n".join([*parts, advice]))


def _allowed(job: _Job) -> int:
    return int(job.source.bad_limit * job.source.samples)


def _some(reasons: Iterable[str]) -> str:
    """The first reasons, one a line, and how many more there are."""
    listed = list(reasons)
    more = [f"and {len(listed) - NAMED} more"] if len(listed) > NAMED else []
    return "".join(f"\n  {line}" for line in [*listed[:NAMED], *more])


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
def only_writer(output: Path, report: Report) -> Iterator[None]:
    """Keeps a second process waiting until the first one is through with ``output``.

    Raises:
        StorageError: it cannot be written to.
    """
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
