"""Time the data pipeline: its rate by workers, its parts, and beside it the bare decoder and plain webdataset.

All ways read the same tars, cut crops of the same size before anything else is done to the pixels, and use the same
decoder. They take turns, so a disturbance of the machine hits all alike; ratios are medians over the rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchvision.io import ImageReadMode, decode_png
from webdataset import WebDataset

from mfm_dist.batch import UDABatch
from mfm_dist.config.class_files import load_class_set
from mfm_dist.config.schema import RunConfig, SelfTrainingSection, names_of
from mfm_dist.data import blocks as blocks_module
from mfm_dist.data import reader as reader_module
from mfm_dist.data.blocks import IndexedSamples
from mfm_dist.data.decoding import jpeg_decoder
from mfm_dist.data.pipeline import TrainPipeline
from mfm_dist.data.reader import ShardReader, read_member
from mfm_dist.errors import ConfigError
from mfm_dist.methods.augment import strong_augment
from mfm_dist.models.preprocessing import IMAGE_STD, normalise
from mfm_dist.profiling.step import cpu_name
from mfm_dist.rng import Stream, keyed_generator

FAR_STEP = 1_000_000
STARTS = 7
"""First batches timed at each of two steps."""


class Source:
    """What is measured: the shards of a run and how its blocks are made."""

    def __init__(self, config: RunConfig) -> None:
        """Open the shards. Raises UserError when they cannot be read."""
        self.config = config
        data = config.data
        classes = None if data.classes is None else load_class_set(data.classes)
        names = (*names_of(data.source), *names_of(data.target))
        if len(names) > 2 or data.target_labelled:
            raise ConfigError("this measures one source and one target: data.source=NAME data.target=NAME")
        self.readers = [ShardReader(data.root / name, classes=classes, decoder=data.decoder) for name in names]
        self.decode = jpeg_decoder(data.decoder)
        self.images_per_block = 2 * config.train.micro_batch
        for reader in self.readers:
            if any(row["image_format"] != b"jpg" for rows in reader.index.rows for row in rows[:1]):
                raise ConfigError(f"{reader.index.folder} holds other images than JPEG, which the bare decoder is for")

    def pipeline(self, workers: int, first_block: int = 0) -> TrainPipeline:
        return TrainPipeline(
            source=self.readers[0],
            target=self.readers[1],
            seed=self.config.seed,
            data=replace(self.config.data, workers=workers),
            micro_batch=self.config.train.micro_batch,
            rank=0,
            world_size=1,
            blocks_per_step=1,
            first_block=first_block,
        )


def crop(plane: Tensor, size: tuple[int, int], draws: np.random.Generator) -> tuple[slice, slice]:
    """Draw a uniform box."""
    top, left = (int(draws.integers(max(a - b, 0) + 1)) for a, b in zip(plane.shape[-2:], size, strict=True))
    return slice(top, top + size[0]), slice(left, left + size[1])


class BareDecoder:
    """Decodes and cuts the very samples of the pipeline's blocks, from memory: no file, no check, no batch."""

    def __init__(self, source: Source, blocks: int) -> None:
        self.source = source
        self.size = source.config.data.crop
        made = source.pipeline(0)._blocks
        self.encoded: list[list[tuple[Tensor, Tensor | None]]] = []
        for block in range(blocks):
            positions = range(block * source.config.train.micro_batch, (block + 1) * source.config.train.micro_batch)
            found: list[tuple[Tensor, Tensor | None]] = []
            for samples in (made.source, made.target):
                assert isinstance(samples, IndexedSamples)
                found += [self._members(samples, position) for position in positions]
            self.encoded.append(found)

    @staticmethod
    def _members(samples: IndexedSamples, position: int) -> tuple[Tensor, Tensor | None]:
        reader = samples.reader
        assert isinstance(reader, ShardReader)
        shard, row = reader.index.locate(samples.order.sample_at(position, 0))
        _, _, image, label, _ = reader.index.rows[shard][row].item()
        read = partial(read_member, partial(reader.read_into, shard))
        encoded = torch.from_numpy(read(image, "image"))
        return encoded, torch.from_numpy(read(label, "label")) if samples.with_label else None

    def block(self, number: int) -> None:
        draws = np.random.Generator(np.random.PCG64(number))
        for image, label in self.encoded[number % len(self.encoded)]:
            pixels = self.source.decode(image)
            box = crop(pixels, self.size, draws)
            pixels[:, box[0], box[1]].clone()
            if label is not None:
                decode_png(label, mode=ImageReadMode.UNCHANGED)[0][box].clone()


