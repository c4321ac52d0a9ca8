"""Plots beside the pavement: houses, gardens, parks, and the fences and walls between them and the street."""

from __future__ import annotations

from dataclasses import dataclass

from mfm_dist.scenes.furniture import VEGETATION, bush, hedge, tree
from mfm_dist.scenes.looks import Colour, Material, mixed, toned
from mfm_dist.scenes.pen import Pen
from mfm_dist.scenes.view import Facing

BUILDING, WALL, FENCE, TERRAIN = 2, 3, 4, 9

SIMPLE_FROM = 45.0
"""Metres; facades further away get bands instead of single windows."""


@dataclass(frozen=True)
class Plot:
    """A stretch of one side of the street.

    Attributes:
        kind: "block", "house", "park", "wall" or "yard".
        x: of its street edge; the sign tells the side.
        z: near and far end, metres.
        storeys: of its building.
    """

    kind: str
    x: float
    z: tuple[float, float]
    storeys: int

    @property
    def outward(self) -> float:
        return 1.0 if self.x > 0.0 else -1.0

    @property
    def facing(self) -> Facing:
        return Facing.LEFT if self.x > 0.0 else Facing.RIGHT

    @property
    def middle(self) -> float:
        return 0.5 * (self.z[0] + self.z[1])


def draw_plot(pen: Pen, plot: Plot) -> None:
    if plot.kind == "block":
        building(pen, plot, plot.x, gabled=False)
    elif plot.kind == "house":
        _garden(pen, plot)
    elif plot.kind == "park":
        _park(pen, plot)
    else:
        _yard(pen, plot)


def _grass(pen: Pen, plot: Plot, depth: float) -> None:
    ink = pen.ink(TERRAIN, pen.looks.pick("grass"), plot.middle, Material.GRASS, Facing.UP)
    pen.floor(ink, (plot.x, plot.x + plot.outward * depth), plot.z)


def _garden(pen: Pen, plot: Plot) -> None:
    """A house behind a front garden, with a fence, low wall or hedge towards the pavement."""
    setback = pen.dice.between((3.0, 6.5))
    _grass(pen, plot, 30.0)
    margin = pen.dice.between((0.8, 2.5))
    inner = Plot("house", plot.x + plot.outward * setback, (plot.z[0] + margin, plot.z[1] - margin), plot.storeys)
    building(pen, inner, inner.x, gabled=True)
    for _ in range(2):
        z = pen.dice.between((plot.z[0] + 0.5, plot.z[1] - 0.5))
        x = plot.x + plot.outward * pen.dice.between((1.0, setback - 0.6))
        if z > 4.0:
            bush(pen, x, z)
    if pen.dice.chance(0.3) and plot.z[0] > 8.0:
        tree(pen, plot.x + plot.outward * 0.5 * setback, plot.z[0] + 1.0, size=0.8)
    edge = plot.x + plot.outward * 0.15
    kind = pen.dice.weighted({"fence": 4.0, "wall": 3.0, "hedge": 2.0, "open": 1.5})
    if kind == "fence":
        fence(pen, edge, plot.z)
    elif kind == "wall":
        wall(pen, edge, plot.z, pen.dice.between((0.8, 1.5)))
    elif kind == "hedge":
        hedge(pen, edge, plot.z, pen.dice.between((0.9, 1.6)))


def _park(pen: Pen, plot: Plot) -> None:
    """Grass and trees, a row of dense green behind, sometimes a fence in front."""
    _grass(pen, plot, 40.0)
    far_x = plot.x + plot.outward * 14.0
    colour = pen.looks.pick("leaves")
    height = pen.dice.between((3.5, 6.5))
    backdrop = pen.ink(VEGETATION, toned(colour, 0.7), plot.middle + 10.0, Material.LEAVES, plot.facing)
    pen.along(backdrop, far_x, plot.z, (0.0, height))
    end = pen.ink(VEGETATION, toned(colour, 0.8), plot.z[0] + 6.0, Material.LEAVES)
    pen.across(end, plot.z[0], (far_x, far_x + 12.0 * plot.outward), (0.0, height))
    steps = max(2, int((plot.z[1] - plot.z[0]) / 5.0))
    for step in reversed(range(steps)):
        z = plot.z[0] + (step + pen.dice.between((0.2, 0.8))) * (plot.z[1] - plot.z[0]) / steps
        x = plot.x + plot.outward * pen.dice.between((2.5, 11.0))
        if z < 5.0:
            continue
        if pen.dice.chance(0.7):
            tree(pen, x, z, size=pen.dice.between((0.8, 1.2)))
        else:
            bush(pen, x, z)
    edge = plot.x + plot.outward * 0.15
    if pen.dice.chance(0.45):
        fence(pen, edge, plot.z)
    elif pen.dice.chance(0.25):
        wall(pen, edge, plot.z, pen.dice.between((0.7, 1.2)))


