"""Shards out of a pipe: the samples of the indexed reader, shared among consumers, with every loss told."""

from __future__ import annotations

import gzip
import shutil
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import pytest

from mfm_dist.config.schema import DataSection, RareClassSection, RunConfig
from mfm_dist.config.validate import problems
from mfm_dist.data import streaming as tar_stream
from mfm_dist.data.blocks import REPLACEMENT_TRIES
from mfm_dist.data.pipeline import TrainPipeline
from mfm_dist.data.reader import ShardReader
from mfm_dist.data.streaming import ShardStream, StreamedSamples, stream_samples
from mfm_dist.errors import BadSample, DataError
from mfm_dist.rng import Stream
from tests.helpers.classes import CLASSES
from tests.helpers.shards import ShardFolder, damage, flip_bit


def stream_of(folder: Path, pattern: str = "{000000..000002}") -> ShardStream:
    return ShardStream(f"pipe:cat {folder}/{pattern}.tar", samples=10, num_classes=len(CLASSES.names))


def taken(stream: ShardStream, consumer: int, consumers: int, count: int, start: int = 0) -> list[str]:
    """Keys that one consumer gets, before the shuffling."""
    samples = StreamedSamples(
        origin=stream,
        with_label=True,
        seed=0,
        stream=Stream.SOURCE_ORDER,
        start=start,
        consumer=consumer,
        consumers=consumers,
    )
    return [found["__key__"] for found in islice(samples._passes(consumer), count) if isinstance(found, dict)]


def test_samples_are_those_of_the_indexed_reader(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=10, shard_size=4)
    samples = StreamedSamples(
        origin=stream_of(folder), with_label=True, seed=0, stream=Stream.SOURCE_ORDER, start=0, consumer=0, consumers=1
    )
    reader = ShardReader(folder)
    by_key = {f"sample_{number:04d}": reader.read(number) for number in range(10)}
    seen = set()
    for position in range(60):
        sample = samples.take(position, []).sample
        assert sample.image.equal(by_key[sample.key].image)
        assert sample.label is not None
        assert sample.label.equal(by_key[sample.key].label)
        seen.add(sample.key)
    assert seen == set(by_key)


@pytest.mark.parametrize("consumers", [1, 2, 3, 4, 7])
def test_consumers_share_every_pass_and_none_is_left_without(shard_folder: ShardFolder, consumers: int) -> None:
    """Three shards of 4, 4 and 2 samples, also for more consumers than shards."""
    stream = stream_of(shard_folder(count=10, shard_size=4))
    for consumer in range(consumers):
        assert len(set(taken(stream, consumer, consumers, 40))) >= 4
    if consumers <= 3:
        # one pass: as many samples as the consumer's shards hold
        passes = [taken(stream, consumer, consumers, 10) for consumer in range(consumers)]
        assert {key for keys in passes for key in keys} >= {f"sample_{n:04d}" for n in range(8)}


def test_another_start_is_another_order(shard_folder: ShardFolder) -> None:
    stream = stream_of(shard_folder(count=40, shard_size=4), "{000000..000009}")
    assert taken(stream, 0, 1, 40) == taken(stream, 0, 1, 40)
    assert taken(stream, 0, 1, 40, start=7) != taken(stream, 0, 1, 40)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pipeline_of_a_stream_and_a_folder(shard_folder: ShardFolder, workers: int) -> None:
    source = shard_folder("source", count=10, shard_size=4)
    pipeline = TrainPipeline(
        source=stream_of(source), target=ShardReader(source), seed=0, data=DataSection(crop=(16, 24), workers=workers),
        micro_batch=2, rank=0, world_size=1, blocks_per_step=1,
    )  # fmt: skip
    blocks = list(islice(pipeline, 12))
    assert [block.block for block in blocks] == list(range(12))
    assert blocks[0].source_image.shape == (2, 3, 16, 24)


def test_bad_samples_and_shards_are_named_and_passed_over(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=10, shard_size=4)
    damage(folder, 2)  # one bit of a JPEG: nothing but an index notices that
    tar = folder / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    (folder / "000002.tar").unlink()
    samples = StreamedSamples(
        origin=stream_of(folder), with_label=True, seed=0, stream=Stream.SOURCE_ORDER, start=0, consumer=0, consumers=1
    )
    bad = []
    keys = {samples.take(position, bad).sample.key for position in range(200)}
    assert keys >= {"sample_0000", "sample_0001", "sample_0003"}
    assert any("000002.tar" in one.shard for one in bad)
    assert any("000001.tar" in one.shard for one in bad)


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_header_is_told_with_all_that_is_lost_behind_it(
    shard_folder: ShardFolder, tmp_path: Path, packed: bool
) -> None:
    tar = shard_folder(count=4, shard_size=4) / "000000.tar"
    header = int(ShardReader(tar.parent).index.rows[0]["image"]["offset"][2]) - 512
    flip_bit(tar, header + 150)  # of its checksum
    length = len(tar.read_bytes().rstrip(b"\0")) - header - 512
    if packed:
        tar = Path(shutil.copy(tar, tmp_path / "a.tar"))
        tar.write_bytes(gzip.compress(tar.read_bytes()))
    *whole, bad = stream_samples(f"pipe:cat {tar}")
    assert [found["__key__"] for found in whole if isinstance(found, dict)] == ["sample_0000", "sample_0001"]
    assert isinstance(bad, BadSample)
    assert bad.reason == f"damaged header at byte {header}; the {length} bytes behind it are lost"


