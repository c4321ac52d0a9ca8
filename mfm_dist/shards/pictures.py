"""Reading the pictures and labels of other people's data sets, whose formats hold traps, and changing their size.

The traps: palette PNGs (the index is the id, the colours mean nothing), 16-bit RGB (Pillow keeps the high byte),
palettes of fewer than 8 bits (torchvision leaves several indices in one byte), grey of fewer than 8 bits (Pillow
scales it), and the orientation that cameras write into a JPEG instead of turning the picture.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageFile, ImageOps

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


def read_ids(content: bytes, kinds: Sequence[str]) -> np.ndarray:
    """Read the ids that a label PNG holds: uint8 or uint16 [H, W].

    Args:
        kinds: what it may be, as ``png_kind`` says it.

    Raises:
        CorruptFileError: it is no PNG of those kinds, or cannot be decoded.
    """
    kind = png_kind(content)
    if kind is None or kind not in kinds:
        raise CorruptFileError(f"is {kind or 'no PNG'}; expected is {' or '.join(kinds)}: was it converted?")
    if kind.startswith("16-bit RGB"):
        return _red_of_16_bits(content)
    with opened(content) as picture:
        ids = np.array(picture)
    assert ids.ndim == 2
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


def lookup_table(train_ids: Mapping[int, int]) -> np.ndarray:
    """Make a table of train ids by id, -1 for those unknown: int16 [65536]."""
    table = np.full(1 << 16, _UNKNOWN, dtype=np.int16)
    table[list(train_ids)] = list(train_ids.values())
    return table


def to_train_ids(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look ids up: uint8 [H, W].

    Raises:
        CorruptFileError: ids that the table does not have; all are named.
    """
    train_ids: np.ndarray = table[ids]
    if train_ids.min() == _UNKNOWN:
        unknown = np.unique(ids[train_ids == _UNKNOWN]).tolist()
        more = " …" if len(unknown) > 10 else ""
        raise CorruptFileError(f"holds the ids {', '.join(map(str, unknown[:10]))}{more}, which have no meaning here")
    return train_ids.astype(np.uint8)


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