def _yard(pen: Pen, plot: Plot) -> None:
    """A high wall or fence along the pavement with trees and a building further back."""
    _grass(pen, plot, 30.0)
    back = Plot("block", plot.x + plot.outward * 9.0, plot.z, max(1, plot.storeys - 1))
    building(pen, back, back.x, gabled=pen.dice.chance(0.5))
    for _ in range(2):
        z = pen.dice.between(plot.z)
        if z > 6.0:
            tree(pen, plot.x + plot.outward * pen.dice.between((2.5, 6.0)), z, size=0.9)
    edge = plot.x + plot.outward * 0.1
    if plot.kind == "wall":
        wall(pen, edge, plot.z, pen.dice.between((1.7, 2.7)))
    else:
        fence(pen, edge, plot.z)


def wall(pen: Pen, x: float, z: tuple[float, float], height: float) -> None:
    """A masonry wall with a coping; its colours are those of buildings."""
    colour = pen.looks.pick("barrier")
    facing = Facing.LEFT if x > 0.0 else Facing.RIGHT
    middle = 0.5 * (z[0] + z[1])
    _shade(pen, x, z, height)
    outer = x + (0.3 if x > 0.0 else -0.3)
    pen.across(pen.ink(WALL, colour, z[0], Material.MASONRY), z[0], (x, outer), (0.0, height))
    pen.along(pen.ink(WALL, colour, middle, Material.MASONRY, facing), x, z, (0.0, height))
    joint = pen.ink(WALL, toned(colour, 0.86), middle, Material.MASONRY, facing)
    rows = max(2, int(height / 0.4))
    for row in range(1, rows):
        y = height * row / rows
        pen.along(joint, x, z, (y - 0.02, y + 0.02))
    pen.along(pen.ink(WALL, toned(colour, 1.13), middle, Material.MASONRY, facing), x, z, (height - 0.13, height))
    pier = z[0]
    pillar = pen.ink(WALL, toned(colour, 0.93), middle, Material.MASONRY, facing)
    while pier < z[1]:
        if pen.sees(x, pier + 0.35, 0.0):
            pen.along(pillar, x, (pier, pier + 0.35), (0.0, height + 0.06))
        pier += 4.0


def fence(pen: Pen, x: float, z: tuple[float, float]) -> None:
    """Slats, planks or bars; what lies behind shows between them, the label covers them whole."""
    dice = pen.dice
    colour = pen.looks.pick("fence")
    facing = Facing.LEFT if x > 0.0 else Facing.RIGHT
    middle = 0.5 * (z[0] + z[1])
    kind = dice.weighted({"slats": 4.0, "planks": 2.0, "bars": 3.0})
    height = dice.between({"slats": (0.9, 1.3), "planks": (1.5, 2.0), "bars": (1.1, 1.9)}[kind])
    _shade(pen, x, z, height, 0.6)
    seen = pen.canvas.colour_at(pen.view.project(x, 0.5 * height, max(middle, 6.0))) or colour
    gap = toned(colour, 0.78) if kind == "planks" else mixed(toned(seen, 0.86), colour, 0.12)
    behind = Material.WOOD if kind == "planks" else Material.GRASS
    pen.along(pen.ink(FENCE, gap, middle, behind, facing), x, z, (0.0, height))
    ink = pen.ink(FENCE, colour, middle, Material.WOOD, facing)
    width, pitch = {"slats": (0.14, 0.30), "planks": (0.26, 0.30), "bars": (0.045, 0.22)}[kind]
    for y in (0.22 * height, 0.80 * height):
        pen.along(ink, x, z, (y - 0.05, y + 0.05))
    at = max(z[0], abs(x) * pen.view.focal / pen.canvas.aspect)
    while at < min(z[1], SIMPLE_FROM):
        pen.along(ink, x, (at, at + width), (0.0, height + 0.04))
        # Slats that would be finer than half a thousandth of the picture are thinned out.
        at += max(pitch, 0.0022 * at * at / abs(x))


