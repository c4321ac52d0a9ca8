"""Small downloads in the exact formats of the data sets, and a slow reader of their labels that shares no code."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (24, 40)
"""Height and width of the pictures."""


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 [H, W, 3]: smooth, so that a JPEG of it stays close."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    planes = [(rows * (3 + seed % 3) + columns * (1 + plane) + 20 * seed) % 256 for plane in range(3)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def blocks(seed: int, ids: list[int], size: tuple[int, int] = SIZE) -> np.ndarray:
    """int64 [H, W]: blocks of 3 pixels, each of one of the ids; all of them occur."""
    generator = np.random.default_rng(seed)
    shape = (-(-size[0] // 3), -(-size[1] // 3))
    grid = np.resize(ids, shape)
    generator.shuffle(grid.reshape(-1))
    return grid.repeat(3, axis=0).repeat(3, axis=1)[: size[0], : size[1]]


def save_picture(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def save_grey(path: Path, ids: np.ndarray) -> None:
    """As in Cityscapes, ACDC and Dark Zurich: 8-bit grey."""
    save_picture(path, ids.astype(np.uint8))


def save_palette(path: Path, ids: np.ndarray, colours: int = 35) -> None:
    """As in GTA5: a palette PNG whose index is the id and whose colours are the ones people look at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    indexed = Image.fromarray(ids.astype(np.uint8)).convert("L")
    indexed.putpalette([(37 * i + 11 * c) % 256 for i in range(colours) for c in range(3)])
    indexed.save(path)


def save_rgb16(path: Path, ids: np.ndarray, instances: np.ndarray) -> None:
    """As in SYNTHIA: 16-bit RGB, red = class, green = instance. Rows are filtered as encoders do (type "up")."""
    height, width = ids.shape
    samples = np.zeros((height, width, 3), dtype=">u2")
    samples[..., 0], samples[..., 1] = ids, instances
    raw = samples.reshape(height, -1).view(np.uint8)
    above = np.vstack([np.zeros_like(raw[:1]), raw[:-1]])
    filtered = np.hstack([np.full((height, 1), 2, dtype=np.uint8), raw - above])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0), filtered.tobytes()))


