"""Mends a folder of shards: what is whole stays or is written anew, what is not is named and put aside.

Nothing is thrown away: a damaged tar is kept below ``quarantine/`` beside a list of what could not be used of it.
Every step is atomic, and a repair that was interrupted is finished by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mfm_dist.data.class_statistics import write_statistics
from mfm_dist.data.index import scan_tar
from mfm_dist.data.manifest import MANIFEST_FILE, Manifest, ShardRecord, index_path, remake_hint
from mfm_dist.shards.convert import sample_key
from mfm_dist.shards.verify import Content, ShardCheck, read_rows, written_index
from mfm_dist.shards.writer import RawSample, write_index, write_shard
from mfm_dist.storage import atomic_file, sha256_of

QUARANTINE = "quarantine"


def repair_folder(folder: Path, manifest: Manifest, checks: list[ShardCheck]) -> list[str]:
    """Mends every shard that needs it; returns what was done, one line each.

    Args:
        checks: of all shards, in the order of the manifest.

    Raises:
        StorageError: the disk is full. What was whole before still is.
    """
    done = []
    for number, check in enumerate(checks):
        if check.is_well() or not (folder / check.file).is_file():
            continue
        record = manifest.shards[number]
        try:
            if check.is_written_tar and not check.bad:
                mended, line = _rebuild_sidecars(folder, record, check)
            else:
                mended, line = _salvage(folder, record, manifest)
        except OSError as error:
            done.append(f"{folder / check.file} is left as it is: {error}")
            continue
        done.append(line)
        shards = (*manifest.shards[:number], mended, *manifest.shards[number + 1 :])
        manifest = replace(manifest, shards=shards)
        with atomic_file(folder / MANIFEST_FILE) as file:
            file.write(manifest.to_json().encode())
    return done


def _rebuild_sidecars(folder: Path, record: ShardRecord, check: ShardCheck) -> tuple[ShardRecord, str]:
    """Index, class statistics and counts anew, from a tar that is the one that was written."""
    tar = folder / record.file
    write_index(tar)
    mended = replace(
        record,
        samples=len(check.class_counts),
        index_sha256=sha256_of(index_path(tar)),
        image_sizes=check.image_sizes,
        pixel_counts=check.pixel_counts,
        classes_sha256=write_statistics(tar, check.class_counts),
    )
    return mended, f"{tar}: index, class statistics and counts made anew; all {mended.samples} samples are whole"


def _salvage(folder: Path, record: ShardRecord, manifest: Manifest) -> tuple[ShardRecord, str]:
    """Writes a shard anew with the samples that are whole, after putting the damaged one aside."""
    tar = folder / record.file
    names = manifest.class_names
    labelled = bool(record.pixel_counts)
    chosen = _choose(tar, record, len(names), labelled)
    if not len(chosen.rows):
        return record, f"{tar}: nothing in it can be used. Delete it and run: {remake_hint(folder, manifest)}"
    lost = {**_lost_before(tar, chosen.rows), **chosen.bad}
    aside = _set_aside(tar, lost, chosen.strangers)

    def samples() -> Iterator[RawSample]:
        for key, found in read_rows(aside, chosen.rows, len(names), labelled=labelled):
            assert isinstance(found, Content)
            yield _raw(key, found)

    written = write_shard(folder, int(tar.stem), samples(), names)
    if written.sha256 == record.sha256:
        aside.unlink()
        aside.with_suffix(".json").unlink()
        return replace(
            written, left_out=record.left_out
        ), f"{tar}: written anew, equal to what it was before the damage"
    mended = replace(written, left_out={**record.left_out, **lost})
    unsure = f" ({chosen.unsure} of them decode, but nothing says what they were)" if chosen.unsure else ""
    what = f"{tar}: written anew with {written.samples} whole samples{unsure}"
    if not lost:
        return mended, f"{what}; the damaged one is {aside}"
    again = f"To have those back, delete {tar} and run: {remake_hint(folder, manifest)}"
    return mended, f"{what}; {len(lost)} put aside in {aside}, with the reasons beside it. {again}"


class _Chosen(NamedTuple):
    rows: np.ndarray
    """Samples that are whole, in their order."""
    bad: dict[str, str]
    """The others: key -> reason."""
    strangers: dict[str, str]
    """Samples that nobody wrote there."""
    unsure: int
    """Samples of ``rows`` that no checksum vouches for."""


def _choose(tar: Path, record: ShardRecord, num_classes: int, labelled: bool) -> _Chosen:
    """Which samples of a damaged tar can be used.

    Two witnesses say where samples lie: the index that was written with the tar, which also has their checksums and
    needs no header of the tar, and a scan of the tar itself.
    """
    scan = scan_tar(tar)
    scanned = {row["key"]: row for row in scan.rows}
    index = written_index(tar, record)
    vouched = index is not None or sha256_of(tar) == record.sha256
    bad = {damage.key: damage.reason for damage in scan.bad if damage.key}
    good = []
    for row in scan.rows if index is None else index:
        key = _key(row)
        places = [row, *([scanned[row["key"]]] if _moved(row, scanned.get(row["key"])) else [])]
        reasons = [_reason(tar, place, num_classes, labelled) for place in places]
        if None in reasons:
            good.append(places[reasons.index(None)])
            bad.pop(key, None)
        else:
            bad[key] = str(reasons[0])
    expected = {_key(row) for row in scan.rows if index is None or row["key"] in index["key"]}
    strangers = {_key(row): "nobody wrote it there" for row in scan.rows if _key(row) not in expected}
    return _Chosen(_joined(good), bad, strangers, 0 if vouched else len(good))


def _key(row: np.void) -> str:
    key: str = row["key"].decode(errors="surrogateescape")
    return key


def _moved(row: np.void, scanned: np.void | None) -> bool:
    """Whether a scan finds a sample of the index elsewhere, its members with the same checksums."""
    if scanned is None or row["image_format"] != scanned["image_format"]:
        return False
    return all(row[part]["crc32"] == scanned[part]["crc32"] for part in ("image", "label", "meta"))


def _reason(tar: Path, row: np.void, num_classes: int, labelled: bool) -> str | None:
    """Why a sample cannot be used; None when it can."""
    ((key, found),) = read_rows(tar, np.array([row]), num_classes, labelled=labelled)
    if isinstance(found, str):
        return found
    return None if sample_key(key) == key else "its key holds more than letters, digits, _ and -"


def _joined(rows: list[np.void]) -> np.ndarray:
    """Rows of several indexes as one; their keys may be of different length."""
    longest = max(rows, key=lambda row: row.dtype["key"].itemsize).dtype if rows else np.dtype([])
    return np.array([row.item() for row in rows], dtype=longest)


def _raw(key: str, content: Content) -> RawSample:
    try:
        meta: dict[str, Any] = json.loads(content.meta)
        meta.pop("key", None)
    except (ValueError, AttributeError):
        meta = {}
    return RawSample(
        key=key,
        image=np.ascontiguousarray(content.image.permute(1, 2, 0).numpy()),
        label=None if content.label is None else content.label.numpy(),
        meta=meta,
        image_file=(content.image_format, content.image_file),
    )


def _set_aside(tar: Path, lost: dict[str, str], strangers: dict[str, str]) -> Path:
    """Keeps a damaged tar, under a name that is free, and the reasons for which samples of it were left out."""
    folder = tar.parent / QUARANTINE
    folder.mkdir(exist_ok=True)
    number = 0
    while (aside := folder / f"{tar.stem}.{number}.tar").exists():
        number += 1
    with atomic_file(aside.with_suffix(".json")) as file:
        file.write((json.dumps({"lost": lost, "strangers": strangers}, indent=1) + "\n").encode())
    try:
        os.link(tar, aside)
    except OSError:  # this file system has no hard links
        with atomic_file(aside) as kept, open(tar, "rb") as damaged:
            shutil.copyfileobj(damaged, kept)
    return aside


def _lost_before(tar: Path, rows: np.ndarray) -> dict[str, str]:
    """Samples that an interrupted repair has taken out already, before it could note them in the manifest."""
    lost: dict[str, str] = {}
    for path in sorted((tar.parent / QUARANTINE).glob(f"{tar.stem}.*.json")):
        lost |= json.loads(path.read_text())["lost"]
    here = {_key(row) for row in rows}
    return {key: reason for key, reason in lost.items() if key not in here}
