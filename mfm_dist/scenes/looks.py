"""What things are made of: colours and surface textures of both domains.

The palettes overlap on purpose, within a domain (a wall may have a building's colour, a bus a truck's, a pavement the
road's) and between domains, so that no class can be told by its colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np

from mfm_dist.scenes.dice import Dice

Colour = tuple[float, float, float]
"""Red, green, blue in 0..255."""


class Material(IntEnum):
    """Rows of ``TEXTURES``."""

    SMOOTH = 0
    ASPHALT = 1
    PAVING = 2
    GRASS = 3
    MASONRY = 4
    LEAVES = 5
    CLOTH = 6
    PAINT = 7
    SKY = 8
    WOOD = 9


TEXTURES: Mapping[str, np.ndarray] = {
    # Rows: Material. Columns: strength of the noise that lies on the ground, of the broad and of the fine noise that
    # lie in the picture plane, as shares of the surface's brightness.
    "game": np.array(
        [
            [0.000, 0.000, 0.000],
            [0.015, 0.000, 0.000],
            [0.020, 0.000, 0.000],
            [0.050, 0.000, 0.010],
            [0.000, 0.010, 0.010],
            [0.000, 0.020, 0.050],
            [0.000, 0.000, 0.010],
            [0.000, 0.000, 0.000],
            [0.000, 0.000, 0.000],
            [0.000, 0.000, 0.020],
        ],
        dtype=np.float32,
    ),
    "camera": np.array(
        [
            [0.000, 0.030, 0.020],
            [0.100, 0.050, 0.025],
            [0.110, 0.050, 0.030],
            [0.180, 0.080, 0.080],
            [0.000, 0.075, 0.045],
            [0.000, 0.110, 0.170],
            [0.000, 0.060, 0.060],
            [0.000, 0.080, 0.025],
            [0.000, 0.030, 0.000],
            [0.000, 0.080, 0.090],
        ],
        dtype=np.float32,
    ),
}

Palette = Mapping[str, tuple[Colour, ...]]

GAME_PALETTE: Palette = {
    "asphalt": ((112, 112, 118), (104, 106, 112), (122, 121, 124)),
    "paving": ((168, 162, 156), (186, 176, 160), (150, 148, 150), (134, 132, 134)),
    "kerb": ((205, 202, 196), (190, 188, 186)),
    "marking": ((246, 246, 242),),
    "grass": ((96, 172, 64), (112, 182, 70), (84, 158, 66)),
    "gravel": ((172, 154, 122), (152, 140, 120)),
    "rail": ((96, 84, 78),),
    "facade": (
        (240, 206, 146), (226, 146, 112), (176, 196, 222), (244, 232, 206), (204, 106, 84), (232, 182, 188),
        (186, 206, 168), (214, 196, 170), (196, 120, 92), (226, 222, 216), (158, 168, 182),
    ),
    "barrier": ((214, 196, 170), (196, 120, 92), (226, 222, 216), (190, 172, 150), (204, 106, 84)),
    "fence": ((150, 104, 64), (236, 234, 228), (176, 128, 80), (84, 110, 96), (92, 96, 104)),
    "roof": ((188, 82, 62), (168, 70, 58), (104, 92, 104), (132, 84, 68)),
    "trim": ((250, 246, 238), (236, 228, 214), (120, 96, 80)),
    "glass": ((108, 164, 208), (92, 142, 190), (128, 182, 216)),
    "door": ((128, 72, 46), (66, 108, 92), (92, 84, 132), (158, 58, 52)),
    "awning": ((220, 66, 60), (66, 140, 92), (66, 104, 186), (240, 180, 60)),
    "leaves": ((66, 146, 52), (82, 164, 58), (54, 130, 62), (104, 176, 62), (132, 158, 66)),
    "trunk": ((126, 88, 56), (110, 78, 54)),
    "metal": ((140, 146, 152), (110, 118, 126), (164, 166, 168)),
    "lamp box": ((46, 52, 50), (62, 64, 62)),
    "cloth": (
        (206, 62, 62), (62, 92, 176), (240, 202, 84), (70, 70, 84), (236, 236, 236), (92, 156, 112), (160, 88, 156),
        (232, 136, 62), (118, 96, 78), (58, 58, 66),
    ),
    "trousers": ((56, 74, 120), (64, 62, 70), (120, 104, 82), (84, 92, 104), (44, 46, 56)),
    "skin": ((238, 194, 160), (206, 152, 114), (148, 98, 70), (250, 212, 182)),
    "hair": ((62, 44, 34), (28, 24, 26), (168, 124, 70), (150, 148, 146), (200, 60, 50), (240, 240, 240)),
    "paint": (
        (206, 40, 44), (44, 92, 190), (238, 238, 240), (52, 54, 60), (178, 182, 188), (244, 192, 48), (62, 140, 96),
        (140, 188, 214), (122, 44, 60),
    ),
    "livery": ((226, 62, 56), (250, 204, 70), (238, 240, 238), (58, 120, 190), (80, 156, 108), (176, 180, 188)),
    "tyre": ((34, 34, 38),),
    "hub": ((176, 180, 186),),
    "dark": ((44, 46, 52),),
    "zenith": ((64, 140, 232), (80, 152, 236), (112, 172, 236), (150, 194, 236)),
    "haze": ((176, 216, 246), (190, 224, 248), (214, 230, 244)),
    "cloud": ((255, 255, 255),),
}  # fmt: skip

CAMERA_PALETTE: Palette = {
    "asphalt": ((82, 80, 84), (92, 84, 76), (72, 78, 90), (100, 98, 96), (66, 64, 64)),
    "paving": ((124, 118, 112), (108, 106, 108), (140, 126, 112), (92, 90, 92), (128, 112, 102)),
    "kerb": ((146, 142, 136), (122, 120, 120)),
    "marking": ((206, 204, 194), (182, 178, 164)),
    "grass": ((104, 108, 62), (126, 116, 70), (84, 94, 56), (138, 128, 88)),
    "gravel": ((116, 104, 92), (130, 124, 114)),
    "rail": ((84, 72, 66),),
    "facade": (
        (170, 158, 140), (142, 134, 128), (188, 180, 166), (122, 96, 84), (158, 146, 114), (112, 108, 108),
        (134, 86, 72), (176, 152, 128), (98, 90, 84), (150, 156, 160), (196, 176, 142),
    ),
    "barrier": ((142, 134, 128), (122, 96, 84), (112, 108, 108), (156, 148, 136), (134, 86, 72)),
    "fence": ((104, 84, 66), (126, 120, 110), (70, 74, 72), (58, 62, 66), (140, 120, 96)),
    "roof": ((118, 74, 60), (86, 78, 78), (66, 66, 72), (98, 70, 60)),
    "trim": ((196, 190, 178), (152, 144, 134), (84, 76, 70)),
    "glass": ((64, 74, 84), (48, 54, 62), (96, 108, 116), (120, 134, 144)),
    "door": ((72, 52, 42), (50, 62, 60), (58, 56, 70), (92, 52, 44)),
    "awning": ((138, 58, 52), (62, 88, 72), (64, 78, 112), (150, 122, 80)),
    "leaves": ((78, 90, 50), (96, 98, 56), (62, 76, 48), (112, 104, 54), (140, 104, 52), (124, 78, 44), (88, 100, 72)),
    "trunk": ((82, 70, 60), (64, 56, 50)),
    "metal": ((104, 106, 106), (80, 84, 84), (124, 122, 116)),
    "lamp box": ((36, 38, 36), (50, 46, 38)),
    "cloth": (
        (120, 56, 54), (58, 66, 92), (44, 44, 48), (66, 66, 70), (148, 142, 134), (84, 92, 78), (92, 70, 86),
        (136, 96, 66), (96, 84, 72), (176, 172, 168),
    ),
    "trousers": ((52, 58, 76), (48, 46, 48), (90, 80, 66), (66, 70, 76), (38, 38, 42)),
    "skin": ((204, 164, 138), (172, 126, 98), (118, 82, 62), (220, 184, 160)),
    "hair": ((52, 42, 36), (30, 28, 28), (128, 100, 70), (126, 122, 118), (120, 56, 50), (190, 188, 184)),
    "paint": (
        (112, 44, 44), (52, 66, 98), (176, 176, 176), (44, 44, 48), (128, 130, 132), (84, 86, 90), (64, 78, 70),
        (98, 110, 124), (150, 140, 122),
    ),
    "livery": ((150, 62, 54), (186, 158, 82), (186, 184, 178), (72, 92, 122), (88, 108, 88), (132, 134, 136)),
    "tyre": ((28, 27, 27),),
    "hub": ((112, 112, 112),),
    "dark": ((36, 35, 36),),
    "zenith": ((150, 176, 206), (186, 194, 202), (128, 162, 206), (200, 202, 204)),
    "haze": ((212, 216, 216), (224, 218, 206), (204, 208, 214)),
    "cloud": ((240, 238, 234), (222, 224, 230)),
}  # fmt: skip

PALETTES: Mapping[str, Palette] = {"game": GAME_PALETTE, "camera": CAMERA_PALETTE}

JITTER: Mapping[str, float] = {"game": 0.05, "camera": 0.14}
"""``Looks.jitter`` of each domain."""


class Looks:
    """Draws colours from a palette.

    Args:
        jitter: how far one thing's brightness strays from its palette entry, as a share; hue strays a third as far.
    """

    def __init__(self, dice: Dice, palette: Palette, jitter: float) -> None:
        self.dice = dice
        self._palette = palette
        self._jitter = jitter

    @classmethod
    def of_domain(cls, dice: Dice, domain: str) -> Looks:
        return cls(dice, PALETTES[domain], JITTER[domain])

    def pick(self, name: str) -> Colour:
        """A colour for one thing, from the palette entry ``name``."""
        return self.vary(self.dice.pick(self._palette[name]))

    def vary(self, colour: Colour) -> Colour:
        """The same paint in another place: worn, wet, patched."""
        unit, hue = self.dice.unit, 2.0 * self._jitter / 3.0
        value = 1.0 + self._jitter * (2.0 * unit() - 1.0)
        red, green, blue = (level * value * (1.0 + hue * (unit() - 0.5)) for level in colour)
        return red, green, blue


def toned(colour: Colour, factor: float) -> Colour:
    """A lighter (factor > 1) or darker (factor < 1) colour of the same hue."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def mixed(first: Colour, second: Colour, share: float) -> Colour:
    """``first`` moved towards ``second`` by ``share`` of the way."""
    rest = 1.0 - share
    return (
        first[0] * rest + second[0] * share,
        first[1] * rest + second[1] * share,
        first[2] * rest + second[2] * share,
    )