class PlainWebDataset(IterableDataset[tuple[tuple[Tensor, ...], ...]]):
    """A micro-batch of the source and one of the target by plain webdataset: no index, no check, no key."""

    def __init__(self, source: Source) -> None:
        self.tars = [sorted(map(str, reader.index.folder.glob("*.tar"))) for reader in source.readers]
        self.size = source.config.data.crop
        self.micro_batch = source.config.train.micro_batch
        self.decode = source.decode

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], ...]]:
        yield from zip(self._batches(0), self._batches(1), strict=False)

    def _batches(self, which: int) -> Iterator[tuple[Tensor, ...]]:
        draws = np.random.default_rng()
        batch: list[tuple[Tensor, ...]] = []
        while True:
            for members in WebDataset(self.tars[which], shardshuffle=False):
                pixels = self.decode(torch.frombuffer(bytearray(members["jpg"]), dtype=torch.uint8))
                box = crop(pixels, self.size, draws)
                found: tuple[Tensor, ...] = (pixels[:, box[0], box[1]],)
                if which == 0:
                    label = torch.frombuffer(bytearray(members["label.png"]), dtype=torch.uint8)
                    found += (decode_png(label, mode=ImageReadMode.UNCHANGED)[0][box],)
                batch.append(found)
                if len(batch) == self.micro_batch:
                    yield tuple(torch.stack(part) for part in zip(*batch, strict=True))
                    batch = []


def endless(source: Source, kind: str, workers: int) -> Callable[[int], object]:
    """Return a way to get the next micro-batch of source and target images."""
    if kind == "bare":
        return BareDecoder(source, 24).block
    if kind == "pipeline":
        ours = iter(source.pipeline(workers))
        return lambda _: next(ours)
    loader = DataLoader(PlainWebDataset(source), batch_size=None, num_workers=workers)
    theirs = iter(loader)
    return lambda _: next(theirs)


def one_core(source: Source, rounds: int, blocks: int) -> dict[str, Any]:
    """Run everything in this process, by its CPU time, which other load on the machine disturbs little."""
    ways = {kind: endless(source, kind, 0) for kind in ("bare", "pipeline", "webdataset")}
    return turns(ways, rounds, blocks, source.images_per_block, time.process_time)


def with_workers(source: Source, workers: int, rounds: int, blocks: int) -> dict[str, Any]:
    """Run with worker processes, by the clock on the wall."""
    ways = {kind: endless(source, kind, workers) for kind in ("pipeline", "webdataset")}
    return turns(ways, rounds, blocks, source.images_per_block, time.perf_counter)


