"""Opening the picture files of other people, which may be damaged in every way or claim any size."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from mfm_dist.data.png import check_length, is_interlaced, read_chunks
from mfm_dist.errors import CorruptFileError

LARGEST_PICTURE = 1 << 26
"""Pixels of the largest picture that is decoded, 64 Mi: twice the largest of any street data set. A header may claim
four billion pixels in a file of a few bytes."""


@contextmanager
def opened(content: bytes, most_pixels: int = LARGEST_PICTURE) -> Iterator[Image.Image]:
    """Open a picture of any format that Pillow knows; what fails to decode inside the block is an error of its file.

    Args:
        most_pixels: of a picture that is decoded.

    Raises:
        CorruptFileError: it cannot be decoded, or claims too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            picture = Image.open(io.BytesIO(content))
        with picture:
            width, height = picture.size
            if not 0 < width * height <= most_pixels:
                raise CorruptFileError(f"claims {width} x {height} pixels, not 1 to {most_pixels}: make it smaller")
            chunks = read_chunks(memoryview(content)) if picture.format == "PNG" else None
            yield picture
            # Pillow leaves rows black for which there were no data, and says nothing.
            if chunks and (is_interlaced(chunks) or _last_row_is_black(picture)):
                check_length(chunks)
    except CorruptFileError:
        raise
    except Image.DecompressionBombError as error:
        raise CorruptFileError(f"cannot be decoded ({error}): make it smaller") from error
    except Exception as error:  # decoders meet damaged files with errors of every kind
        raise CorruptFileError(f"cannot be decoded ({type(error).__name__}: {error})") from error


def _last_row_is_black(picture: Image.Image) -> bool:
    width, height = picture.size
    return picture.crop((0, height - 1, width, height)).getbbox(alpha_only=False) is None
