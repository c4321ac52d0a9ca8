"""Where a point of the world falls in the picture, and the buffer that every shape is drawn into.

World: metres, x to the right, y up, z ahead; the origin lies on the road under the camera. Picture: (u, v) in image
heights from the top left corner, so that a scene is the same at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from PIL import Image, ImageDraw

from mfm_dist.scenes.looks import Colour, Material

Point = tuple[float, float]

NEAR = 0.7
"""Metres; nearer points are moved out to here, which is outside the picture for anything on the ground."""

SUPERSAMPLING = 2
"""The buffer is this many times finer than the image, for smooth edges; the label is a plain sample of it."""


class Facing(IntEnum):
    """Which way a surface looks: decides how much sun it gets."""

    UP = 0
    CAMERA = 1
    LEFT = 2
    RIGHT = 3
    GLOW = 4
    """Sky and lamps: not lit by the sun."""


@dataclass(frozen=True)
class View:
    """A pinhole camera on a road that may bend.

    Attributes:
        focal: focal length in image heights.
        height: of the camera over the road, metres.
        horizon: v of the horizon.
        centre: u of the vanishing point.
        bend: the road's centre line lies at x = bend * z^2.
    """

    focal: float
    height: float
    horizon: float
    centre: float
    bend: float

    def project(self, x: float, y: float, z: float) -> Point:
        z = max(z, NEAR)
        scale = self.focal / z
        return self.centre + (x + self.bend * z * z) * scale, self.horizon + (self.height - y) * scale

    def scale(self, z: float) -> float:
        """Image heights per metre at distance z."""
        return self.focal / max(z, NEAR)


@dataclass
class Inks:
    """One row for each ink, that is, for each set of pixels that share label, material, colour and distance."""

    label: list[int] = field(default_factory=list)
    colour: list[Colour] = field(default_factory=list)
    material: list[int] = field(default_factory=list)
    facing: list[int] = field(default_factory=list)
    depth: list[float] = field(default_factory=list)


class Canvas:
    """A buffer of ink numbers. Later shapes hide earlier ones, so draw from far to near."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.aspect = width / height
        self.inks = Inks()
        self._scale = float(SUPERSAMPLING * height)
        self._buffer = Image.new("I;16", (SUPERSAMPLING * width, SUPERSAMPLING * height))
        self._draw = ImageDraw.Draw(self._buffer)
        self._veil = Image.new("L", (width // 2, height // 2))
        self._veil_draw = ImageDraw.Draw(self._veil)

    def ink(
        self, label: int, colour: Colour, *, material: Material, facing: Facing = Facing.CAMERA, depth: float = 0.0
    ) -> int:
        inks = self.inks
        inks.label.append(label)
        inks.colour.append(colour)
        inks.material.append(material)
        inks.facing.append(facing)
        inks.depth.append(depth)
        return len(inks.label) - 1

    def polygon(self, ink: int, points: Sequence[Point]) -> None:
        scale = self._scale
        self._draw.polygon([(u * scale, v * scale) for u, v in points], fill=ink)

    def ellipse(self, ink: int, centre: Point, radius_u: float, radius_v: float) -> None:
        scale = self._scale
        u, v = centre
        box = ((u - radius_u) * scale, (v - radius_v) * scale, (u + radius_u) * scale, (v + radius_v) * scale)
        self._draw.ellipse(box, fill=ink)

    def colour_at(self, point: Point) -> Colour | None:
        """The colour drawn so far at a point, None outside the picture: what shows through spokes and slats."""
        column, row = int(point[0] * self._scale), int(point[1] * self._scale)
        if not (0 <= column < self._buffer.width and 0 <= row < self._buffer.height):
            return None
        return self.inks.colour[int(self._buffer.getpixel((column, row)))]  # type: ignore[arg-type]

    def veil_polygon(self, points: Sequence[Point], strength: float) -> None:
        """Add to the soft layer: shadow where it falls on the ground."""
        scale = self.height / 2.0
        self._veil_draw.polygon([(u * scale, v * scale) for u, v in points], fill=int(255 * strength))

    def veil_ellipse(self, centre: Point, radius_u: float, radius_v: float, strength: float) -> None:
        """Add to the soft layer: cloud where it falls on the sky, shadow on the ground."""
        scale = self.height / 2.0
        (u, v), value = centre, int(255 * strength)
        box = ((u - radius_u) * scale, (v - radius_v) * scale, (u + radius_u) * scale, (v + radius_v) * scale)
        self._veil_draw.ellipse(box, fill=value)

    def ink_map(self) -> np.ndarray:
        """Ink numbers, uint16 [2H, 2W]."""
        return np.asarray(self._buffer)

    def veil(self) -> Image.Image:
        """The soft layer, mode L, half the size of the image."""
        return self._veil
