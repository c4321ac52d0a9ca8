"""Draws in metres: the one object that everything in the street is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mfm_dist.scenes.dice import Dice
from mfm_dist.scenes.light import Light
from mfm_dist.scenes.looks import Colour, Looks, Material
from mfm_dist.scenes.view import Canvas, Facing, Point, View


@dataclass(frozen=True)
class Pen:
    """Canvas, camera, light and the two sources of chance: ``dice`` for shapes, ``looks`` for colours.

    Shapes never take numbers from ``looks``, so that another palette leaves every outline where it was.
    """

    canvas: Canvas
    view: View
    light: Light
    dice: Dice
    looks: Looks

    def ink(
        self, label: int, colour: Colour, z: float, material: Material = Material.SMOOTH,
        facing: Facing = Facing.CAMERA,
    ) -> int:  # fmt: skip
        return self.canvas.ink(label, colour, material=material, facing=facing, depth=max(z, 0.0))

    def surface(self, ink: int, corners: Sequence[tuple[float, float, float]]) -> None:
        """A polygon with corners (x, y, z)."""
        project = self.view.project
        self.canvas.polygon(ink, [project(x, y, z) for x, y, z in corners])

    def along(self, ink: int, x: float, z: tuple[float, float], y: tuple[float, float]) -> None:
        """An upright rectangle beside the road, running in depth."""
        (z0, z1), (y0, y1) = z, y
        self.surface(ink, ((x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)))

    def across(self, ink: int, z: float, x: tuple[float, float], y: tuple[float, float]) -> None:
        """An upright rectangle that faces the camera."""
        (x0, x1), (y0, y1) = x, y
        self.surface(ink, ((x0, y0, z), (x0, y1, z), (x1, y1, z), (x1, y0, z)))

    def floor(self, ink: int, x: tuple[float, float], z: tuple[float, float], y: float = 0.0) -> None:
        """A level strip that follows the road's bend."""
        (x0, x1), (z0, z1) = x, z
        near = max(z0, 1.0)
        if z1 <= near:
            return
        pieces = 8 if z1 > 3.0 * near else 1
        ratio = (z1 / near) ** (1.0 / pieces)
        zs = [near * ratio**piece for piece in range(pieces + 1)]
        self.surface(ink, [(x0, y, zi) for zi in zs] + [(x1, y, zi) for zi in reversed(zs)])

    def shadow(self, x: tuple[float, float], z: tuple[float, float], height: float, strength: float = 1.0) -> None:
        """The shadow of a box on the ground: its footprint stretched away from the sun."""
        (x0, x1), (z0, z1) = x, z
        dx, dz = self.light.shadow[0] * height, self.light.shadow[1] * height
        project = self.view.project
        low_z, high_z = max(1.0, z0 + min(dz, 0.0)), z1 + max(dz, 0.0)
        points = [(x0 + min(dx, 0.0), low_z), (x0 + min(dx, 0.0), high_z), (x1 + max(dx, 0.0), high_z)]
        points.append((x1 + max(dx, 0.0), low_z))
        self.canvas.veil_polygon([project(px, 0.0, pz) for px, pz in points], strength)

    def sees(self, x: float, z: float, reach: float) -> bool:
        """Whether anything within ``reach`` metres to the left or right of a point is inside the picture."""
        u, half = self.view.project(x, 0.0, z)[0], reach * self.view.scale(z)
        return u + half > 0.0 and u - half < self.canvas.aspect

    def stand(self, x: float, z: float, y: float = 0.0, squeeze: float = 1.0) -> Board:
        return Board(self, self.view.project(x, y, z), self.view.scale(z), squeeze)


@dataclass(frozen=True)
class Board:
    """An upright sheet facing the camera, for things drawn flat: (right, up) in metres from its foot."""

    pen: Pen
    foot: Point
    scale: float
    squeeze: float = 1.0
    """Width kept of a sheet that is turned away from the camera."""

    def at(self, right: float, up: float) -> Point:
        return self.foot[0] + right * self.squeeze * self.scale, self.foot[1] - up * self.scale

    def shape(self, ink: int, points: Sequence[Point]) -> None:
        u, v, up_scale = self.foot[0], self.foot[1], self.scale
        scale = up_scale * self.squeeze
        self.pen.canvas.polygon(ink, [(u + right * scale, v - up * up_scale) for right, up in points])

    def box(self, ink: int, right: tuple[float, float], up: tuple[float, float]) -> None:
        (r0, r1), (u0, u1) = right, up
        self.shape(ink, ((r0, u0), (r0, u1), (r1, u1), (r1, u0)))

    def disc(self, ink: int, right: float, up: float, radius: float, stretch: float = 1.0) -> None:
        """A circle, or an ellipse ``stretch`` times as high as wide."""
        reach = radius * self.scale
        self.pen.canvas.ellipse(ink, self.at(right, up), reach * self.squeeze, reach * stretch)

    def limb(self, ink: int, start: Point, end: Point, width: float) -> None:
        """A bar from one point to another."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        half = 0.5 * width / max((dx * dx + dy * dy) ** 0.5, 1e-6)
        nx, ny = -dy * half, dx * half
        self.shape(
            ink,
            (
                (start[0] + nx, start[1] + ny), (end[0] + nx, end[1] + ny),
                (end[0] - nx, end[1] - ny), (start[0] - nx, start[1] - ny),
            ),
        )  # fmt: skip
