"""From shards to blocks: what every rank trains on, and what it evaluates on.

Which samples a block holds and how they are cropped follows from (seed, block) alone. Rank, world size and workers
only decide who does the work, so all of them may change between two starts of a run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from mfm_dist.batch import UDABatch
from mfm_dist.config.schema import DataSection
from mfm_dist.data.block_pool import BlockPool
from mfm_dist.data.blocks import Blocks, IndexedSamples, PackedBlock, Samples
from mfm_dist.data.concatenated import ConcatenatedReader
from mfm_dist.data.order import LaneOrder, MixedOrder, Order, RareClassOrder, SampleOrder
from mfm_dist.data.reader import Sample, ShardReader
from mfm_dist.data.streaming import ShardStream, StreamedSamples
from mfm_dist.errors import BadSample, ConfigError, DataError
from mfm_dist.rng import Stream, keyed_seed

PREFETCHED_BLOCKS = 4
"""Blocks each worker keeps ready."""
PREFETCHED_IMAGES = 2
"""Whole images of an evaluation that each worker keeps ready, or works on."""
_KEPT_BY_THE_HEAP = 24 << 20
"""Bytes; several decoded images, and below the 32 MiB from which on glibc learns nothing."""
_ENDLESS = sys.maxsize

TrainingSet = ShardReader | ConcatenatedReader | ShardStream


class TrainPipeline:
    """The endless stream of blocks of one rank.

    Block ``k`` holds positions ``k * micro_batch`` to ``(k + 1) * micro_batch - 1`` of the source stream and of the
    target stream, and goes to rank ``k mod world_size``. A step is ``blocks_per_step`` consecutive blocks.
    """

    def __init__(
        self,
        *,
        source: TrainingSet,
        target: TrainingSet,
        target_labelled: ShardReader | None = None,
        seed: int,
        data: DataSection,
        micro_batch: int,
        rank: int,
        world_size: int,
        blocks_per_step: int,
        first_block: int = 0,
    ) -> None:
        """
        Args:
            source: labelled samples.
            target: samples whose labels, if there are any, are never read.
            target_labelled: labelled samples of the target; None: blocks hold none.
            seed: key of the order and of the crops.
            data: crop, resize, rare class sampling, lanes and the number of worker processes.
            micro_batch: source images, and as many target images, of a block.
            rank: of this process.
            world_size: number of processes; must divide ``blocks_per_step``.
            blocks_per_step: blocks that all ranks together consume in a step.
            first_block: where to start or go on.

        Raises:
            ConfigError: no sample holds enough pixels of a class for rare class sampling.
            DataError: rare class sampling is on and there are no class statistics.
        """
        assert 0 <= rank < world_size
        assert blocks_per_step % world_size == 0
        workers = data.workers

        def samples(origin: TrainingSet, stream: Stream) -> Samples:
            labelled = stream is not Stream.TARGET_ORDER
            if not isinstance(origin, ShardStream):
                order = _order(origin, stream, seed=seed, data=data, micro_batch=micro_batch)
                return IndexedSamples(reader=origin, order=order, with_label=labelled)
            return StreamedSamples(
                origin=origin,
                with_label=labelled,
                seed=seed,
                stream=stream,
                start=first_block,
                consumer=rank * max(workers, 1),
                consumers=world_size * max(workers, 1),
            )

        self._blocks = Blocks(
            source=samples(source, Stream.SOURCE_ORDER),
            target=samples(target, Stream.TARGET_ORDER),
            target_labelled=None if target_labelled is None else samples(target_labelled, Stream.TARGET_LABELLED_ORDER),
            seed=seed,
            data=data,
            micro_batch=micro_batch,
        )
        self._workers = workers
        self._held = blocks_per_step // world_size
        self._numbers = range(first_block + rank, _ENDLESS, world_size)

    def __iter__(self) -> Iterator[UDABatch]:
        """Yield this rank's blocks from ``first_block`` on, for ever.

        Raises:
            DataError: ``REPLACEMENT_TRIES`` samples in a row cannot be used.
        """
        # A worker has blocks that are ready, one in its hands, and some that this process has not done with yet.
        slots = PREFETCHED_BLOCKS + 2 + -(-self._held // max(self._workers, 1))
        pool = BlockPool(workers=self._workers, slots=slots, size=self._blocks.size)
        self._blocks.put_into(pool)
        # glibc's heap keeps free memory up to twice the largest piece it saw freed. With less than a few images it
        # gives pages back after one decode and gets them again, cleared, for the next: up to 4 % of a block.
        torch.empty(_KEPT_BY_THE_HEAP, dtype=torch.uint8)
        pinned = torch.cuda.is_available()
        for block in self._by_workers() if self._workers else map(self._blocks.__getitem__, self._numbers):
            if isinstance(block, DataError):
                raise block
            yield block.batch(pool, pinned=pinned)

    def _by_workers(self) -> DataLoader[PackedBlock | DataError]:
        """Yield the same blocks in the same order, made by other processes."""
        return DataLoader(
            self._blocks,
            batch_size=None,  # the data set yields whole blocks
            sampler=self._numbers,
            num_workers=self._workers,
            prefetch_factor=PREFETCHED_BLOCKS,
            worker_init_fn=_obey_only_the_parent,
            multiprocessing_context="fork",  # a spawned worker imports torch again, which takes 2 s or more
            generator=torch.Generator(),  # or the loader draws its worker seed from torch's global generator
        )


def _order(
    reader: ShardReader | ConcatenatedReader, stream: Stream, *, seed: int, data: DataSection, micro_batch: int
) -> Order:
    """Make the order that the configuration asks for; with shares, each set has one of its own."""
    rare = data.rare_class_sampling
    if isinstance(reader, ConcatenatedReader) and reader.shares:
        orders = []
        for number, one in enumerate(reader.readers):
            own_seed = keyed_seed(seed, Stream.SET_SEED, number)
            try:
                orders.append(_order(one, stream, seed=own_seed, data=data, micro_batch=micro_batch))
            except ConfigError as error:
                raise ConfigError([f"{one.index.folder}: {text}" for text in error.problems]) from error
        return MixedOrder(orders, reader.shares, seed=seed, stream=stream)
    if rare.enabled and stream is Stream.SOURCE_ORDER:
        return RareClassOrder(
            reader.class_statistics(),
            class_names=reader.classes.names if reader.classes else (),
            temperature=rare.temperature,
            min_pixels=rare.min_pixels,
            seed=seed,
        )
    if data.lanes and stream is not Stream.TARGET_LABELLED_ORDER:
        return LaneOrder(
            reader.starts,
            lanes=data.lanes,
            window=data.lane_window,
            micro_batch=micro_batch,
            seed=seed,
            stream=stream,
        )
    return SampleOrder(count=len(reader), seed=seed, stream=stream)


def _obey_only_the_parent(worker: int) -> None:  # noqa: ARG001  the loader passes the worker's number
    """Let a worker outlive the signals that reach a whole process group or job (Ctrl-C, preemption by Slurm).

    The process it works for needs it to finish the step and save. It ends when that process says so, or is gone.
    """
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    """End this process on SIGTERM from ``parent``, or within a second of its death."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


