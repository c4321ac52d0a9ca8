"""Rare class sampling against a slow reading of its definition (DAFormer)."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.class_statistics import read_statistics
from mfm_dist.data.manifest import DatasetPlan, Manifest, is_complete, statistics_path
from mfm_dist.data.order import RareClassOrder, class_probabilities
from mfm_dist.data.reader import ShardReader
from mfm_dist.data.transforms import CROP_TRIES, RARE_CLASS_TRIES, RareClassTarget, source_crop
from mfm_dist.errors import ConfigError, DataError
from mfm_dist.rng import Stream, keyed_generator
from mfm_dist.shards.writer import ShardSetWriter
from tests.helpers.classes import CLASSES
from tests.helpers.shards import ShardFolder, flip_bit, raw_sample

NAMES = ("road", "car", "train", "rider")
PIXELS = np.array([[900, 50, 0, 0], [800, 0, 120, 0], [700, 90, 101, 0], [950, 200, 0, 0]], dtype=np.uint32)


def order_of(*pixels: np.ndarray, temperature: float = 0.5, min_pixels: int = 100) -> RareClassOrder:
    return RareClassOrder(pixels or [PIXELS], class_names=NAMES, temperature=temperature, min_pixels=min_pixels, seed=3)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1e9])
def test_probabilities_are_the_softmax_of_the_definition(temperature: float) -> None:
    totals = [int(sum(row[c] for row in PIXELS.tolist())) for c in range(4)]
    present = [c for c in range(4) if totals[c] > 0]
    exponents = {c: (1 - totals[c] / sum(totals)) / temperature for c in present}
    top = max(exponents.values())
    scale = sum(math.exp(e - top) for e in exponents.values())
    expected = [math.exp(exponents[c] - top) / scale if c in present else 0.0 for c in range(4)]
    assert class_probabilities(PIXELS.sum(axis=0), temperature).tolist() == pytest.approx(expected, abs=1e-12)
    assert expected[3] == 0.0  # a class that does not occur is never drawn


def test_a_position_draws_a_class_and_then_one_of_its_images_alike() -> None:
    order = order_of()
    draws = Counter((order.wanted(p, 0), order.sample_at(p, 0)) for p in range(6000))
    candidates = {0: [0, 1, 2, 3], 1: [3], 2: [1, 2]}  # strictly more than 100 pixels
    expected = {(c, n): order.probabilities[c] / len(samples) for c, samples in candidates.items() for n in samples}
    assert set(draws) == set(expected)
    for pair, chance in expected.items():
        assert draws[pair] / 6000 == pytest.approx(chance, abs=0.02)


def test_a_draw_depends_on_its_position_alone() -> None:
    forwards, again = order_of(), order_of()
    positions = [5, 10**12, 0, 7, 5]
    assert [forwards[p] for p in positions] == [again[p] for p in positions]
    assert len({order_of()[p] for p in range(50)}) > 2


def test_every_further_attempt_is_a_new_draw_that_knows_its_class() -> None:
    order = order_of()
    for position in range(50):
        for attempt in range(4):
            assert PIXELS[order.sample_at(position, attempt), order.wanted(position, attempt)] > 100
    assert any(order.sample_at(position, 1) != order.sample_at(position, 0) for position in range(50))


def test_the_draws_are_those_of_lists_of_the_samples_of_each_class() -> None:
    """The statistics come in parts, and are held in bits; what is drawn stays what it was, bit for bit."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 200, (10_000, 4), dtype=np.uint32)
    pixels[:, 2] //= 1 + generator.integers(0, 9, 10_000, dtype=np.uint32)  # rarely enough
    order = order_of(*np.split(pixels, [3, 4100, 4100, 9999]), temperature=0.1)
    totals = pixels.sum(axis=0)
    exponents = (1 - totals / totals.sum()) / 0.1
    chances = np.exp(exponents - exponents.max())
    cumulated = np.cumsum(chances / chances.sum())
    lists = [np.flatnonzero(pixels[:, train_id] > 100).astype(np.uint32) for train_id in range(4)]
    for position in [*range(1500), *range(10**12, 10**12 + 500)]:
        for attempt in range(2):
            draws = keyed_generator(3, Stream.RARE_CLASS, position, attempt)
            train_id = int(np.searchsorted(cumulated, draws.random() * cumulated[-1], side="right"))
            expected = lists[train_id][draws.integers(len(lists[train_id]))]
            assert (order.wanted(position, attempt), order.sample_at(position, attempt)) == (train_id, expected)


def test_a_class_without_an_image_is_told_with_the_most_that_one_holds() -> None:
    with pytest.raises(ConfigError, match=r"min_pixels=200: no sample holds that many pixels of car \(200\), train"):
        order_of(min_pixels=200)


def test_the_statistics_count_what_the_labels_hold(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=10, shard_size=4)
    counts = np.concatenate(list(ShardReader(folder).class_statistics()))
    assert counts.dtype == np.uint32
    for number in range(10):
        label = raw_sample(number).label
        assert counts[number].tolist() == [(label == train_id).sum() for train_id in range(len(CLASSES.names))]