def _shade(pen: Pen, x: float, z: tuple[float, float], height: float, strength: float = 1.0) -> None:
    """What a long upright thing casts, at most 12 m far so that low sun leaves some street lit."""
    reach = max(-12.0, min(12.0, pen.light.shadow[0] * height))
    if reach * x < 0.0:
        project, near = pen.view.project, max(z[0], 1.0)
        corners = ((x, near), (x, z[1]), (x + reach, z[1]), (x + reach, near))
        if z[1] > near:
            pen.canvas.veil_polygon([project(cx, 0.0, cz) for cx, cz in corners], strength)


@dataclass(frozen=True)
class Facade:
    """The dimensions that windows, doors and roof share."""

    x: float
    z: tuple[float, float]
    storey: float
    ground: float
    storeys: int

    @property
    def height(self) -> float:
        return self.ground + self.storey * (self.storeys - 1)


def building(pen: Pen, plot: Plot, x: float, *, gabled: bool) -> None:
    dice = pen.dice
    colour = pen.looks.pick("facade")
    storeys = min(plot.storeys, 2) if gabled else plot.storeys
    front = Facade(x, plot.z, dice.between((2.9, 3.4)), dice.between((3.0, 3.9)), storeys)
    top, depth = front.height, dice.between((8.0, 12.0))
    back = x + plot.outward * depth
    near_z, far_z = plot.z
    _shade(pen, x, plot.z, top)

    pitched = gabled or dice.chance(0.45)
    ridge = top + (dice.between((2.0, 3.4)) if pitched else 0.0)
    middle_x = 0.5 * (x + back)
    if pitched:
        roof = pen.ink(BUILDING, pen.looks.pick("roof"), plot.middle, Material.MASONRY, plot.facing)
        # It starts a little below the eaves, under the facade drawn after it, so that no sky shows between them.
        pen.surface(roof, ((x, top - 0.4, near_z), (middle_x, ridge, near_z), (middle_x, ridge, far_z),
                           (x, top - 0.4, far_z)))  # fmt: skip
        if dice.chance(0.6) and near_z > 4.0:
            chimney = pen.ink(BUILDING, toned(colour, 0.8), plot.middle, Material.MASONRY)
            pen.across(chimney, plot.middle, (middle_x - 0.4, middle_x + 0.4), (ridge - 0.6, ridge + 1.0))
    if near_z > 1.0:
        end = pen.ink(BUILDING, toned(colour, 0.9), near_z, Material.MASONRY)
        pen.surface(end, ((x, 0.0, near_z), (x, top, near_z), (middle_x, ridge if pitched else top, near_z),
                          (back, top, near_z), (back, 0.0, near_z)))  # fmt: skip
        _end_windows(pen, plot, front, depth)
    pen.along(pen.ink(BUILDING, colour, plot.middle, Material.MASONRY, plot.facing), x, plot.z, (0.0, top))
    _windows(pen, plot, front, colour)
    _ground_floor(pen, plot, front, colour, shop=not gabled and dice.chance(0.45))
    cornice = pen.ink(BUILDING, toned(colour, 1.12), plot.middle, Material.MASONRY, plot.facing)
    pen.along(cornice, x, plot.z, (top - 0.28, top))


