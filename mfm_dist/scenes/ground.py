"""Sky, horizon, and the surfaces that the street lies on: road, markings, pavements, grass and rails."""

from __future__ import annotations

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.scenes.dice import Dice
from mfm_dist.scenes.furniture import VEGETATION
from mfm_dist.scenes.layout import CROSSING_WIDTH, FAR, KERB, SidePlan, Street
from mfm_dist.scenes.looks import Colour, Material, mixed, toned
from mfm_dist.scenes.pen import Pen
from mfm_dist.scenes.view import Facing

ROAD, SIDEWALK, BUILDING, TERRAIN, SKY = 0, 1, 2, 9, 10

SKY_BANDS = 24


def draw_sky(pen: Pen, dice: Dice, aspect: float, zenith: Colour, haze: Colour) -> None:
    """A gradient from zenith to horizon, and clouds in the soft layer.

    Args:
        dice: of the clouds alone: how many there are depends on the weather, and the street must not.
    """
    horizon = pen.view.horizon
    edges = [horizon * step / SKY_BANDS for step in range(SKY_BANDS)] + [1.0]
    for step in range(SKY_BANDS):
        share = (step / (SKY_BANDS - 1)) ** 1.3
        ink = pen.canvas.ink(SKY, mixed(zenith, haze, share), material=Material.SKY, facing=Facing.GLOW)
        low, high = edges[step], edges[step + 1]
        pen.canvas.polygon(ink, ((0.0, low), (aspect, low), (aspect, high), (0.0, high)))
    for _ in range(pen.light.clouds):
        u, v = dice.unit() * aspect, horizon * dice.between((0.05, 0.75))
        size, strength = dice.between((0.05, 0.17)), dice.around(pen.light.cloud_strength, 0.15)
        for puff in range(5):
            across = (puff - 2.0) * 0.55 * size
            height = size * (0.30 if puff in (0, 4) else 0.42) * dice.around(1.0, 0.2)
            lift = 0.0 if puff in (0, 4) else -0.14 * size
            pen.canvas.veil_ellipse((u + across, v + lift), 0.55 * size, height, strength)


def draw_backdrop(pen: Pen) -> None:
    """Hills, trees and roofs at the end of the street, so that the sky never meets the road."""
    dice = pen.dice
    far = FAR + 10.0
    width = 320.0
    at = -width
    while at < width:
        step = dice.between((8.0, 26.0))
        if dice.chance(0.6):
            ink = pen.ink(VEGETATION, toned(pen.looks.pick("leaves"), 0.85), far, Material.LEAVES)
            height = dice.between((5.0, 13.0))
            corners = ((at - 3, 0.0), (at, 0.8 * height), (at + 0.4 * step, height), (at + step, 0.7 * height),
                       (at + step + 3, 0.0))  # fmt: skip
        else:
            ink = pen.ink(BUILDING, pen.looks.pick("facade"), far, Material.MASONRY)
            height = dice.between((7.0, 18.0))
            corners = ((at, 0.0), (at, height), (at + 0.5 * step, height + 2.0), (at + step, height), (at + step, 0.0))
        pen.surface(ink, [(x, y, far) for x, y in corners])
        at += step


def draw_ground(pen: Pen, street: Street) -> None:
    looks = pen.looks
    grass = pen.ink(TERRAIN, looks.pick("grass"), 40.0, Material.GRASS, Facing.UP)
    pen.floor(grass, (-400.0, 400.0), (1.0, FAR + 12.0))
    asphalt, paving, kerb = looks.pick("asphalt"), looks.pick("paving"), looks.pick("kerb")
    road = pen.ink(ROAD, asphalt, 20.0, Material.ASPHALT, Facing.UP)
    pavement = pen.ink(SIDEWALK, paving, 20.0, Material.PAVING, Facing.UP)
    kerb_ink = pen.ink(SIDEWALK, kerb, 20.0, Material.PAVING)
    spans: tuple[tuple[float, float], ...] = ((1.0, FAR),)
    if street.crossing is not None:
        near, far = street.crossing, street.crossing + CROSSING_WIDTH
        pen.floor(pavement, (-120.0, 120.0), (near - 2.5, far + 2.5))
        pen.across(kerb_ink, far, (-120.0, 120.0), (0.0, KERB))
        pen.floor(road, (-120.0, 120.0), (near, far))
        spans = ((1.0, near), (far, FAR))
    left, right = street.sides
    pen.floor(road, (-left.road_edge, right.road_edge), (1.0, FAR))
    _patches(pen, asphalt, left.road_edge, right.road_edge)
    for span in spans:
        for side in street.sides:
            edges = (side.sign * side.road_edge, side.sign * side.pavement_edge)
            pen.floor(pavement, edges, span, KERB)
            _slabs(pen, paving, edges, span)
            _kerb_face(pen, kerb_ink, edges[0], span)
    for side in street.sides:
        if side.tram_line:
            _tram_bed(pen, side)
    _markings(pen, street, asphalt)


