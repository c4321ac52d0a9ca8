"""The records of a manifest: what comes out of their columns and out of its file, and what they take."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from mfm_dist.data.manifest import Manifest, Recipe
from mfm_dist.data.shard_records import ShardRecord, ShardRecords
from mfm_dist.errors import DataError
from tests.helpers.classes import CLASSES


def record(number: int) -> ShardRecord:
    counts = {name: 1000 * number + k for k, name in enumerate((*CLASSES.names, "ignore"))}
    return ShardRecord(
        file=f"{number:06d}.tar",
        samples=10 + number,
        bytes=10**9 + number,
        sha256=f"{number + 1:064x}",
        index_sha256=f"{number + 2:064x}",
        image_sizes={"32x48": 9 + number, f"{number}x7": 1},
        pixel_counts=counts,
        classes_sha256=f"{number + 3:064x}",
    )


UNLABELLED = replace(record(2), pixel_counts={}, classes_sha256="", left_out={"a": "it is ü", "b": ""})
RECORDS = [record(0), UNLABELLED, record(1_234_567), replace(record(3), image_sizes={}, samples=0)]


def manifest_of(*records: ShardRecord) -> Manifest:
    recipe = Recipe(generator="folder", version=1, arguments={"shards": [1], "samples": 3})
    return Manifest(name="x", classes=CLASSES, recipe=recipe, command="none", shards=ShardRecords(records))


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    manifest = manifest_of(*RECORDS)
    (tmp_path / "dataset.json").write_text(manifest.to_json())
    for found in (manifest, Manifest.read(tmp_path / "dataset.json")):
        assert list(found.shards) == RECORDS
        assert [found.shards[-4], *found.shards[1:]] == RECORDS
        with pytest.raises(IndexError):
            found.shards[4]
        assert found.samples == sum(one.samples for one in RECORDS)
        assert found.image_sizes == {"32x48": 9 + 11 + 1_234_576, "0x7": 1, "2x7": 1, "1234567x7": 1}
        assert found.pixel_counts == {name: 1_234_570_000 + 3 * k for k, name in enumerate([*CLASSES.names, "ignore"])}
        assert found.left_out == {"a": "it is ü", "b": ""}
        assert found.has_labels
        assert found.to_json() == manifest.to_json()
    assert not manifest_of(UNLABELLED).has_labels
    assert not manifest_of(replace(UNLABELLED, pixel_counts={"road": 0, "ignore": 5})).has_labels


def test_files_written_before_with_an_indent_and_in_any_order_are_read(tmp_path: Path) -> None:
    content = json.loads(manifest_of(*RECORDS).to_json())
    for order in (list(content), sorted(content, reverse=True)):
        (tmp_path / "dataset.json").write_text(json.dumps({key: content[key] for key in order}, indent=1))
        assert list(Manifest.read(tmp_path / "dataset.json").shards) == RECORDS


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("samples", 10**30, "more than"),
        ("bytes", 2**41, "more than"),
        ("pixel_counts", {"road": 10**30}, "Overflow"),
        ("file", f"{'0' * 21}.tar", "file is no name"),
        ("sha256", "A" * 64, "sha256 is not 64 hex digits"),
    ],
)
def test_what_does_not_fit_is_refused(field: str, value: object, problem: str, tmp_path: Path) -> None:
    content = json.loads(manifest_of(*RECORDS).to_json())
    content["shards"][1][field] = value
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"cannot be read as a manifest.*{problem}"):
        Manifest.read(tmp_path / "dataset.json")


def test_a_shard_takes_some_four_hundred_bytes_and_no_more_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(manifest_of(*map(record, range(2000))).to_json())
    tracemalloc.start()
    kept = Manifest.read(tmp_path / "dataset.json")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept.shards) == 2000
    assert held < 2000 * 700  # each has a size of its own here
    assert peak < 2000 * 700 + (6 << 20)  # what is being parsed
