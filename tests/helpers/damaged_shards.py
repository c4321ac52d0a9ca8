"""Shards damaged in every way we know of, each with the list of what is bad in it by construction."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mfm_dist.data.class_statistics import PixelCounts, write_statistics
from mfm_dist.data.index import scan_tar
from mfm_dist.data.manifest import MANIFEST_FILE, Manifest, Recipe, index_path
from mfm_dist.data.reader import ShardReader
from mfm_dist.data.shard_records import ShardRecord, ShardRecords
from mfm_dist.data.streaming import ShardStream, stream_samples
from mfm_dist.errors import BadSample
from mfm_dist.shards.writer import count_shard, encode_jpeg, encode_label_png
from mfm_dist.storage import sha256_of
from tests.helpers.classes import CLASSES

SAMPLES = 50
HEIGHT, WIDTH = 32, 48
END_MARK = 1024
Members = dict[str, bytes]


@dataclass
class Damaged:
    """A tar of 50 or more samples."""

    tar: Path
    indexed: bool
    """Whether it was indexed while it was whole, as by our own tools; else its index is made of what is left."""
    bad: set[str] = field(default_factory=set)
    """Keys that must be named, and must not be delivered."""
    nameless: bool = False
    """Whether a name may be lost, so that only its place can be told."""
    harmless: set[str] = field(default_factory=set)
    """Keys that may be named or delivered: something is wrong with them that training never reads."""


class Outcome(NamedTuple):
    """What became of a damaged shard."""

    delivered: dict[str, tuple[bytes, bytes]]
    """Pixels of image and label by key."""
    named: dict[str, str]
    """Reasons by key; nameless damage under ""."""


@cache
def sound(number: int) -> Members:
    """The members of a sample that is whole."""
    generator = np.random.default_rng(number % 8)
    blocks = (HEIGHT // 8, WIDTH // 8)
    image = generator.integers(256, size=(*blocks, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    label = generator.integers(len(CLASSES), size=blocks).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    return {"jpg": encode_jpeg(image), "label.png": encode_label_png(label), "json": b"{}"}


def key_of(number: int) -> str:
    return f"sample_{number:04d}"


def write_tar(path: Path, samples: list[tuple[str, Members]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def adopt(tar: Path, *, counted: bool = False) -> tuple[BadSample, ...]:
    """Makes a folder of shards of the one tar in it; returns what the scan could not use.

    Args:
        counted: with class statistics, as our writer leaves it; the reader then trusts the ids. Else as if by hand.
    """
    rows, bad = scan_tar(tar)
    counts = count_shard(tar, rows, CLASSES.names) if counted else PixelCounts(CLASSES.names)
    with open(index_path(tar), "wb") as file:
        np.save(file, rows, allow_pickle=False)
    record = ShardRecord(
        file=tar.name,
        samples=len(rows),
        bytes=tar.stat().st_size,
        sha256=sha256_of(tar),
        index_sha256=sha256_of(index_path(tar)),
        image_sizes={},
        pixel_counts=counts.pixel_counts,
        classes_sha256=write_statistics(tar, counts.classes),
    )
    recipe = Recipe(generator="damaged", version=1, arguments={})
    manifest = Manifest(name="damaged", classes=CLASSES, recipe=recipe, command="none", shards=ShardRecords([record]))
    (tar.parent / MANIFEST_FILE).write_text(manifest.to_json())
    return bad


def outcome(damaged: Damaged) -> Outcome:
    """Reads every sample there is of a damaged shard."""
    named: dict[str, str] = {}
    if not damaged.indexed:
        named = {one.key: one.reason for one in adopt(damaged.tar)}
    reader = ShardReader(damaged.tar.parent, bad_limit=1.0)
    delivered = {}
    for number in range(len(reader)):
        sample = reader.read(number)
        if isinstance(sample, BadSample):
            named[sample.key] = sample.reason
            continue
        assert sample.label is not None
        delivered[sample.key] = (sample.image.contiguous().numpy().tobytes(), sample.label.numpy().tobytes())
    reader.close()
    return Outcome(delivered, named)


def faults(damaged: Damaged, found: Outcome, whole: dict[str, tuple[bytes, bytes]]) -> list[str]:
    """What was not as promised: every bad sample named, everything else delivered as it was written."""
    expected = set(whole) - damaged.bad
    nameless = "" in found.named
    return [
        *(f"{key} is bad and was delivered" for key in sorted(damaged.bad & set(found.delivered))),
        *(
            f"{key} is bad and was not named"
            for key in sorted(damaged.bad - set(found.named))
            if not (damaged.nameless and nameless)
        ),
        *(
            f"{key} is whole and was not delivered ({found.named.get(key, 'not named either')})"
            for key in sorted(expected - set(found.delivered))
            if not (key in damaged.harmless and key in found.named)
        ),
        *(
            f"{key} was delivered with other pixels"
            for key in sorted(expected & set(found.delivered))
            if found.delivered[key] != whole[key]
        ),
    ]


def streamed(damaged: Damaged) -> Outcome:
    """One pass over a damaged shard as it comes out of a pipe, without an index."""
    origin = ShardStream(f"pipe:cat {damaged.tar}", samples=SAMPLES, num_classes=len(CLASSES))
    delivered: dict[str, tuple[bytes, bytes]] = {}
    named: dict[str, str] = {}
    for found in stream_samples(origin.url):
        if isinstance(found, BadSample):
            named[found.key] = found.reason
            continue
        sample = origin.decode(found, with_label=True)
        if isinstance(sample, BadSample):
            named[sample.key] = sample.reason
            continue
        assert sample.label is not None
        assert sample.key not in delivered
        delivered[sample.key] = (sample.image.contiguous().numpy().tobytes(), sample.label.numpy().tobytes())
    return Outcome(delivered, named)


def stream_faults(damaged: Damaged, found: Outcome, whole: dict[str, tuple[bytes, bytes]]) -> list[str]:
    """What was silent: a stream ends at a damaged header and has no checksums, but what is not delivered is told."""
    written = set(whole) | damaged.bad
    lost = written - set(found.delivered) - set(found.named)
    flipped = {key for key in damaged.bad if damaged.indexed}  # by the checksums of the index alone
    return [
        *(f"{key} was lost and nothing said so" for key in sorted(lost) if "" not in found.named),
        *(f"{key} is bad and was delivered" for key in sorted((damaged.bad - flipped) & set(found.delivered))),
        *(
            f"{key} was delivered with other pixels"
            for key in sorted((set(whole) - damaged.bad) & set(found.delivered))
            if found.delivered[key] != whole[key]
        ),
    ]


@cache
def whole_pixels() -> dict[str, tuple[bytes, bytes]]:
    """Pixels of the sound samples by key, from another decoder path: the label by hand, the image by torchvision."""
    import torch
    from torchvision.io import decode_jpeg

    pixels = {}
    for number in range(SAMPLES):
        members = sound(number)
        image = decode_jpeg(torch.frombuffer(bytearray(members["jpg"]), dtype=torch.uint8)).contiguous()
        content = members["label.png"]
        at = content.index(b"IDAT")
        (size,) = struct.unpack(">I", content[at - 4 : at])
        rows = np.frombuffer(zlib.decompress(content[at + 4 : at + 4 + size]), dtype=np.uint8).reshape(HEIGHT, -1)
        pixels[key_of(number)] = (image.numpy().tobytes(), rows[:, 1:].tobytes())
    return pixels


# Damage to a shard that was written whole.


def truncated(folder: Path, draw: np.random.Generator, *, indexed: bool, counted: bool = False) -> Damaged:
    tar = folder / "000000.tar"
    write_tar(tar, [(key_of(n), sound(n)) for n in range(SAMPLES)])
    rows = scan_tar(tar).rows
    if indexed:
        adopt(tar, counted=counted)
    length = int(draw.integers(512, tar.stat().st_size - END_MARK))
    with open(tar, "r+b") as file:
        file.truncate(length)
    damaged = Damaged(tar, indexed, nameless=not indexed)
    for row in rows:
        ends = [int(row[m]["offset"] + row[m]["size"]) for m in ("image", "label")]
        if length < max(ends):
            damaged.bad.add(row["key"].decode())
        elif length < int(row["meta"]["offset"] + row["meta"]["size"]):
            damaged.harmless.add(row["key"].decode())
    if not indexed:  # what was never seen cannot be named; the scan says where it ended
        damaged.nameless = True
    return damaged


def flipped_bits(folder: Path, draw: np.random.Generator, *, indexed: bool, counted: bool = False) -> Damaged:
    """With an index every flip in a payload is noticed; without, one in a header is, and one in a payload may not be,
    so there only headers are damaged."""
    tar = folder / "000000.tar"
    write_tar(tar, [(key_of(n), sound(n)) for n in range(SAMPLES)])
    rows = scan_tar(tar).rows
    if indexed:
        adopt(tar, counted=counted)
    content = bytearray(tar.read_bytes())
    damaged = Damaged(tar, indexed, nameless=not indexed)
    if indexed:
        flips = draw.integers(len(content), size=int(draw.integers(1, 20))).tolist()
        flips.append(int(rows["image"]["offset"][draw.integers(SAMPLES)]) + 100)  # the others may hit what nobody reads
    else:
        which = draw.choice(SAMPLES, size=int(draw.integers(1, 6)), replace=False)
        members = [rows[n][("image", "label", "meta")[draw.integers(3)]] for n in which]
        flips = [int(member["offset"]) - 512 + int(draw.integers(0, 100)) for member in members]
    for at in flips:
        content[at] ^= 1 << int(draw.integers(8))
    tar.write_bytes(content)
    for row in rows:
        key = row["key"].decode()
        for member in ("image", "label", "meta"):
            first, size = int(row[member]["offset"]), int(row[member]["size"])
            inside = [at for at in flips if (first - (0 if indexed else 512)) <= at < first + size]
            if inside and member != "meta":
                damaged.bad.add(key)
            elif inside:
                damaged.harmless.add(key)
    if indexed:  # two flips of one bit undo each other
        damaged.bad -= {k for k in damaged.bad if _as_written(tar, rows, k)}
    return damaged


def _as_written(tar: Path, rows: np.ndarray, key: str) -> bool:
    content = tar.read_bytes()
    (row,) = rows[rows["key"] == key.encode()]
    return all(
        zlib.crc32(content[(o := int(row[m]["offset"])) : o + int(row[m]["size"])]) == row[m]["crc32"]
        for m in ("image", "label")
    )


def _with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def claimed_sizes(folder: Path, draw: np.random.Generator) -> Damaged:
    """Headers with the right checksum whose size leads back to an earlier place, or beyond every disk."""
    tar = folder / "000000.tar"
    write_tar(tar, [(key_of(n), sound(n)) for n in range(SAMPLES)])
    rows, content = scan_tar(tar).rows, bytearray(tar.read_bytes())
    damaged = Damaged(tar, indexed=False)
    for number in draw.choice(SAMPLES, size=int(draw.integers(1, 6)), replace=False).tolist():
        member = ("image", "label")[draw.integers(2)]
        at = int(rows[number][member]["offset"]) - tarfile.BLOCKSIZE
        size = int(draw.choice([-(at // 512) * 512, -512, -1, 1 << 60]))
        header = bytearray(content[at : at + tarfile.BLOCKSIZE])
        header[124:136] = size.to_bytes(12, "big", signed=True)
        header[124] |= 0x80  # the mark of a binary number
        content[at : at + tarfile.BLOCKSIZE] = _with_checksum(header)
        damaged.bad.add(key_of(number))
    tar.write_bytes(content)
    return damaged


def chained_headers(folder: Path, draw: np.random.Generator) -> Damaged:
    """Thousands of pax headers or GNU long names, each of which announces the next, before one member."""
    tar = folder / "000000.tar"
    write_tar(tar, [(key_of(n), sound(n)) for n in range(SAMPLES)])
    number = int(draw.integers(SAMPLES))
    at = int(scan_tar(tar).rows[number]["image"]["offset"]) - tarfile.BLOCKSIZE
    name = f"{key_of(number)}.jpg".encode()
    info = tarfile.TarInfo("next")
    info.type, payload = [(tarfile.XHDTYPE, b"24 path=%s\n" % name), (tarfile.GNUTYPE_LONGNAME, name)][draw.integers(2)]
    info.size = len(payload)
    link = info.tobuf(tarfile.USTAR_FORMAT) + payload.ljust(tarfile.BLOCKSIZE, b"\0")
    content = tar.read_bytes()
    tar.write_bytes(content[:at] + 3000 * link + content[at:])
    return Damaged(tar, indexed=False, nameless=True, harmless={key_of(number)})


# Samples that were bad when they were packed.


def _png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _jpeg_claiming(jpeg: bytes, width: int, height: int) -> bytes:
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def _label(value: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    return encode_label_png(np.full((height, width), value, dtype=np.uint8))


MEMBER_DAMAGE: dict[str, Callable[[Members, np.random.Generator], Members]] = {
    "missing_label": lambda m, _: {k: v for k, v in m.items() if k != "label.png"},
    "missing_image": lambda m, _: {k: v for k, v in m.items() if k != "jpg"},
    "wrong_size": lambda m, draw: m | {"label.png": _label(1, HEIGHT + int(draw.integers(1, 9)), WIDTH)},
    "id_out_of_range": lambda m, draw: m | {"label.png": _label(int(draw.integers(len(CLASSES), 255)))},
    "empty_image": lambda m, _: m | {"jpg": b""},
    "empty_label": lambda m, _: m | {"label.png": b""},
    "not_an_image": lambda m, draw: m | {"jpg": draw.bytes(int(draw.integers(1, 3000)))},
    "not_a_label": lambda m, draw: m | {"label.png": draw.bytes(int(draw.integers(1, 3000)))},
    "text_for_an_image": lambda m, _: m | {"jpg": b"<html>404 Not Found</html>"},
    "cut_jpeg": lambda m, draw: m | {"jpg": m["jpg"][: int(draw.integers(1, len(m["jpg"]) // 2))]},
    "cut_label": lambda m, draw: m | {"label.png": m["label.png"][: int(draw.integers(1, len(m["label.png"]) // 2))]},
    "jpeg_for_a_label": lambda m, _: m | {"label.png": m["jpg"]},
    "bomb_jpeg": lambda m, _: m | {"jpg": _jpeg_claiming(m["jpg"], 65500, 65500)},
    "bomb_png": lambda m, _: {"png": _png_header(1 << 30, 1 << 30), **{k: v for k, v in m.items() if k != "jpg"}},
    "bomb_label": lambda m, _: m | {"label.png": _png_header(200_000, 200_000)},
    "no_pixels": lambda m, _: m | {"label.png": _png_header(0, 0)},
    "jpeg_of_another_size": lambda m, d: m | {"jpg": _jpeg_claiming(m["jpg"], WIDTH, HEIGHT * int(d.integers(2, 9)))},
}  # fmt: skip
"""What can be wrong with a sample of its own, by name."""


def bad_members(folder: Path, draw: np.random.Generator, kind: str) -> Damaged:
    """Some samples with damage of one kind (``mixed``: of any), among 50 or more that are whole."""
    tar = folder / "000000.tar"
    damaged = Damaged(tar, indexed=False)
    which = set(draw.choice(SAMPLES, size=int(draw.integers(1, 11)), replace=False).tolist())
    samples = []
    for number in range(SAMPLES):
        members = sound(number)
        if number in which:
            change = kind if kind != "mixed" else str(draw.choice(list(MEMBER_DAMAGE)))
            members = MEMBER_DAMAGE[change](members, draw)
            damaged.bad.add(key_of(number))
        samples.append((key_of(number), members))
    write_tar(tar, samples)
    return damaged


def duplicate_keys(folder: Path, draw: np.random.Generator) -> Damaged:
    """Keys that come back: the first sample of the name is whole, the second must be told and not be delivered."""
    tar = folder / "000000.tar"
    samples = [(key_of(number), sound(number)) for number in range(SAMPLES)]
    again = draw.choice(SAMPLES - 2, size=int(draw.integers(1, 6)), replace=False).tolist()
    samples += [(key_of(number), sound(number + 1)) for number in again]
    write_tar(tar, samples)
    return Damaged(tar, indexed=False, harmless={key_of(number) for number in again})


def outside_paths(folder: Path, draw: np.random.Generator) -> Damaged:
    tar = folder / "000000.tar"
    names = ["../../etc/sample", "/etc/sample", "a/../../b", "..", "a\\b"]
    chosen = [f"{name}_{i}" if name != ".." else f"../{i}" for i, name in enumerate(draw.permutation(names).tolist())]
    samples = [(key_of(number), sound(number)) for number in range(SAMPLES)]
    for key in chosen:
        samples.insert(int(draw.integers(len(samples) + 1)), (key, sound(0)))
    write_tar(tar, samples)
    return Damaged(tar, indexed=False, bad=set(chosen))


def nothing_inside(folder: Path, draw: np.random.Generator, *, counted: bool = False) -> Damaged:
    """An empty file, or one of zeros, or of noise, in place of a shard that was indexed."""
    tar = folder / "000000.tar"
    write_tar(tar, [(key_of(number), sound(number)) for number in range(SAMPLES)])
    adopt(tar, counted=counted)
    size = tar.stat().st_size
    tar.write_bytes([b"", bytes(size), draw.bytes(size)][int(draw.integers(3))])
    return Damaged(tar, indexed=True, bad={key_of(number) for number in range(SAMPLES)})


KINDS: dict[str, Callable[[Path, np.random.Generator], Damaged]] = {
    "truncated, indexed before": lambda folder, draw: truncated(folder, draw, indexed=True),
    "truncated, written by our tools": lambda folder, draw: truncated(folder, draw, indexed=True, counted=True),
    "truncated, indexed after": lambda folder, draw: truncated(folder, draw, indexed=False),
    "flipped bits, indexed before": lambda folder, draw: flipped_bits(folder, draw, indexed=True),
    "flipped bits, written by our tools": lambda folder, draw: flipped_bits(folder, draw, indexed=True, counted=True),
    "flipped header bits, indexed after": lambda folder, draw: flipped_bits(folder, draw, indexed=False),
    "duplicate keys": duplicate_keys,
    "paths that lead outside": outside_paths,
    "nothing inside": nothing_inside,
    "nothing inside, written by our tools": lambda folder, draw: nothing_inside(folder, draw, counted=True),
    "claimed sizes": claimed_sizes,
    "chained headers": chained_headers,
    **{
        kind: (lambda folder, draw, kind=kind: bad_members(folder, draw, kind))  # type: ignore[misc]
        for kind in (*MEMBER_DAMAGE, "mixed")
    },
}


def damaged_shard(folder: Path, number: int) -> tuple[str, Damaged]:
    """Shard ``number`` of the endless series: its kind and what is bad in it."""
    folder.mkdir(parents=True)
    kinds = list(KINDS)
    kind = kinds[number % len(kinds)]
    return kind, KINDS[kind](folder, np.random.default_rng([7, number]))
