"""A box on the road with its own axes, on which vehicles are drawn in perspective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi, sin

from mfm_dist.scenes.looks import Colour, Material
from mfm_dist.scenes.pen import Pen
from mfm_dist.scenes.view import Facing, Point

CIRCLE = tuple((cos(2.0 * pi * step / 12), sin(2.0 * pi * step / 12)) for step in range(12))


@dataclass(frozen=True)
class Body:
    """A box on the road with its own axes: a along it from the tail, b across it from its middle, y up; metres.

    Attributes:
        x, z: ground position of the middle of the end nearest the camera; of the middle if it crosses.
        heading: "away" shows the tail, "toward" the front, "left" and "right" cross the road.
    """

    pen: Pen
    label: int
    x: float
    z: float
    length: float
    width: float
    heading: str

    def world(self, a: float, y: float, b: float) -> tuple[float, float, float]:
        if self.heading == "away":
            return self.x + b, y, self.z + a
        if self.heading == "toward":
            return self.x + b, y, self.z + self.length - a
        ahead = a - 0.5 * self.length
        return self.x + (ahead if self.heading == "right" else -ahead), y, self.z + b

    @property
    def crosses(self) -> bool:
        return self.heading in ("left", "right")

    def visible_side(self) -> float:
        """The b of the long side that the camera sees, 0.0 if it sees neither."""
        if self.crosses:
            return -0.5 * self.width
        x = self.x + self.pen.view.bend * self.z**2
        if abs(x) <= 0.5 * self.width:
            return 0.0
        return -0.5 * self.width if x > 0.0 else 0.5 * self.width

    def side_facing(self) -> Facing:
        if self.crosses:
            return Facing.CAMERA
        return Facing.LEFT if self.visible_side() < 0.0 else Facing.RIGHT

    def ink(self, colour: Colour, facing: Facing = Facing.CAMERA, paint: bool = False) -> int:
        return self.pen.ink(self.label, colour, self.z, Material.PAINT if paint else Material.SMOOTH, facing)

    def shape(self, ink: int, points: Sequence[tuple[float, float, float]]) -> None:
        """A polygon with corners (a, y, b)."""
        self.pen.surface(ink, [self.world(a, y, b) for a, y, b in points])

    def side(self, ink: int, points: Sequence[Point], inset: float = 0.0) -> None:
        """A polygon (a, y) on the visible long side, ``inset`` metres inside it."""
        b = self.visible_side()
        if b:
            b -= inset if b > 0.0 else -inset
            self.shape(ink, [(a, y, b) for a, y in points])

    def lean(self, ink: int, points: Sequence[Point], half_widths: tuple[float, float]) -> None:
        """A polygon (a, y) on a side that leans in from the first half width at its foot to the second at its top."""
        b = self.visible_side()
        foot, top = min(y for _, y in points), max(y for _, y in points)
        if b:
            sign = 1.0 if b > 0.0 else -1.0
            slope = (half_widths[1] - half_widths[0]) / (top - foot)
            self.shape(ink, [(a, y, sign * (half_widths[0] + slope * (y - foot))) for a, y in points])

    def panel(self, ink: int, a: tuple[float, float], y: tuple[float, float]) -> None:
        (a0, a1), (y0, y1) = a, y
        self.side(ink, ((a0, y0), (a0, y1), (a1, y1), (a1, y0)))

    def end(self, ink: int, b: tuple[float, float], y: tuple[float, float]) -> None:
        """A rectangle on the end nearest the camera; nothing if the body crosses the road."""
        if not self.crosses:
            a = 0.0 if self.heading == "away" else self.length
            self.shape(ink, ((a, y[0], b[0]), (a, y[1], b[0]), (a, y[1], b[1]), (a, y[0], b[1])))

    def strip(self, ink: int, first: tuple[float, float, float], second: tuple[float, float, float]) -> None:
        """A cross-wise panel between two edges, each (a, y, half width)."""
        (a0, y0, h0), (a1, y1, h1) = first, second
        self.shape(ink, ((a0, y0, -h0), (a1, y1, -h1), (a1, y1, h1), (a0, y0, h0)))

    def wheels(self, positions: Sequence[float], radius: float) -> None:
        looks = self.pen.looks
        tyre, hub = self.ink(looks.pick("tyre")), self.ink(looks.pick("hub"), self.side_facing())
        for a in positions:
            self.side(tyre, [(a + radius * c, radius + radius * s) for c, s in CIRCLE])
            self.side(hub, [(a + 0.58 * radius * c, radius + 0.58 * radius * s) for c, s in CIRCLE])

    def underside(self, height: float) -> None:
        """The dark gap between body and road, and the shadow around it."""
        half = 0.5 * self.width
        dark = self.ink(self.pen.looks.pick("dark"))
        tyre = self.ink(self.pen.looks.pick("tyre"))
        self.panel(dark, (0.1, self.length - 0.1), (0.12, height + 0.05))
        self.end(dark, (-half + 0.05, half - 0.05), (0.14, height + 0.05))
        for b in (-half + 0.05, half - 0.27):
            self.end(tyre, (b, b + 0.22), (0.0, height + 0.05))

    def cast_shadow(self, height: float) -> None:
        half = 0.5 * self.width
        if self.crosses:
            x, z = (self.x - 0.5 * self.length, self.x + 0.5 * self.length), (self.z - half, self.z + half)
        else:
            x, z = (self.x - half, self.x + half), (self.z, self.z + self.length)
        self.pen.shadow(x, z, height)
        self.pen.shadow((x[0] - 0.12, x[1] + 0.12), (z[0] - 0.25, z[1]), 0.0)