def test_a_cut_stream_is_told_wherever_it_was_cut(shard_folder: ShardFolder, tmp_path: Path) -> None:
    tar = shard_folder(count=1) / "000000.tar"
    content, cut = tar.read_bytes(), tmp_path / "cut.tar"
    for length in range(0, len(content.rstrip(b"\0")) + 512, 128):
        cut.write_bytes(content[:length])
        *_, last = stream_samples(str(cut))
        assert isinstance(last, BadSample), length


def test_a_failure_of_the_command_is_told_without_its_secrets(shard_folder: ShardFolder) -> None:
    tar = shard_folder(count=1) / "000000.tar"
    *_, bad = stream_samples(f"pipe:true secret; cat {tar}; sleep 0.1; exit 7")
    assert isinstance(bad, BadSample)
    assert bad.reason == "the command behind it ended with exit code 7"


def test_an_error_without_words_ends_the_shard_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_stream, "gopen", Mock(side_effect=EOFError))
    assert list(stream_samples("a.tar")) == [BadSample(shard="a.tar", key="", number=-1, reason="EOFError: ")]


def test_a_stream_of_nothing_ends_instead_of_hanging() -> None:
    stream = ShardStream("pipe:cat /nowhere/{0..3}.tar", samples=10, num_classes=19)
    samples = StreamedSamples(
        origin=stream, with_label=True, seed=0, stream=Stream.SOURCE_ORDER, start=0, consumer=0, consumers=1
    )
    with pytest.raises(DataError, match="not one sample in a whole pass"):
        samples.take(0, [])


def test_unlabelled_samples_cannot_be_a_source(shard_folder: ShardFolder) -> None:
    samples = StreamedSamples(
        origin=stream_of(shard_folder(count=10, labelled=False)),
        with_label=True, seed=0, stream=Stream.SOURCE_ORDER, start=0, consumer=0, consumers=1,
    )  # fmt: skip
    with pytest.raises(DataError, match=f"{REPLACEMENT_TRIES} samples in a row") as caught:
        samples.take(0, [])
    assert "it has no label" in str(caught.value)


def test_urls() -> None:
    stream = ShardStream("s3://bucket/{000..002}.tar", samples=1, num_classes=19)
    assert stream.shards[2] == "pipe:aws s3 cp 's3://bucket/002.tar' -"
    assert ShardStream("hf://datasets/a/b/0.tar", samples=1, num_classes=19).shards == ["hf://datasets/a/b/0.tar"]
    assert stream.fingerprint != ShardStream("s3://bucket/a.tar", samples=1, num_classes=19).fingerprint


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (DataSection(lanes=8, rare_class_sampling=RareClassSection(enabled=True)), "data.lanes reads them in sequence"),
        (
            DataSection(source="s3://a", stream_samples=9, rare_class_sampling=RareClassSection(enabled=True)),
            "a stream cannot be read at random",
        ),
        (DataSection(target="hf://a"), "data.stream_samples=0"),
        (DataSection(validation="s3://a"), "it needs a folder of shards"),
        (DataSection(target="s3://a", stream_samples=9, lanes=2), "a URL has none"),
        (DataSection(scratch_gib=3.0), "data.scratch, which is not set"),
        (DataSection(scale_range=(2.0, 1.0)), "data.scale_range"),
        (DataSection(rare_class_sampling=RareClassSection(enabled=True, temperature=0.0)), "must be above 0"),
        (DataSection(crop=(32, 32), rare_class_sampling=RareClassSection(enabled=True)), "no crop of 32x32 can hold"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(data: DataSection, problem: str) -> None:
    assert [text for text in problems(RunConfig(data=data)) if problem in text]


def test_the_defaults_have_no_problem_and_lanes_need_a_world_that_divides_them() -> None:
    assert problems(RunConfig()) == []
    assert problems(RunConfig(data=DataSection(rare_class_sampling=RareClassSection(enabled=True)))) == []
    config = RunConfig(data=DataSection(lanes=6))
    config.train.global_batch = 8
    assert config.world_problems(2) == []
    assert "data.lanes=6" in config.world_problems(4)[0]
