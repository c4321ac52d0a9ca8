"""Labels and photographs of many kinds are read right, or refused with what they are."""

from __future__ import annotations

import contextlib
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from mfm_dist.classes import LabelMapping
from mfm_dist.data.geometry import fitted
from mfm_dist.data.png import png_kind
from mfm_dist.errors import CorruptFileError
from mfm_dist.shards.pictures import lookup_table, read_label, read_picture, resize_pair, to_indices
from tests.helpers import downloads


def encoded(picture: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("colours", "kind"), [(2, "1-bit"), (4, "2-bit"), (16, "4-bit"), (35, "8-bit")])
def test_palettes_of_any_depth_give_their_index(colours: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "label.png"
    downloads.save_palette(path, downloads.blocks(0, [*range(colours)]), colours)
    assert png_kind(path.read_bytes()) == f"{kind} palette"
    assert read_label(path.read_bytes(), [f"{kind} palette"], colours=False).tolist() == downloads.slow_ids(path)


def test_the_traps_are_real() -> None:
    """If these readers ever change, pictures.py may become simpler."""
    ids = downloads.blocks(0, [0, 1, 2, 3])
    indexed = Image.fromarray(ids.astype(np.uint8))
    indexed.putpalette([0] * 12)
    payload = torch.frombuffer(bytearray(encoded(indexed, "PNG")), dtype=torch.uint8)
    assert not np.array_equal(decode_png(payload, mode=ImageReadMode.UNCHANGED)[0].numpy(), ids)
    grey = downloads.png(struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0), b"\x00\x1b")  # 2 bits each: 0 1 2 3
    assert np.array(Image.open(io.BytesIO(grey)).convert("L")).tolist() != [[0, 1, 2, 3]]


def test_ids_beyond_8_bits() -> None:
    ids = np.array([[0, 255, 256, 40000]], dtype=np.uint16)
    found = read_label(encoded(Image.fromarray(ids), "PNG"), ["16-bit grey"], colours=False)
    assert found.dtype == np.uint16
    assert found.tolist() == ids.tolist()


def test_a_label_of_another_kind_is_refused_with_what_it_is() -> None:
    colours = encoded(Image.fromarray(downloads.picture(0)), "PNG")
    with pytest.raises(CorruptFileError, match="is 8-bit RGB; expected is 16-bit RGB: was it converted"):
        read_label(colours, ["16-bit RGB"], colours=False)
    with pytest.raises(CorruptFileError, match="is no PNG; expected"):
        read_label(encoded(Image.fromarray(downloads.picture(0)), "JPEG"), ["8-bit grey"], colours=False)


@pytest.mark.parametrize(
    ("mode", "image_format", "stored"),
    [
        ("RGB", "PNG", "png"),
        ("L", "PNG", "png"),
        ("P", "PNG", None),
        ("RGBA", "PNG", None),
        ("RGB", "JPEG", "jpg"),
        ("L", "JPEG", "jpg"),
        ("CMYK", "JPEG", None),
        ("RGB", "BMP", None),
        ("RGB", "WEBP", None),
        ("RGB", "TIFF", None),
    ],
)
def test_pictures_of_many_kinds_become_rgb(mode: str, image_format: str, stored: str | None) -> None:
    original = Image.fromarray(downloads.picture(3)).convert(mode)
    image, may_store = read_picture(encoded(original, image_format))
    assert may_store == stored
    assert image.shape == (*downloads.SIZE, 3)
    assert image.dtype == np.uint8
    expected = np.array(original.convert("RGB")).astype(int)
    assert np.abs(image - expected).mean() < (20 if image_format in ("JPEG", "WEBP") else 0.01)


def test_a_picture_that_a_camera_marked_as_turned_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    content = encoded(Image.fromarray(downloads.picture(0)), "PNG", exif=exif)
    image, stored = read_picture(content)
    assert stored is None
    assert np.array_equal(image, np.rot90(downloads.picture(0), -1))


@pytest.mark.parametrize("depth", ["16-bit RGB", "16-bit grey"])
def test_deeper_pictures_are_refused(depth: str, tmp_path: Path) -> None:
    ids = downloads.blocks(0, [1000, 2000])
    if depth == "16-bit RGB":
        downloads.save_rgb16(tmp_path / "deep.png", ids, ids)
    else:
        Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(CorruptFileError, match="more than 8 bits"):
        read_picture((tmp_path / "deep.png").read_bytes())