def turns(
    ways: dict[str, Callable[[int], object]], rounds: int, blocks: int, images: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Measure seconds a block of each way, ``blocks`` of them in a turn, and the ratios of their rates."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            started = clock()
            for block in range(blocks):
                ways[name](number * blocks + block)
            if number:  # the first round is for caches and workers
                seconds[name].append((clock() - started) / blocks)
    found: dict[str, Any] = {f"{name}_images_per_second": images / statistics.median(s) for name, s in seconds.items()}
    for other in ("bare", "webdataset"):
        if other in seconds:
            ratios = [theirs / ours for theirs, ours in zip(seconds[other], seconds["pipeline"], strict=True)]
            found[f"pipeline_over_{other}"] = statistics.median(ratios)
    return {**found, "seconds_per_block": seconds}


@contextmanager
def timed(owner: Any, name: str, into: dict[str, float]) -> Iterator[None]:
    """Add the time in a function to ``into`` while the ``with`` lasts."""
    original = getattr(owner, name)

    def measured(*arguments: Any, **keywords: Any) -> Any:
        started = time.process_time()
        try:
            return original(*arguments, **keywords)
        finally:
            into[name] = into.get(name, 0.0) + time.process_time() - started

    setattr(owner, name, measured)
    try:
        yield
    finally:
        setattr(owner, name, original)


def parts(source: Source, blocks: int) -> dict[str, float]:
    """Measure the milliseconds that a block spends in each part, in one process."""
    spent: dict[str, float] = {}
    ours = iter(source.pipeline(0))
    for _ in islice(ours, 4):
        pass
    with (
        timed(reader_module, "read_member", spent),
        timed(reader_module, "decode_image", spent),
        timed(reader_module, "decode_label", spent),
        timed(blocks_module, "source_crop", spent),
        timed(blocks_module, "target_crop", spent),
    ):
        started = time.process_time()
        for _ in islice(ours, blocks):
            pass
        total = time.process_time() - started
    named = {
        "read": spent["read_member"],
        "decode": spent["decode_image"] + spent["decode_label"],
        "geometry": spent["source_crop"] + spent["target_crop"],
    }
    named["the rest"] = total - sum(named.values())
    return {name: 1000 * seconds / blocks for name, seconds in named.items()} | transfers(source, blocks)


def transfers(source: Source, blocks: int) -> dict[str, float]:
    """Measure the milliseconds to put a block where the training reads it, and to the GPU where there is one."""
    made = source.pipeline(0)
    batches: list[UDABatch] = list(islice(made, min(blocks, 4)))
    started = time.perf_counter()
    for batch in batches:
        torch.empty_like(batch.source_image).copy_(batch.source_image)
    found = {"copy of the source images": 1000 * (time.perf_counter() - started) / len(batches)}
    if torch.cuda.is_available():
        batches[0].to(torch.device("cuda"))  # the first takes memory from the driver
        torch.cuda.synchronize()
        started = time.perf_counter()
        for batch in batches:
            batch.to(torch.device("cuda"))
        torch.cuda.synchronize()
        found["to the GPU"] = 1000 * (time.perf_counter() - started) / len(batches)
    return found


def starts(source: Source) -> dict[str, float]:
    """Return seconds to the first batch at step 0 and at a far one, without the start of workers; medians of turns."""
    seconds: dict[int, list[float]] = {0: [], FAR_STEP: []}
    for _ in range(STARTS):
        for step, found in seconds.items():
            started = time.perf_counter()
            next(iter(source.pipeline(0, first_block=step * source.config.blocks_per_step)))
            found.append(time.perf_counter() - started)
    near, far = (statistics.median(found) for found in seconds.values())
    return {"step_0": near, f"step_{FAR_STEP}": far, "apart": far - near}


def augmentation(source: Source, rounds: int) -> dict[str, float]:
    """Jitter and blur one micro-batch in both forms: milliseconds, and how far apart the pictures are."""
    image = normalise(next(iter(source.pipeline(0))).target_image)
    spread = torch.tensor(IMAGE_STD).view(1, 3, 1, 1)
    seconds: dict[str, list[float]] = {"published": [], "fast": []}
    apart = []
    for number in range(rounds + 1):
        pictures = []
        for form, found in seconds.items():
            settings = SelfTrainingSection(jitter_prob=1.0, blur_prob=1.0, augment_form=form)  # type: ignore[arg-type]
            started = time.process_time()
            pictures.append(strong_augment(image, settings, keyed_generator(0, Stream.STRONG_AUGMENT, number)))
            if number:
                found.append(time.process_time() - started)
        apart.append(float(((pictures[0] - pictures[1]) * spread).abs().mean()))
    return {
        **{f"{form}_ms": 1000 * statistics.median(found) for form, found in seconds.items()},
        "difference_grey_levels": statistics.mean(apart),
    }


def measure_data(config: RunConfig, *, workers: list[int], rounds: int, blocks: int) -> dict[str, Any]:
    """Measure all figures, under the names that the JSON file has.

    Raises:
        UserError: for shards that are missing or damaged.
    """
    torch.set_num_threads(1)
    source = Source(config)
    sizes = {str(reader.index.folder): reader.index.manifest.image_sizes for reader in source.readers}
    return {
        "device": cpu_name(),
        "load_average": os.getloadavg(),
        "image_sizes": sizes,
        "crop": list(config.data.crop),
        "decoder": config.data.decoder,
        "one_core": one_core(source, rounds, blocks),
        "parts_ms_per_block": parts(source, blocks * 2),
        "images_per_block": source.images_per_block,
        "first_batch_seconds": starts(source),
        "augmentation": augmentation(source, rounds),
        "workers": {str(number): with_workers(source, number, rounds, blocks) for number in workers if number},
    }


def data_table(found: dict[str, Any]) -> str:
    """Return Markdown."""
    one = found["one_core"]
    rows = [
        "| one core, by CPU time | images/s | ours / this |",
        "|---|---|---|",
        f"| this pipeline | {one['pipeline_images_per_second']:.1f} | |",
        f"| bare decode and crop | {one['bare_images_per_second']:.1f} | {one['pipeline_over_bare']:.3f} |",
        f"| plain webdataset | {one['webdataset_images_per_second']:.1f} | {one['pipeline_over_webdataset']:.3f} |",
        "",
        "| workers | this pipeline, images/s | plain webdataset | ours / plain |",
        "|---|---|---|---|",
        *(
            f"| {number} | {row['pipeline_images_per_second']:.1f} | {row['webdataset_images_per_second']:.1f} | "
            f"{row['pipeline_over_webdataset']:.3f} |"
            for number, row in found["workers"].items()
        ),
        "",
        f"| a block of {found['images_per_block']} images | ms |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in found["parts_ms_per_block"].items()),
        *(f"| {name.replace('_', ' ')} | {1000 * s:.1f} |" for name, s in found["first_batch_seconds"].items()),
        *(f"| augmentation, {name.replace('_', ' ')} | {value:.2f} |" for name, value in found["augmentation"].items()),
    ]
    return "\n".join(rows)
