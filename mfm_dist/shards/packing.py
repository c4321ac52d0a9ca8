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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tqdm import tqdm

from mfm_dist.data.manifest import DatasetPlan, conflict, is_complete
from mfm_dist.data.shard_records import ShardRecord
from mfm_dist.errors import BadSample, ConfigError, DataError, StorageError, UserError

if TYPE_CHECKING:
    from mfm_dist.shards.writer import RawSample, ShardSetWriter

Report = Callable[[str], object]
"""Takes one line for the person who waits."""

NAMED = 20
"""Unusable samples that a message names; with more of them beyond the limit, packing stops early."""


@dataclass(frozen=True, kw_only=True)
class PackableSet(DatasetPlan, ABC):
    """A data set that can be packed: its samples by number, and all that determines them."""

    bad_limit: float = 0.0
    """Share of the samples that may be unusable; those are left out and named."""

    @abstractmethod
    def bytes_per_sample(self) -> int:
        """Estimate the room to ask for before packing."""

    @abstractmethod
    def sample(self, number: int) -> RawSample | BadSample:
        """Make one sample, or say why it cannot be used; called in other processes."""


def pack(sets: Sequence[PackableSet], *, output: Path, workers: int | None, overwrite: bool, report: Report) -> None:
    """Write what is missing of some data sets, all of them folders of ``output``.

    Args:
        workers: processes; None is one a core.
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
        _write(sets, conflicts, workers or len(os.sched_getaffinity(0)), report)


def _write(sets: Sequence[PackableSet], replaced: Iterable[Path], workers: int, report: Report) -> None:
    """Write every shard that is missing, then complete the folders."""
    from mfm_dist.shards.writer import ShardSetWriter, remove_shards

    for folder in replaced:
        remove_shards(folder)
    works = [_Work(one, ShardSetWriter(one)) for one in sets]
    for work in works:
        work.writer.require_free_space(work.source.bytes_per_sample())
    _make_shards(works, workers, report)
    for work in works:
        manifest, folder = work.writer.finish(), work.source.folder
        report(f"{folder}: {manifest.samples} samples in {len(manifest.shards)} shards")
        if manifest.left_out:
            report(f"{folder}: {len(manifest.left_out)} samples left out:{_some(manifest.left_out.values())}")


@dataclass
class _Work:
    """A data set on its way into its folder."""

    source: PackableSet
    writer: ShardSetWriter
    withheld: list[ShardRecord] = field(default_factory=list)
    """Shards that lack samples by mistake. They count only when all is done and few enough are missing."""
    mistakes: int = 0
    """Samples left out that the data set is not known for."""

    @property
    def allowed(self) -> int:
        """Mistakes there may be."""
        return int(self.source.bad_limit * self.source.samples)

    def take(self, record: ShardRecord, mistakes: int) -> None:
        """Note a shard that is written.

        Raises:
            DataError: as soon as it is certain that too many samples are unusable, and there are many to name.
        """
        if not mistakes:
            self.writer.add(record)
            return
        self.withheld.append(record)
        self.mistakes += mistakes
        if self.mistakes > max(self.allowed, NAMED):
            raise _refusal([self])


def _make_shards(works: list[_Work], workers: int, report: Report) -> None:
    """Write the shards in several processes. Raises DataError for sets with more unusable samples than may be."""
    jobs = [(work, shard) for work in works for shard in work.writer.pending]
    total = sum(len(shard.samples) for _, shard in jobs)
    with worker_pool(workers, "packing") as pool:
        running = {pool.submit(_make_shard, work.source, *shard): work for work, shard in jobs}
        started, images = time.monotonic(), 0
        # A bar on a terminal, a line for each shard elsewhere. After the fork, because a bar starts a thread.
        with tqdm(total=total, unit="image", disable=not sys.stderr.isatty()) as bar:
            for done, future in enumerate(as_completed(running), 1):
                work, (record, mistakes) = running[future], future.result()
                work.take(record, mistakes)
                images += record.samples
                bar.update(record.samples)
                if bar.disable:
                    rate = images / (time.monotonic() - started)
                    report(
                        f"{work.source.folder.name}/{record.file}: {record.samples} images, "
                        f"{record.bytes / 2**20:.1f} MiB ({done} of {len(jobs)} shards, {rate:.0f} images/s)"
                    )
    refused = [work for work in works if work.mistakes > work.allowed]
    for work in works:
        for record in work.withheld if work not in refused else ():
            work.writer.add(record)
    if refused:
        raise _refusal(refused)


def _make_shard(source: PackableSet, number: int, samples: range) -> tuple[ShardRecord, int]:
    """Write one shard, the unit of work of one process; count the samples left out by mistake."""
    from mfm_dist.shards.writer import write_shard

    bad: list[BadSample] = []

    def usable() -> Iterator[RawSample]:
        for index in samples:
            found = source.sample(index)
            if isinstance(found, BadSample):
                bad.append(found)
            else:
                yield found

    record = write_shard(source.folder, number, usable(), source.class_names)
    return replace(record, left_out={one.key: one.reason for one in bad}), sum(not one.expected for one in bad)


def _refusal(refused: list[_Work]) -> DataError:
    """Say which samples of some data sets cannot be used, and what to do."""
    parts = []
    for work in refused:
        reasons = sorted(reason for record in work.withheld for reason in record.left_out.values())
        parts.append(
            f"{work.source.folder}: {work.mistakes} of {work.source.samples} samples cannot be used, "
            f"{work.allowed} may be:{_some(reasons)}"
        )
    advice = (
        "Get those files again and repeat the command, or leave such samples out with --bad-limit SHARE. "
        "What is finished is kept"
    )
    return DataError("\n".join([*parts, advice]))


def _some(reasons: Iterable[str]) -> str:
    """List the first reasons, one a line, and how many more there are."""
    listed = list(reasons)
    more = [f"and {len(listed) - NAMED} more"] if len(listed) > NAMED else []
    return "".join(f"\n  {line}" for line in [*listed[:NAMED], *more])


@contextmanager
def worker_pool(workers: int, what: str) -> Iterator[ProcessPoolExecutor]:
    """Start processes of one thread each that end with this one; if the block raises, what waits is not begun.

    Raises UserError when one is killed, naming ``what`` they do; KeyboardInterrupt when that was Ctrl-C.
    """
    interrupts: list[int] = []
    with (
        _noting_ctrl_c(interrupts),
        ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_begin_worker) as pool,
    ):
        try:
            yield pool
        except BrokenProcessPool as error:
            time.sleep(0.5)  # Ctrl-C goes to all processes, and may reach this one after it has ended the others
            if interrupts:  # and what it raised here was lost
                raise KeyboardInterrupt from error
            why = f"a {what} process was killed, by a signal or for want of memory"
            raise UserError(f"{why}; run it again") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _noting_ctrl_c(interrupts: list[int]) -> Iterator[None]:
    """Note each Ctrl-C where it raises KeyboardInterrupt: in a finaliser, or a callback after a fork, that is lost."""

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    notes = threading.current_thread() is threading.main_thread()
    notes = notes and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if notes:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if notes:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _begin_worker() -> None:
    """Let a pool process end at once on Ctrl-C, and within a second when the command is killed."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()  # before torch is loaded, which takes a while
    import torch

    from mfm_dist.data.pipeline import end_with

    torch.set_num_threads(1)  # there are as many processes as cores
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


@contextmanager
def only_writer(output: Path, report: Report) -> Iterator[None]:
    """Keep a second process waiting until the first one is through with ``output``. Raises StorageError."""
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
