"""From the bytes of a member to pixels, never trusting them: sizes are read from the header before anything is decoded.

Decoded images are views [3, H, W] of rows of RGB triples, as the decoders leave them. Keeping that layout up to the
device makes cropping and stacking copies of whole rows; turning it round on the host costs a fifth of the decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.photographs import LARGEST_PICTURE, opened
from mfm_dist.data.png import PNG_START, plain_grey, png_kind, read_chunks
from mfm_dist.errors import ConfigError, CorruptFileError, first_line

_JPEG_START = b"\xff\xd8"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers that start a frame (SOF0 to SOF15); the three left out mean something else."""
_ALONE = frozenset([0x01, *range(0xD0, 0xD9)])
"""JPEG markers without a length."""

JpegDecoder = Callable[[Tensor], Tensor]
"""uint8 [size] -> uint8 [3, H, W], RGB. Raises RuntimeError or ValueError for bytes it cannot decode."""


def jpeg_decoder(name: str) -> JpegDecoder:
    """Return the decoder that ``data.decoder`` names. Raises ConfigError where it is not installed."""
    if name == "torchvision":
        return torchvision_jpeg
    assert name == "simplejpeg"
    if find_spec("simplejpeg") is None:
        raise ConfigError("data.decoder=simplejpeg: it is not installed; pip install simplejpeg, or use torchvision")
    return _simplejpeg


def _simplejpeg(payload: Tensor) -> Tensor:
    decoded = import_module("simplejpeg").decode_jpeg(payload.numpy(), colorspace="RGB")
    return torch.from_numpy(decoded).permute(2, 0, 1)


def torchvision_jpeg(payload: Tensor) -> Tensor:
    image: Tensor = decode_jpeg(payload, mode=ImageReadMode.RGB)
    return image


def decode_image(payload: np.ndarray, image_format: str, decode: JpegDecoder = torchvision_jpeg) -> Tensor:
    """Decode an image: uint8 [size] -> uint8 [3, H, W], RGB, a view of rows of triples.

    Raises:
        CorruptFileError: the bytes are no 8-bit image of that format, or claim too many pixels.
    """
    check_size("image", header_size(payload, image_format, "image"))
    if image_format == "png":
        return torch.from_numpy(_png_image(payload)).permute(2, 0, 1)
    try:
        return decode(torch.from_numpy(payload))
    except (RuntimeError, ValueError) as error:
        raise CorruptFileError(f"its image is no readable {image_format} ({first_line(error)})") from error


def decode_label(payload: np.ndarray, num_classes: int | None, image_size: tuple[int, int]) -> Tensor:
    """Decode a label and check it: uint8 [size] -> uint8 [H, W].

    Args:
        num_classes: None where its ids are known to be classes.
        image_size: height and width.

    Raises:
        CorruptFileError: the bytes are no 8-bit grey PNG of ``image_size``, or an id is no class.
    """
    size = header_size(payload, "png", "label")
    check_size("label", size)
    if size != image_size:
        sizes = [f"{height}x{width}" for height, width in (size, image_size)]
        raise CorruptFileError(f"its label is {sizes[0]} pixels and its image {sizes[1]} (height x width)")
    label = _png_label(payload)
    if num_classes is not None:
        check_ids(label, num_classes)
    return torch.from_numpy(label)


def _png_image(payload: np.ndarray) -> np.ndarray:
    """Decode a PNG of at most 8 bits a channel: uint8 [H, W, 3], RGB."""
    kind = png_kind(payload.data)
    if kind is not None and kind.startswith("16-bit"):
        raise CorruptFileError(f"its image is {kind}; 8 bits a channel are needed")
    try:
        with opened(payload.tobytes()) as picture:
            return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except CorruptFileError as error:
        raise CorruptFileError(f"its image is no readable png: it {error}") from error


def _png_label(payload: np.ndarray) -> np.ndarray:
    """Decode a PNG of 8-bit grey, or of a palette whose index is the id: uint8 [H, W]."""
    kind = png_kind(payload.data)
    if kind not in ("8-bit grey", "8-bit palette"):
        raise CorruptFileError(f"its label is {kind}; 8-bit grey is needed")
    try:
        label = plain_grey(read_chunks(payload.data))
        if label is None:
            with opened(payload.tobytes()) as picture:
                label = np.array(picture)
    except CorruptFileError as error:
        raise CorruptFileError(f"its label is no readable png: it {error}") from error
    return label


def check_ids(label: np.ndarray, num_classes: int) -> None:
    """Raise CorruptFileError when a label, uint8 [H, W], holds an id that is neither class nor ``IGNORE_INDEX``."""
    signed = label.view(np.int8)  # 255 is -1 then, and what is allowed lies side by side; no copy is made
    if signed.min() >= IGNORE_INDEX - 256 and signed.max() < num_classes:
        return
    unknown = np.setdiff1d(np.unique(label), [*range(num_classes), IGNORE_INDEX])
    ids = ", ".join(map(str, unknown.tolist()))
    raise CorruptFileError(f"its label holds class ids {ids}; allowed are 0 to {num_classes - 1} and {IGNORE_INDEX}")


def check_size(what: str, size: tuple[int, int]) -> None:
    """Raise CorruptFileError when a header claims no pixel or more than ``LARGEST_PICTURE``."""
    height, width = size
    if not 0 < height * width <= LARGEST_PICTURE:
        raise CorruptFileError(f"its {what} claims {height}x{width} pixels; 1 to {LARGEST_PICTURE} are decoded")


def header_size(payload: np.ndarray, image_format: str, what: str) -> tuple[int, int]:
    """Read height and width that a PNG or JPEG claims in its header. Raises CorruptFileError for any other file."""
    content = payload.data
    size = _jpeg_size(content) if image_format == "jpg" else _png_size(content)
    if size is None:
        raise CorruptFileError(f"its {what} is no readable {image_format} (no header)")
    return size


def _png_size(content: memoryview) -> tuple[int, int] | None:
    """Read the first chunk of a PNG, which holds width and height."""
    if len(content) < 24 or content[:8] != PNG_START or content[12:16] != b"IHDR":
        return None
    return int.from_bytes(content[20:24], "big"), int.from_bytes(content[16:20], "big")


def _jpeg_size(content: memoryview) -> tuple[int, int] | None:
    """Go from marker to marker, each with its length, up to the start of the frame."""
    if content[:2] != _JPEG_START:
        return None
    at = 2
    while at + 9 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in _FRAMES:
            return int.from_bytes(content[at + 5 : at + 7], "big"), int.from_bytes(content[at + 7 : at + 9], "big")
        if marker == 0xFF:  # any number of these may fill up
            at += 1
        elif marker in _ALONE:
            at += 2
        else:
            at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None