def test_statistics_that_are_missing_or_damaged_are_named_with_the_command(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=10, shard_size=4)
    flip_bit(folder / "000001.classes.npy", 200)
    (folder / "000002.classes.npy").unlink()
    with pytest.raises(DataError) as caught:
        list(ShardReader(folder).class_statistics())
    lines = str(caught.value).split("\n")
    assert "000001.classes.npy is damaged" in lines[0]
    assert "000002.classes.npy cannot be read" in lines[1]
    assert "mfm-shards make test" in lines[2]
    with pytest.raises(DataError, match="holds no labels"):
        list(ShardReader(shard_folder("target", labelled=False)).class_statistics())


def test_shards_made_before_statistics_get_them_from_their_labels(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=10, shard_size=4)
    expected = np.concatenate(list(ShardReader(folder).class_statistics()))
    manifest_file = folder / "dataset.json"
    text = manifest_file.read_text()
    manifest = Manifest.read(manifest_file)
    for record in manifest.shards:
        text = text.replace(f'"{record.classes_sha256}"', '""')
        statistics_path(folder / record.file).unlink()
    manifest_file.write_text(text)
    assert not is_complete(folder, manifest.recipe)
    with pytest.raises(DataError, match="made before they were counted"):
        list(ShardReader(folder).class_statistics())
    recipe = manifest.recipe
    plan = DatasetPlan(folder=folder, recipe=recipe, command="", classes=CLASSES, samples=10, shard_size=4)
    writer = ShardSetWriter(plan)
    assert writer.pending == []
    assert np.array_equal(np.concatenate(list(read_statistics(folder, writer.finish()))), expected)
    assert is_complete(folder, manifest.recipe)


def slow_crop(
    image: np.ndarray, label: np.ndarray, size: tuple[int, int], draws: np.random.Generator, wanted: RareClassTarget
) -> tuple[np.ndarray, np.ndarray, int]:
    """The published loops, word for word: run the pipeline again until there is enough of the class."""

    def pipeline() -> tuple[np.ndarray, np.ndarray]:
        def box() -> tuple[int, int]:
            return (
                int(draws.integers(0, label.shape[0] - size[0] + 1)),
                int(draws.integers(0, label.shape[1] - size[1] + 1)),
            )

        top, left = box()
        for _ in range(CROP_TRIES):
            part = label[top : top + size[0], left : left + size[1]][::4, ::4]
            ids, counts = np.unique(part[part != IGNORE_INDEX], return_counts=True)
            if len(ids) > 1 and counts.max() / counts.sum() < 0.75:
                break
            top, left = box()
        cut = np.s_[top : top + size[0], left : left + size[1]]
        picture, ids = image[cut], label[cut]
        return (picture[:, ::-1], ids[:, ::-1]) if draws.random() < 0.5 else (picture, ids)

    picture, ids = pipeline()
    retries = 0
    for _ in range(RARE_CLASS_TRIES):
        if (ids == wanted.train_id).sum() > wanted.pixels:
            break
        picture, ids = pipeline()
        retries += 1
    return picture, ids, retries


def test_the_crop_is_drawn_again_until_it_holds_enough_of_the_class() -> None:
    generator = np.random.default_rng(0)
    label = generator.choice([0, 1, IGNORE_INDEX], p=[0.55, 0.4, 0.05], size=(64, 96)).astype(np.uint8)
    label[40:52, 70:90] = 5  # the rare one, in one corner
    image = generator.integers(256, size=(64, 96, 3), dtype=np.uint8)
    tensors = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)
    tried: Counter[str] = Counter()
    for position in range(120):
        wanted = RareClassTarget(5, 150)
        keyed = keyed_generator(1, Stream.SOURCE_CROP, position)
        found = source_crop(*tensors, (24, 32), keyed, wanted=wanted)
        keyed = keyed_generator(1, Stream.SOURCE_CROP, position)
        picture, ids, retries = slow_crop(image, label, (24, 32), keyed, wanted)
        assert np.array_equal(found[0].permute(1, 2, 0).numpy(), picture)
        assert np.array_equal(found[1].numpy(), ids)
        tried["enough" if (ids == 5).sum() > 150 else "given up"] += 1
        tried["again"] += retries > 0
    assert tried["enough"] > 40
    assert tried["given up"] > 0  # the last one is kept
    assert tried["again"] > 40


def test_statistics_hold_no_pickle(shard_folder: ShardFolder, tmp_path: Path) -> None:
    folder = shard_folder(count=2)
    path = folder / "000000.classes.npy"
    np.save(tmp_path / "evil.npy", np.array([{}], dtype=object), allow_pickle=True)
    content = (tmp_path / "evil.npy").read_bytes()
    manifest_file = folder / "dataset.json"
    old = Manifest.read(manifest_file).shards[0].classes_sha256
    path.write_bytes(content)
    manifest_file.write_text(manifest_file.read_text().replace(old, hashlib.sha256(content).hexdigest()))
    with pytest.raises(DataError, match="not a readable"):
        list(ShardReader(folder).class_statistics())
