"""Reading photographs as the networks expect them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class UnreadableImageError(Exception):
    """A file that is no image, is damaged, or is too large; the message says which."""


def read_image(path: Path) -> Tensor:
    """An image file as uint8 RGB [3, H, W], upright as its EXIF orientation says.

    Greyscale becomes three equal channels, 16 bits become 8, transparent pixels are laid over black, and of an
    animation the first picture is taken.

    Raises:
        UnreadableImageError: for a file that cannot be decoded, or with more pixels than PIL's MAX_IMAGE_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                pixels = np.array(_to_rgb(ImageOps.exif_transpose(file)))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UnreadableImageError(f"more than {limit:.0f} million pixels: make it smaller") from error
    except Exception as error:  # decoders meet damaged files with errors of every kind
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale, in older versions of PIL as 32-bit
        values = np.asarray(image).astype(np.float64) / 257.0  # 65535 becomes 255
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
