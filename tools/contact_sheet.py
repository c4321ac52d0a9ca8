"""Draw the picture of the scenes that the README shows: both domains with their labels beside them, and a legend."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from mfm_dist.config.class_files import DEFAULT, load_class_set
from mfm_dist.inference.overlays import colourise
from mfm_dist.scenes import DOMAINS, render_scene

TILE = (304, 152)
"""Width and height of one picture on the sheet, pixels; scenes are rendered at twice that and reduced."""
GUTTER = 6
BAND = 26
"""Height of the header and of one row of the legend, pixels."""
LEGEND_ROWS = 2
CLASSES = load_class_set(DEFAULT)
PAPER, TEXT = (255, 255, 255), (40, 40, 40)


def contact_sheet(*, seed: int, split: str, indices: dict[str, Sequence[int]]) -> Image.Image:
    """Draw one column of pictures and one of labels for each domain.

    Args:
        indices: the scenes to show for each domain, equally many.
    """
    width, height = TILE
    rows = len(indices[DOMAINS[0]])
    columns = 2 * len(DOMAINS)
    size = (columns * (width + GUTTER) + GUTTER, BAND + rows * (height + GUTTER) + GUTTER + LEGEND_ROWS * BAND)
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for place, domain in enumerate(DOMAINS):
        left = GUTTER + 2 * place * (width + GUTTER)
        draw.text((left + width // 2, BAND // 2 + 2), domain, fill=TEXT, font=font, anchor="mm")
        draw.text((left + width * 3 // 2, BAND // 2 + 2), f"{domain}: labels", fill=TEXT, font=font, anchor="mm")
        for row, index in enumerate(indices[domain]):
            scene = render_scene(seed=seed, domain=domain, split=split, index=index, height=2 * height, width=2 * width)
            top = BAND + row * (height + GUTTER)
            sheet.paste(Image.fromarray(scene.image).reduce(2), (left, top))
            label = torch.from_numpy(scene.label[::2, ::2].copy())
            sheet.paste(Image.fromarray(colourise(label, CLASSES.palette)), (left + width + GUTTER, top))
    _legend(draw, size)
    return sheet


def _legend(draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    font = ImageFont.load_default(13)
    per_row = -(-len(CLASSES) // LEGEND_ROWS)
    pitch = (size[0] - 2 * GUTTER) / per_row
    for number, (name, colour) in enumerate(zip(CLASSES.names, CLASSES.palette, strict=True)):
        left = GUTTER + pitch * (number % per_row)
        middle = size[1] - BAND * (LEGEND_ROWS - number // per_row) + BAND // 2
        draw.rectangle((left, middle - 7, left + 14, middle + 7), fill=colour)
        draw.text((left + 20, middle), name, fill=TEXT, font=font, anchor="lm")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/scenes.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="train")
    parser.add_argument("--game", type=int, nargs="+", default=[17, 14, 31, 25], help="scene numbers")
    parser.add_argument("--camera", type=int, nargs="+", default=[29, 15, 6, 12], help="as many scene numbers")
    options = parser.parse_args(arguments)
    if len(options.game) != len(options.camera):
        parser.error(f"--game names {len(options.game)} scenes and --camera {len(options.camera)}; name equally many")
    sheet = contact_sheet(
        seed=options.seed, split=options.split, indices={"game": options.game, "camera": options.camera}
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output, optimize=True)
    print(f"{options.output}: {sheet.width} x {sheet.height}, {options.output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