def _patches(pen: Pen, asphalt: Colour, left: float, right: float) -> None:
    """Repairs and manhole covers: the road again, in another tone."""
    dice = pen.dice
    for _ in range(int(dice.between((0.0, 5.0)))):
        ink = pen.ink(ROAD, pen.looks.vary(asphalt), 20.0, Material.ASPHALT, Facing.UP)
        x, z = dice.between((-left, right - 1.5)), dice.between((3.5, 30.0))
        pen.floor(ink, (x, x + dice.between((0.7, 1.5))), (z, z + dice.between((1.0, 6.0))))


def _kerb_face(pen: Pen, ink: int, x: float, span: tuple[float, float]) -> None:
    """The upright of the kerb and its light top edge."""
    pieces = 8
    near, far = max(span[0], 1.0), span[1]
    ratio = (far / near) ** (1.0 / pieces)
    zs = [near * ratio**piece for piece in range(pieces + 1)]
    pen.surface(ink, [(x, 0.0, z) for z in zs] + [(x, KERB, z) for z in reversed(zs)])
    outer = x + (0.22 if x > 0.0 else -0.22)
    pen.floor(ink, (x, outer), span, KERB)


def _slabs(pen: Pen, paving: Colour, edges: tuple[float, float], span: tuple[float, float]) -> None:
    """Joints across the pavement, closer than they can be told apart only where they are left out."""
    joint = pen.ink(SIDEWALK, toned(paving, 0.9), 20.0, Material.PAVING, Facing.UP)
    z = max(span[0], 2.0)
    while z < min(span[1], 28.0):
        pen.floor(joint, edges, (z, z + 0.06), KERB)
        z += 1.5
    middle = 0.5 * (edges[0] + edges[1])
    pen.floor(joint, (middle - 0.03, middle + 0.03), (span[0], min(span[1], 40.0)), KERB)


def _tram_bed(pen: Pen, side: SidePlan) -> None:
    looks = pen.looks
    bed = pen.ink(TERRAIN, looks.pick("gravel"), 20.0, Material.GRASS, Facing.UP)
    rail = pen.ink(TERRAIN, looks.pick("rail"), 20.0)
    start = side.pavement_edge
    pen.floor(bed, (side.sign * start, side.sign * (start + 5.0)), (1.0, FAR))
    sleeper = pen.ink(TERRAIN, looks.pick("trunk"), 20.0, Material.WOOD, Facing.UP)
    z = 3.0
    while z < 40.0:
        pen.floor(sleeper, (side.sign * (start + 1.3), side.sign * (start + 3.5)), (z, z + 0.22))
        z += 0.9
    for offset in (1.7, 3.1):
        pen.floor(rail, (side.sign * (start + offset), side.sign * (start + offset + 0.09)), (1.0, FAR), 0.05)


def _markings(pen: Pen, street: Street, asphalt: Colour) -> None:
    """Lines on the road; they are road in the label."""
    dice = pen.dice
    paint = pen.ink(ROAD, mixed(asphalt, pen.looks.pick("marking"), dice.between((0.7, 1.0))), 20.0, Material.ASPHALT,
                    Facing.UP)  # fmt: skip
    near_end = FAR if street.crossing is None else street.crossing - 4.6
    spans = ((1.0, near_end),) if street.crossing is None else ((1.0, near_end), (street.crossing + 12.0, FAR))
    for span in spans:
        if street.oncoming:
            _line(pen, paint, -0.5 * street.lane, span, dashed=dice.chance(0.7))
        for side in street.sides:
            inset = 2.3 if side.parking else 0.35
            _line(pen, paint, side.sign * (side.road_edge - inset), span, dashed=side.parking)
    if street.crossing is not None:
        z = street.crossing - 3.8
        x = -street.left.road_edge + 0.4
        while x < street.right.road_edge - 0.7:
            pen.floor(paint, (x, x + 0.5), (z, z + 2.8))
            x += 1.0
        pen.floor(paint, (-0.5 * street.lane, street.right.road_edge - 0.3), (z - 1.1, z - 0.7))


def _line(pen: Pen, ink: int, x: float, span: tuple[float, float], *, dashed: bool) -> None:
    if not dashed:
        pen.floor(ink, (x - 0.07, x + 0.07), span)
        return
    z = span[0] + 2.0 * pen.dice.unit()
    while z < min(span[1], 60.0):
        pen.floor(ink, (x - 0.08, x + 0.08), (z, min(z + 2.6, span[1])))
        z += 6.0


def draw_hood(pen: Pen, aspect: float, height: float) -> None:
    """The bonnet of the car that carries the camera; it has no class."""
    paint = pen.looks.pick("paint")
    hood = pen.ink(IGNORE_INDEX, toned(paint, 0.55), 0.0, Material.PAINT)
    gloss = pen.ink(IGNORE_INDEX, toned(paint, 0.8), 0.0, Material.PAINT)
    middle, half = 0.5 * aspect, 0.44 * aspect
    outline = []
    for step in range(25):
        t = step / 12.0 - 1.0
        outline.append((middle + half * t, 1.0 - height * (1.0 - abs(t) ** 3.2)))
    pen.canvas.polygon(hood, [*outline, (middle + half, 1.1), (middle - half, 1.1)])
    crest = outline[4:21]
    pen.canvas.polygon(gloss, [(u, v + 0.010) for u, v in crest] + [(u, v + 0.020) for u, v in reversed(crest)])
