"""Small shard folders of random pictures, written by the real writer, then damaged or compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfm_dist.batch import UDABatch
from mfm_dist.classes import IGNORE_INDEX, ClassSet
from mfm_dist.data.manifest import DatasetPlan, Recipe
from mfm_dist.data.reader import ShardReader
from mfm_dist.shards.writer import RawSample, ShardSetWriter, write_shard
from tests.helpers.classes import CLASSES

ShardFolder = Callable[..., Path]
"""``shard_folder(name, count=..., shard_size=..., **keywords of raw_sample)``."""


def raw_sample(
    index: int, *, height: int = 32, width: int = 48, labelled: bool = True, num_classes: int = len(CLASSES)
) -> RawSample:
    """Draw blocks of 8 pixels: noise in the image, classes and some ignored blocks in the label."""
    generator = np.random.default_rng(index)
    blocks = (height // 8, width // 8)
    values = generator.choice([*range(num_classes), IGNORE_INDEX], size=blocks).astype(np.uint8)
    image = generator.integers(256, size=(*blocks, 3), dtype=np.uint8)
    return RawSample(
        key=f"sample_{index:04d}",
        image=image.repeat(8, axis=0).repeat(8, axis=1),
        label=values.repeat(8, axis=0).repeat(8, axis=1) if labelled else None,
        meta={"index": index},
    )


def write_set(
    folder: Path, *, count: int = 10, shard_size: int = 4, classes: ClassSet = CLASSES, **sample: object
) -> Path:
    """Write a finished folder of ``count`` samples."""
    recipe = Recipe(generator="test", version=1, arguments={"samples": count})
    plan = DatasetPlan(
        folder=folder,
        recipe=recipe,
        command="mfm-shards make test",
        classes=classes,
        samples=count,
        shard_size=shard_size,
    )
    writer = ShardSetWriter(plan)
    for shard in writer.pending:
        samples = [raw_sample(index, **sample) for index in shard.samples]
        writer.add(write_shard(folder, shard.number, samples, classes.names))
    writer.finish()
    return folder


def flip_bit(tar: Path, offset: int) -> None:
    """Flip one bit of a file in place; its size stays."""
    content = bytearray(tar.read_bytes())
    content[offset] ^= 1
    tar.write_bytes(content)


def damage(folder: Path, *numbers: int) -> None:
    """Flip a bit in the image of some samples."""
    index = ShardReader(folder).index
    for number in numbers:
        shard, row = index.locate(number)
        flip_bit(folder / f"{shard:06d}.tar", int(index.rows[shard][row]["image"]["offset"]) + 200)


def assert_equal(first: list[UDABatch], second: list[UDABatch]) -> None:
    """Compare blocks field by field, bit for bit."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for field in fields(UDABatch):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name
