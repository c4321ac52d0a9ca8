"""From shards to blocks: what every rank trains on, and what it evaluates on.

Which samples a block holds and how they are cropped follows from (seed, block) alone. Rank, world size and workers
only decide who does the work, so all of them may change between two starts of a run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from mfm_dist.batch import BadSample, UDABatch
from mfm_dist.data.order import SampleOrder
from mfm_dist.data.reader import Sample, SampleError, ShardReader
from mfm_dist.data.transforms import source_crop, target_crop
from mfm_dist.errors import DataError
from mfm_dist.rng import Stream, keyed_generator

REPLACEMENT_TRIES = 8
"""Samples looked at for one place of a block, the first included, before the data is given up."""
PREFETCHED_BLOCKS = 4
"""Blocks each worker keeps ready."""
_ENDLESS = sys.maxsize


class TrainPipeline:
    """The endless stream of blocks of one rank.

    Block ``k`` holds positions ``k * micro_batch`` to ``(k + 1) * micro_batch - 1`` of the source stream and of the
    target stream, and goes to rank ``k mod world_size``. A step is ``blocks_per_step`` consecutive blocks.
    """

    def __init__(
        self,
        *,
        source: ShardReader,
        target: ShardReader,
        seed: int,
        crop: tuple[int, int],
        micro_batch: int,
        rank: int,
        world_size: int,
        blocks_per_step: int,
        workers: int,
        first_block: int = 0,
    ) -> None:
        """
        Args:
            source: labelled samples.
            target: samples whose labels, if there are any, are never read.
            seed: key of the order and of the crops.
            crop: height and width of every image of a block.
            micro_batch: source images, and as many target images, of a block.
            rank: of this process.
            world_size: number of processes; must divide ``blocks_per_step``.
            blocks_per_step: blocks that all ranks together consume in a step.
            workers: processes that read and decode; 0 does it in this one.
            first_block: where to start or go on.
        """
        assert 0 <= rank < world_size
        assert blocks_per_step % world_size == 0
        blocks = _Blocks(source=source, target=target, seed=seed, crop=crop, micro_batch=micro_batch)
        self._loader = DataLoader(
            blocks,
            batch_size=None,  # the data set yields whole blocks
            sampler=range(first_block + rank, _ENDLESS, world_size),
            num_workers=workers,
            prefetch_factor=PREFETCHED_BLOCKS if workers else None,
            worker_init_fn=_obey_only_the_parent,
            multiprocessing_context="fork" if workers else None,  # a spawned worker imports torch again, 2 s or more
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or the loader draws its worker seed from torch's global generator
        )

    def __iter__(self) -> Iterator[UDABatch]:
        """Yields this rank's blocks from ``first_block`` on, for ever.

        Raises:
            DataError: ``REPLACEMENT_TRIES`` samples in a row cannot be used.
        """
        for block in self._loader:
            if isinstance(block, DataError):
                raise block
            yield block


class _Blocks(Dataset["UDABatch | DataError"]):
    """Any block by its number."""

    def __init__(
        self, *, source: ShardReader, target: ShardReader, seed: int, crop: tuple[int, int], micro_batch: int
    ) -> None:
        self.source = source
        self.target = target
        self.seed = seed
        self.crop = crop
        self.micro_batch = micro_batch
        self.source_order = SampleOrder(count=len(source), seed=seed, stream=Stream.SOURCE_ORDER)
        self.target_order = SampleOrder(count=len(target), seed=seed, stream=Stream.TARGET_ORDER)

    def __getitem__(self, block: int) -> UDABatch | DataError:
        """Errors are returned: an exception raised in a worker arrives with that worker's traceback as its text."""
        try:
            return self._build(block)
        except DataError as error:
            return error

    def _build(self, block: int) -> UDABatch:
        positions = range(block * self.micro_batch, (block + 1) * self.micro_batch)
        bad: list[BadSample] = []
        source = [self._source(position, bad) for position in positions]
        target = [self._target(position, bad) for position in positions]
        return UDABatch(
            source_image=torch.stack([image for image, _ in source]),
            source_label=torch.stack([label for _, label in source]),
            target_image=torch.stack([image for image, _ in target]),
            target_valid=torch.stack([valid for _, valid in target]),
            block=block,
            bad_samples=tuple(bad),
        )

    def _source(self, position: int, bad: list[BadSample]) -> tuple[torch.Tensor, torch.Tensor]:
        sample = _read_or_replace(self.source, self.source_order, position, with_label=True, bad=bad)
        assert sample.label is not None
        return source_crop(
            sample.image, sample.label, self.crop, keyed_generator(self.seed, Stream.SOURCE_CROP, position)
        )

    def _target(self, position: int, bad: list[BadSample]) -> tuple[torch.Tensor, torch.Tensor]:
        sample = _read_or_replace(self.target, self.target_order, position, with_label=False, bad=bad)
        return target_crop(sample.image, self.crop, keyed_generator(self.seed, Stream.TARGET_CROP, position))


def _read_or_replace(
    reader: ShardReader, order: SampleOrder, position: int, *, with_label: bool, bad: list[BadSample]
) -> Sample:
    """The sample at ``position``, or the next one of the epoch that is whole; those that are not go into ``bad``."""
    refused: list[BadSample] = []
    for attempt in range(min(REPLACEMENT_TRIES, order.count)):
        found = _read(reader, order.probe(position, attempt), with_label=with_label)
        if isinstance(found, Sample):
            bad += refused
            return found
        refused.append(found)
    listed = "\n".join(f"  {sample}" for sample in refused)
    raise DataError(f"{len(refused)} samples in a row cannot be used, so none can stand in for another:\n{listed}")


def _read(reader: ShardReader, number: int, *, with_label: bool) -> Sample | BadSample:
    try:
        return reader.read(number, with_label=with_label)
    except SampleError as error:
        return error.bad


def _obey_only_the_parent(worker: int) -> None:  # noqa: ARG001  the loader passes the worker's number
    """Lets a worker outlive the signals that reach a whole process group or job (Ctrl-C, preemption by Slurm).

    The process it works for needs it to finish the step and save. It ends when that process says so, or is gone.
    """
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process on SIGTERM from ``parent``, or within a second of its death."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


class EvaluationItem(NamedTuple):
    """One turn of a rank. Exactly one of ``sample`` and ``bad`` is set; in a turn that only fills up, neither is."""

    number: int | None
    sample: Sample | None
    bad: BadSample | None


class EvaluationSet:
    """This rank's share of a labelled data set: every sample on exactly one rank, as many turns on each.

    Turns are equal in number because under ZeRO-3 every forward is collective; in a turn without a sample the rank
    still has to run one.
    """

    def __init__(self, reader: ShardReader, *, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size
        self._reader = reader
        self._numbers = range(rank, len(reader), world_size)
        self._turns = -(-len(reader) // world_size)

    def __len__(self) -> int:
        return self._turns

    def __iter__(self) -> Iterator[EvaluationItem]:
        for number in self._numbers:
            yield self._turn(number)
        for _ in range(self._turns - len(self._numbers)):
            yield EvaluationItem(None, None, None)

    def _turn(self, number: int) -> EvaluationItem:
        found = _read(self._reader, number, with_label=True)
        if isinstance(found, Sample):
            return EvaluationItem(number, found, None)
        return EvaluationItem(number, None, found)
