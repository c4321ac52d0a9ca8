"""One block: its samples taken, cropped and put into a single piece of memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mfm_dist.batch import UDABatch
from mfm_dist.config.schema import DataSection
from mfm_dist.data.block_pool import BlockPool
from mfm_dist.data.concatenated import ConcatenatedReader
from mfm_dist.data.order import Order
from mfm_dist.data.reader import Sample, ShardReader
from mfm_dist.data.transforms import RareClassTarget, Resize, source_crop, target_crop
from mfm_dist.errors import BadSample, DataError, StorageError
from mfm_dist.rng import Stream, keyed_generator

REPLACEMENT_TRIES = 8
"""Samples looked at for one place of a block, the first included, before the data is given up."""
BYTES_PER_PIXEL = 3 + 1 + 3 + 1
"""Source image and label, target image and validity."""
BYTES_PER_LABELLED = 3 + 1
"""Labelled target image and label, where there are any."""


class DrawnSample(NamedTuple):
    """A sample, and the class it was drawn for under rare class sampling."""

    sample: Sample
    wanted: int | None


class Samples(Protocol):
    """Where a block takes its samples from."""

    def take(self, position: int, bad: list[BadSample]) -> DrawnSample:
        """Return the sample at ``position``, or the one in its place; those that cannot be used go into ``bad``."""


@dataclass(kw_only=True)
class IndexedSamples:
    """Samples that can be read by number, in a given order."""

    reader: ShardReader | ConcatenatedReader
    order: Order
    with_label: bool

    def take(self, position: int, bad: list[BadSample]) -> DrawnSample:
        """Raise DataError when ``REPLACEMENT_TRIES`` samples one after the other cannot be used."""
        refused: list[BadSample] = []
        for attempt in range(min(REPLACEMENT_TRIES, self.order.count)):
            found = self.reader.read(self.order.sample_at(position, attempt), with_label=self.with_label)
            if isinstance(found, Sample):
                bad += refused
                return DrawnSample(found, self.order.wanted(position, attempt))
            refused.append(found)
        raise nothing_to_use(refused)


def nothing_to_use(refused: list[BadSample]) -> DataError:
    """Say that the data is given up, and why."""
    listed = "\n".join(f"  {sample}" for sample in refused)
    return DataError(f"{len(refused)} samples in a row cannot be used, so none can stand in for another:\n{listed}")


@dataclass(frozen=True)
class PackedBlock:
    """A block as it travels between processes: all pixels in one piece of memory."""

    pixels: Tensor | int
    """uint8 [bytes], or the slot of a ``BlockPool`` that holds it."""
    shape: tuple[int, int, int]
    """B, h, w."""
    block: int
    bad_samples: tuple[BadSample, ...]

    def batch(self, pool: BlockPool, *, pinned: bool) -> UDABatch:
        """Return the block, in page-locked memory if it is to be ``pinned``."""
        pixels = self.pixels if isinstance(self.pixels, Tensor) else pool.lend(self.pixels)
        if pinned:
            pixels = pixels.pin_memory()
        return unpacked(pixels, self.shape, self.block, self.bad_samples)


def unpacked(
    pixels: Tensor, shape: tuple[int, int, int], block: int, bad_samples: tuple[BadSample, ...] = ()
) -> UDABatch:
    """View the pixels of a block; images are [B, 3, h, w] with their channels innermost in memory."""
    size, height, width = shape
    plane = math.prod(shape)
    pairs = pixels.view(-1, (3 + 1) * plane)  # of an image and one byte more a pixel
    images = [pair[: 3 * plane].view(size, height, width, 3).permute(0, 3, 1, 2) for pair in pairs]
    others = [pair[3 * plane :].view(shape) for pair in pairs]
    has_labelled = len(pairs) > BYTES_PER_PIXEL // (3 + 1)
    return UDABatch(
        source_image=images[0],
        source_label=others[0],
        target_image=images[1],
        target_valid=others[1].view(torch.bool),
        labelled_target_image=images[2] if has_labelled else None,
        labelled_target_label=others[2] if has_labelled else None,
        block=block,
        bad_samples=bad_samples,
    )


class BlockViews(NamedTuple):
    """Where the pixels of each sample of a block go: views of the block's memory."""

    source: list[tuple[Tensor, Tensor]]
    """uint8 [3, h, w] and uint8 [h, w], its label."""
    target: list[tuple[Tensor, Tensor]]
    """uint8 [3, h, w] and bool [h, w], what is valid."""
    labelled_target: list[tuple[Tensor, Tensor]]
    """As source; empty where there are none."""


