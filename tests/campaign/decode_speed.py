#!/usr/bin/env python
"""How fast samples are decoded beside bare torchvision, whose PNG decoder dies of wrong data.

python -m tests.campaign.decode_speed [--rounds 60] [--record FILE]

Both decode the same bytes in turn, in one thread; ratios are medians over the rounds. A sample is a JPEG of 512 x 1024
and its label as PNG, as the shards hold them; beside it a sample of PNGs alone, and each part.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from mfm_dist.data.reader import decode_sample
from mfm_dist.shards.pictures import encode_png
from mfm_dist.shards.writer import encode_jpeg, encode_label_png
from mfm_dist.storage import JsonLines
from tests.helpers.provenance import provenance
from tests.helpers.runs import REPOSITORY

RECORD = REPOSITORY / "docs" / "benchmarks" / "decode_speed.jsonl"
HEIGHT, WIDTH = 512, 1024
LEAST = 0.9
"""Of torchvision's rate, for a sample with a JPEG image."""


def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Draw an image of smooth colours with some noise, and a label of areas with ragged borders."""
    generator = np.random.default_rng(0)
    areas = Image.fromarray(generator.integers(0, 19, (HEIGHT // 16, WIDTH // 16), dtype=np.uint8))
    label = np.array(areas.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST).filter(ImageFilter.ModeFilter(9)))
    colours = Image.fromarray(generator.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8))
    smooth = np.array(colours.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1)))
    image = (smooth + generator.normal(0, 3, smooth.shape)).clip(0, 255).astype(np.uint8)
    return image, label


def bytes_of(content: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(content), dtype=np.uint8)


def bare(image: np.ndarray, label: np.ndarray, image_format: str) -> None:
    """Decode by torchvision alone."""
    decode = decode_jpeg if image_format == "jpg" else decode_png
    decode(torch.from_numpy(image), mode=ImageReadMode.RGB)
    decode_png(torch.from_numpy(label), mode=ImageReadMode.UNCHANGED)


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, append to the record, and return 1 if a sample with a JPEG image is decoded too slowly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="(%(default)s)")
    parser.add_argument("--record", type=Path, default=RECORD, help="appended to (%(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    image, label = drawn()
    labels = bytes_of(encode_label_png(label))
    ratios = {}
    for image_format, content in (("jpg", encode_jpeg(image)), ("png", encode_png(image))):
        images = bytes_of(content)
        ours = partial(decode_sample, "key", image_format, images, labels, None)
        theirs = partial(bare, images, labels, image_format)
        assert np.array_equal(ours().label.numpy(), np.array(Image.open(io.BytesIO(labels.tobytes()))))
        pairs = [(milliseconds(theirs), milliseconds(ours)) for _ in range(arguments.rounds)]
        ratios[image_format] = {
            "torchvision_ms": round(statistics.median(one for one, _ in pairs), 2),
            "ours_ms": round(statistics.median(one for _, one in pairs), 2),
            "rate_ratio": round(statistics.median(one / other for one, other in pairs), 3),
        }
    size = {"height": HEIGHT, "width": WIDTH, "rounds": arguments.rounds}
    line = {**size, "image_as_jpeg": ratios["jpg"], "image_as_png": ratios["png"], **provenance(REPOSITORY)}
    JsonLines(arguments.record).append(line)
    print(json.dumps(line, indent=1))
    return int(ratios["jpg"]["rate_ratio"] < LEAST)


if __name__ == "__main__":
    sys.exit(main())
