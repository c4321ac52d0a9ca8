"""Reading the pictures and labels of other people's data sets, whose formats hold traps, and changing their size.

The traps: palette PNGs (the index is the id, the colours mean nothing), 16-bit RGB (Pillow keeps the high byte),
palettes of fewer than 8 bits (torchvision leaves several indices in one byte), grey of fewer than 8 bits (Pillow
scales it), and the orientation that cameras write into a JPEG instead of turning the picture.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFile, ImageOps

from mfm_dist.classes import IGNORE_INDEX, LabelMapping
from mfm_dist.data.photographs import opened
from mfm_dist.data.png import png_kind
from mfm_dist.errors import CorruptFileError

UPRIGHT = 1
_ORIENTATION_TAG = 0x0112
_UNKNOWN = -1


def read_picture(content: bytes) -> tuple[np.ndarray, str | None]:
    """Decode a picture of any format that Pillow knows.

    Returns:
        uint8 [H, W, 3], RGB, upright; and ``jpg`` or ``png`` where the bytes themselves may be stored: a file of 8-bit
        RGB or grey, not turned by an orientation tag. None where they may not.

    Raises:
        CorruptFileError: it cannot be decoded, has more than 8 bits a channel, or is impossibly large.
    """
    with opened(content) as picture:
        if picture.mode.startswith(("I", "F")) or (picture.format == "PNG" and content[24] > 8):
            raise CorruptFileError("has more than 8 bits a channel; convert it first, so that you choose how")
        upright = picture.getexif().get(_ORIENTATION_TAG, UPRIGHT) == UPRIGHT
        plain = picture.mode in ("RGB", "L") and upright and "transparency" not in picture.info
        stored = {"JPEG": "jpg", "PNG": "png"}.get(picture.format or "") if plain else None
        return np.array(ImageOps.exif_transpose(picture).convert("RGB")), stored


def read_label(content: bytes, kinds: Sequence[str], *, colours: bool) -> np.ndarray:
    """Read the ids that a label PNG holds, uint8 or uint16 [H, W], or its colours, 0xRRGGBB, int32 [H, W].

    Args:
        kinds: what it may be, as ``png_kind`` says it.

    Raises:
        CorruptFileError: it is no PNG of those kinds, or cannot be decoded.
    """
    kind = png_kind(content)
    if kind is None or kind not in kinds:
        why = "was it converted?" + (" Colours are told by colours: in --classes" if kind == "8-bit RGB" else "")
        raise CorruptFileError(f"is {kind or 'no PNG'}; expected is {' or '.join(kinds)}: {why}")
    if kind.startswith("16-bit RGB") and not colours:
        return _red_of_16_bits(content)
    with opened(content) as picture:
        if colours:
            red, green, blue = np.moveaxis(np.array(picture.convert("RGB")).astype(np.int32), -1, 0)
            codes: np.ndarray = red << 16 | green << 8 | blue
            return codes
        ids = np.array(picture)
    if ids.ndim == 3:
        if (ids[..., :1] != ids[..., 1:3]).any():
            raise CorruptFileError(
                "holds colours, not an id that is the same in all channels: is it a picture of labels?"
            )
        ids = ids[..., 0]
    return ids.astype(np.uint16 if kind == "16-bit grey" else np.uint8)


def _red_of_16_bits(content: bytes) -> np.ndarray:
    """Read the red channel, uint16 [H, W].

    Of two bytes Pillow keeps the more significant one. Told that they come the other way round, it keeps the other.
    """
    halves = []
    for order in ("16B", "16L"):
        with opened(content) as picture:
            assert isinstance(picture, ImageFile.ImageFile)
            picture.tile = [tile._replace(args=str(tile.args).replace("16B", order)) for tile in picture.tile]
            halves.append(np.array(picture)[..., 0].astype(np.uint16))
    return halves[0] << 8 | halves[1]


def lookup_table(labels: LabelMapping) -> np.ndarray:
    """Make a table of the index of a class by id or colour, -1 where unknown: int16 [65536], of colours [2^24]."""
    unlisted = IGNORE_INDEX if labels.others_ignored else _UNKNOWN
    table = np.full(1 << (24 if labels.colours else 16), unlisted, dtype=np.int16)
    table[list(labels.classes)] = list(labels.classes.values())
    return table


def to_indices(values: np.ndarray, table: np.ndarray, *, colours: bool) -> np.ndarray:
    """Look ids or colours up: uint8 [H, W].

    Raises:
        CorruptFileError: values that the table does not have; the first are named.
    """
    indices: np.ndarray = table[values]
    if indices.min() == _UNKNOWN:
        unknown = np.unique(values[indices == _UNKNOWN]).tolist()
        named = [f"#{value:06x}" if colours else str(value) for value in unknown[:10]]
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        kind = "colours" if colours else "ids"
        raise CorruptFileError(
            f"holds the {kind} {', '.join(named)}{more}, which stand neither for a class nor to be ignored"
        )
    return indices.astype(np.uint8)


def resize_pair(
    picture: np.ndarray, label: np.ndarray | None, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Resize a picture, uint8 [H, W, 3], and its label, uint8 [H, W]."""
    import torch

    from mfm_dist.data.geometry import resize_image, resize_label

    resized = resize_image(torch.from_numpy(picture).permute(2, 0, 1), size).permute(1, 2, 0).contiguous().numpy()
    if label is None:
        return resized, None
    # In 64 bits: torch looks for the nearest pixel with the precision of what it resizes.
    return resized, resize_label(torch.from_numpy(label).double(), size).byte().numpy()


def encode_png(picture: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