class Blocks(Dataset["PackedBlock | DataError"]):
    """Any block by its number."""

    def __init__(
        self,
        *,
        source: Samples,
        target: Samples,
        target_labelled: Samples | None = None,
        seed: int,
        data: DataSection,
        micro_batch: int,
    ) -> None:
        self.source = source
        self.target = target
        self.target_labelled = target_labelled
        self.seed = seed
        self.crop = data.crop
        self.shape = (micro_batch, *data.crop)
        bytes_per_pixel = BYTES_PER_PIXEL + (BYTES_PER_LABELLED if target_labelled else 0)
        self.size = math.prod(self.shape) * bytes_per_pixel
        """Bytes of a block."""
        self._pool: BlockPool | None = None
        self._places_of: dict[int, BlockViews] = {}
        """By slot of the pool. Making these views anew for every block takes about as long as cutting an image."""
        self.source_resize = Resize(box=data.source_resize, scale=data.scale_range)
        self.target_resize = Resize(box=data.target_resize, scale=data.scale_range)
        self.target_margins = data.target_margins
        self.wanted_pixels = data.rare_class_sampling.min_pixels * data.rare_class_sampling.min_crop_ratio

    def __getitem__(self, block: int) -> PackedBlock | DataError:
        """Return errors, too: an exception raised in a worker arrives with that worker's traceback as its text."""
        try:
            return self._build(block)
        except (DataError, StorageError) as error:  # of the disk that shards are copied to, too
            return DataError(str(error))

    def put_into(self, pool: BlockPool) -> None:
        """Fill slots of a pool from now on; without one, or where all are in use, each block gets memory of its own."""
        self._pool = pool
        self._places_of = {}

    def _build(self, block: int) -> PackedBlock:
        slot = self._pool.take() if self._pool else None
        if slot is None or not self._pool:
            pixels = torch.empty(self.size, dtype=torch.uint8)
            return PackedBlock(pixels, self.shape, block, self._fill(block, self._places(pixels)))
        if slot not in self._places_of:
            self._places_of[slot] = self._places(self._pool.fill(slot))
        try:
            bad = self._fill(block, self._places_of[slot])
        except (DataError, StorageError):
            self._pool.give_back(slot)
            raise
        return PackedBlock(slot, self.shape, block, bad)

    def _places(self, pixels: Tensor) -> BlockViews:
        """View the memory of a block, uint8 [``size``]."""
        batch = unpacked(pixels, self.shape, block=0)
        return BlockViews(
            source=list(zip(batch.source_image, batch.source_label, strict=True)),
            target=list(zip(batch.target_image, batch.target_valid, strict=True)),
            labelled_target=[]
            if batch.labelled_target_image is None or batch.labelled_target_label is None
            else list(zip(batch.labelled_target_image, batch.labelled_target_label, strict=True)),
        )

    def _fill(self, block: int, places: BlockViews) -> tuple[BadSample, ...]:
        """Put the pixels of a block into their places; return the samples that could not be used."""
        bad: list[BadSample] = []
        first = block * self.shape[0]
        for position, into in enumerate(places.source, first):
            sample, train_id = self.source.take(position, bad)
            self._crop_labelled(
                sample,
                keyed_generator(self.seed, Stream.SOURCE_CROP, position),
                resize=self.source_resize,
                wanted=None if train_id is None else RareClassTarget(train_id, self.wanted_pixels),
                into=into,
            )
        for position, into in enumerate(places.target, first):
            target_crop(
                self.target.take(position, bad).sample.image,
                self.crop,
                keyed_generator(self.seed, Stream.TARGET_CROP, position),
                resize=self.target_resize,
                margins=self.target_margins,
                into=into,
            )
        for position, into in enumerate(places.labelled_target, first):
            assert self.target_labelled is not None
            self._crop_labelled(
                self.target_labelled.take(position, bad).sample,
                keyed_generator(self.seed, Stream.TARGET_LABELLED_CROP, position),
                resize=self.target_resize,
                wanted=None,
                into=into,
            )
        return tuple(bad)

    def _crop_labelled(
        self,
        sample: Sample,
        draws: np.random.Generator,
        *,
        resize: Resize,
        wanted: RareClassTarget | None,
        into: tuple[Tensor, Tensor],
    ) -> None:
        assert sample.label is not None
        source_crop(sample.image, sample.label, self.crop, draws, resize=resize, wanted=wanted, into=into)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "_places_of": {}}  # memory shared by a fork cannot be sent