def png(header: bytes, rows: bytes) -> bytes:
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def slow_ids(path: Path) -> list[list[int]]:
    """Reads the ids of a label pixel by pixel, by the PNG specification alone: grey, palette index, or red."""
    content = path.read_bytes()
    at, data = 8, b""
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        body = content[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
        elif kind == b"IDAT":
            data += body
        at += 12 + length
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    step = max(1, channels * depth // 8)
    line = -(-width * channels * depth // 8)
    stream = zlib.decompress(data)
    above = [0] * line
    ids = []
    for row in range(height):
        start = row * (line + 1)
        above = _unfiltered(stream[start], stream[start + 1 : start + 1 + line], above, step)
        ids.append([_first_sample(above, column, depth, channels) for column in range(width)])
    return ids


def _unfiltered(kind: int, line: bytes, above: list[int], step: int) -> list[int]:
    out: list[int] = []
    for i, byte in enumerate(line):
        left = out[i - step] if i >= step else 0
        corner = above[i - step] if i >= step else 0
        up = above[i]
        guess = left + up - corner
        nearest = min((left, up, corner), key=lambda value: abs(guess - value))
        out.append((byte + [0, left, up, (left + up) // 2, nearest][kind]) % 256)
    return out


def _first_sample(line: list[int], column: int, depth: int, channels: int) -> int:
    if depth == 16:
        at = column * channels * 2
        return line[at] * 256 + line[at + 1]
    bit = column * channels * depth
    return line[bit // 8] >> (8 - depth - bit % 8) & ((1 << depth) - 1)


# What the downloads look like, files that are not packed included.

CITYSCAPES_IDS = [*range(34)]
SYNTHIA_IDS = [*range(23)]
TRAIN_IDS = [*range(19), 255]
URBANSYN_IDS = [*range(20)]


def gta(root: Path, numbers: tuple[int, ...] = (1, 2, 3), size: tuple[int, int] = SIZE) -> Path:
    for number in numbers:
        save_picture(root / f"images/{number:05d}.png", picture(number, size))
        save_palette(root / f"labels/{number:05d}.png", blocks(number, [*CITYSCAPES_IDS, 34], size))
    save_grey(root / "labels/00001_labelTrainIds.png", blocks(1, TRAIN_IDS))  # what other tools leave behind
    return root


def synthia(root: Path, numbers: tuple[int, ...] = (0, 1, 2)) -> Path:
    for number in numbers:
        ids = blocks(number, SYNTHIA_IDS)
        save_picture(root / f"RAND_CITYSCAPES/RGB/{number:07d}.png", picture(number))
        save_rgb16(root / f"RAND_CITYSCAPES/GT/LABELS/{number:07d}.png", ids, ids * 1000 % 65521)
        save_picture(root / f"RAND_CITYSCAPES/GT/COLOR/{number:07d}.png", picture(number + 1))
    return root


def cityscapes(root: Path) -> Path:
    for seed, (split, city) in enumerate([("train", "aachen"), ("train", "ulm"), ("val", "munster"), ("test", "bonn")]):
        name = f"{split}/{city}/{city}_00000{seed}_000019"
        save_picture(root / f"leftImg8bit/{name}_leftImg8bit.png", picture(seed))
        save_grey(root / f"gtFine/{name}_gtFine_labelIds.png", blocks(seed, CITYSCAPES_IDS))
        save_grey(root / f"gtFine/{name}_gtFine_instanceIds.png", blocks(seed + 9, CITYSCAPES_IDS))
        (root / f"gtFine/{name}_gtFine_polygons.json").write_text("{}")
    return root


def urbansyn(root: Path, numbers: tuple[int, ...] = (1, 2, 3)) -> Path:
    for number in numbers:
        ids = blocks(number, URBANSYN_IDS).astype(np.uint8)
        opaque = np.full_like(ids, 255)
        label = {1: np.stack([ids, ids, ids], axis=-1), 2: np.stack([ids, ids, ids, opaque], axis=-1)}.get(number, ids)
        save_picture(root / f"rgb/rgb_{number:04d}.png", picture(number))
        save_picture(root / f"ss/ss_{number:04d}.png", label)
        save_picture(root / f"ss_colour/ss_colour_{number:04d}.png", picture(number + 1))
    return root


def acdc(root: Path) -> Path:
    for seed, (weather, split) in enumerate([("fog", "train"), ("night", "train"), ("rain", "val"), ("snow", "test")]):
        name = f"{weather}/{split}/GOPR0{seed}/GOPR0{seed}_frame_000001"
        save_picture(root / f"rgb_anon_trainvaltest/rgb_anon/{name}_rgb_anon.png", picture(seed))
        reference = name.replace(f"/{split}/", f"/{split}_ref/")
        save_picture(root / f"rgb_anon_trainvaltest/rgb_anon/{reference}_rgb_ref_anon.png", picture(seed + 1))
        if split != "test":
            save_grey(root / f"gt_trainval/gt/{name}_gt_labelTrainIds.png", blocks(seed, TRAIN_IDS))
            save_grey(root / f"gt_trainval/gt/{name}_gt_labelIds.png", blocks(seed, CITYSCAPES_IDS))
    return root


def dark_zurich(root: Path) -> Path:
    train, val = root / "Dark_Zurich_train_anon", root / "Dark_Zurich_val_anon"
    for seed, time in enumerate(["night", "night", "day", "twilight"]):
        save_picture(train / f"rgb_anon/train/{time}/GOPR03/GOPR03_frame_00000{seed}_rgb_anon.png", picture(seed))
    save_picture(val / "rgb_anon/val/night/GOPR0356/GOPR0356_frame_000321_rgb_anon.png", picture(7))
    save_picture(val / "rgb_anon/val_ref/day/GOPR0356_ref/GOPR0356_frame_000321_ref_rgb_anon.png", picture(8))
    save_grey(val / "gt/val/night/GOPR0356/GOPR0356_frame_000321_gt_labelTrainIds.png", blocks(7, TRAIN_IDS))
    save_grey(val / "gt/val/night/GOPR0356/GOPR0356_frame_000321_gt_labelIds.png", blocks(7, CITYSCAPES_IDS))
    return root