def _end_windows(pen: Pen, plot: Plot, front: Facade, depth: float) -> None:
    if plot.z[0] > SIMPLE_FROM or pen.dice.chance(0.4):
        return
    pane = pen.ink(BUILDING, pen.looks.pick("glass"), plot.z[0])
    for floor in range(front.storeys):
        y = 1.1 if floor == 0 else front.ground + front.storey * (floor - 1) + 0.8
        for share in (0.28, 0.65):
            x0 = front.x + plot.outward * share * depth
            x1 = x0 + plot.outward * 1.1
            pen.across(pane, plot.z[0], (x0, x1), (y, y + 1.4))


def _windows(pen: Pen, plot: Plot, front: Facade, colour: Colour) -> None:
    """Framed windows on the upper floors, in columns."""
    glass, trim = pen.looks.pick("glass"), pen.looks.pick("trim")
    pane = pen.ink(BUILDING, glass, plot.middle, Material.SMOOTH, plot.facing)
    bright = pen.ink(BUILDING, toned(glass, 1.25), plot.middle, Material.SMOOTH, plot.facing)
    frame = pen.ink(BUILDING, trim, plot.middle, Material.SMOOTH, plot.facing)
    band = pen.ink(BUILDING, toned(colour, 0.9), plot.middle, Material.MASONRY, plot.facing)
    pitch, width = pen.dice.between((2.2, 3.2)), pen.dice.between((1.0, 1.4))
    tall = pen.dice.between((1.3, 1.8))
    count = max(1, int((plot.z[1] - plot.z[0] - 0.8) / pitch))
    first = 0.5 * (plot.z[0] + plot.z[1] - count * pitch)
    for floor in range(1, front.storeys):
        y = front.ground + front.storey * (floor - 1)
        pen.along(band, front.x, plot.z, (y - 0.12, y + 0.06))
        if plot.z[0] > SIMPLE_FROM:
            pen.along(pane, front.x, (plot.z[0] + 0.8, plot.z[1] - 0.8), (y + 0.8, y + 0.8 + tall))
            continue
        for column in range(count):
            z0 = first + column * pitch + 0.5 * (pitch - width)
            if not pen.sees(front.x, z0 + width, 0.0):
                continue
            pen.along(frame, front.x, (z0 - 0.12, z0 + width + 0.12), (y + 0.66, y + 0.9 + tall))
            half = z0 + 0.5 * width
            pen.along(pane, front.x, (z0, half - 0.03), (y + 0.8, y + 0.8 + tall))
            pen.along(bright, front.x, (half + 0.03, z0 + width), (y + 0.8, y + 0.8 + tall))


def _ground_floor(pen: Pen, plot: Plot, front: Facade, colour: Colour, *, shop: bool) -> None:
    near, far = plot.z
    plinth = pen.ink(BUILDING, toned(colour, 0.74), plot.middle, Material.MASONRY, plot.facing)
    pen.along(plinth, front.x, plot.z, (0.0, 0.5))
    glass = pen.ink(BUILDING, toned(pen.looks.pick("glass"), 0.85), plot.middle, Material.SMOOTH, plot.facing)
    wood = pen.ink(BUILDING, pen.looks.pick("door"), plot.middle, Material.WOOD, plot.facing)
    door = near + (far - near) * pen.dice.between((0.15, 0.75))
    if shop:
        pen.along(glass, front.x, (near + 0.6, far - 0.6), (0.55, 2.55))
        awning = pen.ink(BUILDING, pen.looks.pick("awning"), plot.middle, Material.CLOTH, plot.facing)
        reach = front.x - plot.outward * 0.9
        pen.surface(awning, ((front.x, 3.0, near + 0.5), (front.x, 3.0, far - 0.5), (reach, 2.5, far - 0.5),
                             (reach, 2.5, near + 0.5)))  # fmt: skip
    else:
        frame = pen.ink(BUILDING, pen.looks.pick("trim"), plot.middle, Material.SMOOTH, plot.facing)
        at = near + 1.0
        while at < far - 1.6:
            if abs(at - door) > 1.6 and near < SIMPLE_FROM and pen.sees(front.x, at + 1.2, 0.0):
                pen.along(frame, front.x, (at - 0.1, at + 1.2), (0.95, 2.45))
                pen.along(glass, front.x, (at, at + 1.1), (1.05, 2.35))
            at += 2.6
    pen.along(wood, front.x, (door, door + 1.1), (0.0, 2.25))
