"""Colours, light and finish of the object pictures: wide ranges that know nothing of the streets' two domains."""

from __future__ import annotations

from collections.abc import Mapping
from colorsys import hsv_to_rgb
from math import cos, pi, sin

import numpy as np
from PIL import Image

from mfm_dist.scenes.dice import Dice, Range
from mfm_dist.scenes.light import Weather
from mfm_dist.scenes.looks import Colour, Looks, Material, Palette

ANY: Range = (0.0, 1.0)

PAINTS: Mapping[str, tuple[Range, Range, Range]] = {
    # Hue, saturation and value that a thing of this name may have, each in 0..1; hues may pass 1.
    "asphalt": (ANY, (0.0, 0.25), (0.10, 0.75)),
    "paving": ((-0.05, 0.2), (0.0, 0.55), (0.2, 1.0)),
    "kerb": (ANY, (0.0, 0.3), (0.3, 1.0)),
    "marking": ((0.0, 0.2), (0.0, 0.6), (0.8, 1.0)),
    "grass": ((0.12, 0.45), (0.2, 1.0), (0.2, 0.9)),
    "gravel": (ANY, (0.0, 0.4), (0.2, 0.9)),
    "rail": (ANY, (0.0, 0.4), (0.1, 0.8)),
    "facade": (ANY, (0.0, 0.8), (0.2, 1.0)),
    "barrier": ((-0.1, 0.2), (0.0, 0.8), (0.2, 1.0)),
    "fence": (ANY, (0.0, 0.8), (0.1, 1.0)),
    "roof": (ANY, (0.0, 0.8), (0.1, 0.8)),
    "trim": (ANY, (0.0, 0.4), (0.1, 1.0)),
    "glass": ((0.4, 0.75), (0.0, 0.8), (0.05, 0.9)),
    "door": (ANY, ANY, (0.1, 0.9)),
    "awning": (ANY, (0.2, 1.0), (0.2, 1.0)),
    "leaves": ((0.05, 0.48), (0.15, 1.0), (0.15, 0.9)),
    "trunk": ((0.0, 0.15), (0.0, 0.7), (0.1, 0.7)),
    "metal": (ANY, (0.0, 0.3), (0.1, 0.95)),
    "lamp box": (ANY, (0.0, 0.8), (0.03, 0.45)),
    "cloth": (ANY, ANY, (0.05, 1.0)),
    "trousers": (ANY, (0.0, 0.9), (0.05, 0.9)),
    "skin": ((0.01, 0.1), (0.15, 0.7), (0.25, 1.0)),
    "hair": ((0.0, 0.14), (0.0, 0.9), (0.03, 0.95)),
    "paint": (ANY, ANY, (0.05, 1.0)),
    "livery": (ANY, ANY, (0.15, 1.0)),
    "tyre": (ANY, (0.0, 0.3), (0.02, 0.3)),
    "hub": (ANY, (0.0, 0.3), (0.3, 1.0)),
    "dark": (ANY, (0.0, 0.5), (0.02, 0.35)),
    "zenith": ((0.48, 0.72), (0.1, 1.0), (0.2, 0.85)),
    "haze": ((-0.15, 0.65), (0.0, 0.5), (0.5, 0.95)),
    "cloud": (ANY, (0.0, 0.15), (0.75, 1.0)),
    "anything": (ANY, (0.0, 0.9), (0.1, 1.0)),
}

UNUSUAL = 0.08
"""Share of names that take any colour at all in one picture: trees turn blue and skies green now and then."""

JITTER = 0.22


def any_colour(dice: Dice) -> Colour:
    return _colour(dice, PAINTS["anything"])


def _colour(dice: Dice, ranges: tuple[Range, Range, Range]) -> Colour:
    hue, saturation, value = (dice.between(limits) for limits in ranges)
    red, green, blue = hsv_to_rgb(hue % 1.0, saturation, value)
    return 255.0 * red, 255.0 * green, 255.0 * blue


def draw_palette(dice: Dice) -> Palette:
    """Two colours for every name that the street's things ask for: another palette for every picture."""
    palette = {}
    for name, ranges in PAINTS.items():
        chosen = PAINTS["anything"] if dice.chance(UNUSUAL) else ranges
        palette[name] = (_colour(dice, chosen), _colour(dice, chosen))
    return palette


def draw_looks(dice: Dice) -> Looks:
    return Looks(dice, draw_palette(dice), JITTER)


ANY_DAY = Weather(
    sun=(0.0, 3.0), shadow_strength=(0.1, 0.8), contrast=(0.0, 0.5), warmth=(-0.3, 0.3), tint=(-0.15, 0.15),
    haze=(0.0, 0.012), exposure=(0.9, 1.6), gamma=(0.5, 1.4), vignette=(0.0, 0.5), blur=(0.0, 0.009),
    noise=(0.0, 12.0), clouds=(3.0, 16.0), cloud_strength=(0.4, 1.0),
)  # fmt: skip


def draw_textures(dice: Dice) -> np.ndarray:
    """Strengths of the surface noise, float32 [materials, 3]: most surfaces nearly plain, some very rough.

    Leaves and grass are never plain, and the sky is never rough.
    """
    strengths = np.array([[0.35 * dice.unit() ** 3 for _ in range(3)] for _ in Material], dtype=np.float32)
    strengths[[Material.LEAVES, Material.GRASS]] += np.float32(dice.between((0.04, 0.2)))
    strengths[Material.SKY] *= np.float32(0.2)
    return strengths


def finish(picture: np.ndarray, dice: Dice) -> np.ndarray:
    """What is left of a picture after uneven light, a cast, and another camera's or printer's rendering.

    Args:
        picture: RGB, uint8 [H, W, 3]; returned alike.
    """
    height, width = picture.shape[:2]
    if dice.chance(0.15):
        share = dice.between((0.35, 0.7))
        coarse = Image.fromarray(picture).resize((int(share * width), int(share * height)), Image.Resampling.BOX)
        picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    rgb = picture.astype(np.float32)
    grey = rgb.mean(axis=2, keepdims=True)
    saturation = 0.0 if dice.chance(0.06) else dice.between((0.3, 1.5))
    rgb = grey + np.float32(saturation) * (rgb - grey)
    # Brightness and contrast are set, not scaled, so that few pictures end up too dark or too flat to tell the object.
    brightness, contrast = dice.between((60.0, 190.0)), dice.between((28.0, 75.0))
    rgb = brightness + np.float32(min(contrast / max(float(grey.std()), 1.0), 4.0)) * (rgb - np.float32(grey.mean()))
    turn, strength = 2.0 * pi * dice.unit(), 0.6 * dice.unit() ** 2
    across = np.linspace(-strength * cos(turn), strength * cos(turn), width, dtype=np.float32)
    down = np.linspace(-strength * sin(turn), strength * sin(turn), height, dtype=np.float32)
    rgb *= (1.0 + down[:, None] + across[None, :])[:, :, None]
    if dice.chance(0.5):
        rgb += np.array([dice.between((-35.0, 35.0)) for _ in range(3)], dtype=np.float32)
    return rgb.clip(0.0, 255.0).astype(np.uint8)