def test_a_flipped_bit_anywhere_in_a_png_is_found() -> None:
    content = encoded(Image.fromarray(downloads.picture(0)), "PNG")
    generator = np.random.default_rng(0)
    for at in [*generator.integers(8, len(content) - 12, 40), len(content) - 20]:
        broken = bytearray(content)
        broken[at] ^= 1 << generator.integers(8)
        with pytest.raises(CorruptFileError):
            read_picture(bytes(broken))


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((1052, 1914), (1280, 720), (704, 1280)),  # as published, not 720
        ((1046, 1914), (1280, 720), (700, 1280)),
        ((1052, 1914), (2560, 1440), (1407, 2560)),
        ((760, 1280), (1280, 760), (760, 1280)),
        ((1024, 2048), (1024, 512), (512, 1024)),
        ((1080, 1920), (960, 540), (540, 960)),
        ((1914, 1052), (1280, 720), (1280, 704)),  # upright
    ],
)
def test_sizes_are_the_published_ones(size: tuple[int, int], box: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitted(size, box) == fitted(size, box[::-1]) == expected


@pytest.mark.parametrize(
    ("stored", "size"), [((1052, 1914), (704, 1280)), ((760, 1280), (608, 1024)), ((105, 191), (333, 77))]
)
def test_labels_take_the_nearest_pixel_by_the_floor_rule(stored: tuple[int, int], size: tuple[int, int]) -> None:
    label = np.random.default_rng(0).integers(256, size=stored, dtype=np.uint8)
    rows, columns = (np.floor(np.arange(new) * (old / new)).astype(int) for old, new in zip(stored, size, strict=True))
    _, ours = resize_pair(np.zeros((*stored, 3), dtype=np.uint8), label, size)
    assert np.array_equal(ours, label[rows][:, columns])


def test_pictures_shrink_as_torch_does_it() -> None:
    picture = np.random.default_rng(0).integers(256, size=(105, 191, 3), dtype=np.uint8)
    ours, label = resize_pair(picture, None, (70, 128))
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.interpolate(planes, size=(70, 128), mode="bilinear", align_corners=False)[0]
    assert label is None
    assert np.array_equal(ours, theirs.round().byte().permute(1, 2, 0).numpy())


def test_unknown_ids_are_named() -> None:
    table = lookup_table(LabelMapping(classes={0: 255, 7: 3, 60000: 1}))
    assert to_indices(np.array([[0, 7, 60000]], dtype=np.uint16), table, colours=False).tolist() == [[255, 3, 1]]
    with pytest.raises(CorruptFileError, match="the ids 1, 8, which"):
        to_indices(np.array([[8, 7, 1]], dtype=np.uint8), table, colours=False)


def test_a_png_without_pixels_is_unusable() -> None:
    content = encoded(Image.fromarray(downloads.picture(0)), "PNG")
    with pytest.raises(CorruptFileError, match="cannot be decoded"):
        read_picture(content[: content.index(b"IDAT") - 4] + content[-12:])


def test_damage_to_what_a_camera_noted_is_nothing_worse_than_unusable() -> None:
    """Every bit of the EXIF part of a JPEG, one at a time; Pillow raises whatever its parser stumbles over."""
    notes = Image.Exif()
    notes[0x0112], notes[0x010E] = 6, "street"
    content = encoded(Image.fromarray(downloads.picture(0)), "JPEG", exif=notes)
    start = content.index(b"Exif")
    length = int.from_bytes(content[start - 2 : start], "big")
    for bit in range(8 * start, 8 * (start + length)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(CorruptFileError):
            read_picture(bytes(damaged))


def test_an_id_in_all_channels_is_read_and_colours_in_its_place_are_refused() -> None:
    ids = downloads.blocks(0, [*range(20)]).astype(np.uint8)
    same = encoded(Image.fromarray(np.stack([ids] * 3, axis=-1)), "PNG")
    assert read_label(same, ["8-bit RGB"], colours=False).tolist() == ids.tolist()
    with pytest.raises(CorruptFileError, match="not an id that is the same in all channels"):
        read_label(encoded(Image.fromarray(downloads.picture(1)), "PNG"), ["8-bit RGB"], colours=False)