class EvaluationItem(NamedTuple):
    """One turn of a rank."""

    number: int
    found: Sample | BadSample | None
    """None in a turn that only fills up."""


class EvaluationSet:
    """This rank's share of a data set: every sample on exactly one rank, as many turns on each.

    Turns are equal in number because under ZeRO-3 every forward is collective; in a turn without a sample the rank
    still has to run one. Threads decode ahead, for decoders let go of Python's lock.
    """

    def __init__(
        self,
        reader: ShardReader,
        *,
        rank: int,
        world_size: int,
        most: int | None = None,
        with_label: bool = True,
        workers: int = 0,
    ) -> None:
        """
        Args:
            most: samples to take, the first ones; None: all.
            workers: threads that decode ahead of whoever iterates; 0: it decodes itself.
        """
        assert 0 <= rank < world_size
        self._reader = reader
        self._with_label = with_label
        self._workers = workers
        self.samples = len(reader) if most is None else min(most, len(reader))
        """Of all ranks."""
        turns = -(-self.samples // world_size)
        self._numbers = range(rank, turns * world_size, world_size)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[EvaluationItem]:
        if not self._workers:
            yield from (self._read(self._reader, number) for number in self._numbers)
            return
        own = threading.local()  # the open files of a reader are no two threads'

        def read(number: int) -> EvaluationItem:
            return self._read(own.reader, number)

        threads = ThreadPoolExecutor(self._workers, initializer=lambda: setattr(own, "reader", copy(self._reader)))
        try:
            ahead: deque[Future[EvaluationItem]] = deque()
            for number in self._numbers:
                ahead.append(threads.submit(read, number))
                if len(ahead) > PREFETCHED_IMAGES * self._workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)

    def _read(self, reader: ShardReader, number: int) -> EvaluationItem:
        there = number < self.samples
        return EvaluationItem(number, reader.read(number, with_label=self._with_label) if there else None)
