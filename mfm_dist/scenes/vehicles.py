"""Cars, trucks, buses and trams: side profiles drawn out to a width and seen in perspective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mfm_dist.scenes.body import Body
from mfm_dist.scenes.looks import Colour, mixed, toned
from mfm_dist.scenes.pen import Pen
from mfm_dist.scenes.view import Facing, Point

CAR, TRUCK, BUS, TRAIN = 13, 14, 15, 16

REAR_LAMP: Colour = (196.0, 38.0, 34.0)
HEADLAMP: Colour = (252.0, 250.0, 232.0)
PLATE: Colour = (228.0, 226.0, 210.0)


@dataclass(frozen=True)
class CarShape:
    """Lengths in metres: of the whole, of the boot and bonnet; heights of roof and belt line."""

    length: float
    width: float
    height: float
    belt: float
    boot: float
    bonnet: float
    rake: float


def draw_car_shape(pen: Pen) -> CarShape:
    dice = pen.dice
    kind = dice.weighted({"hatch": 3.0, "saloon": 3.0, "estate": 2.0, "suv": 2.0, "van": 0.8})
    length, height, belt, boot, bonnet, rake = {
        "hatch": (3.9, 1.48, 0.92, 0.12, 0.95, 0.45),
        "saloon": (4.6, 1.44, 0.92, 0.85, 1.15, 0.60),
        "estate": (4.7, 1.48, 0.94, 0.10, 1.15, 0.35),
        "suv": (4.5, 1.72, 1.05, 0.08, 1.05, 0.30),
        "van": (4.9, 2.00, 1.10, 0.04, 0.70, 0.12),
    }[kind]
    return CarShape(
        length=dice.around(length, 0.05), width=dice.around(1.8, 0.04), height=dice.around(height, 0.03),
        belt=belt, boot=boot, bonnet=bonnet, rake=rake,
    )  # fmt: skip


def car(pen: Pen, x: float, z: float, heading: str) -> None:
    shape = draw_car_shape(pen)
    body = Body(pen, CAR, x, z, shape.length, shape.width, heading)
    paint, glass = pen.looks.pick("paint"), pen.looks.pick("glass")
    body.cast_shadow(shape.height)
    body.underside(0.22)
    half, top = 0.5 * shape.width, 0.39 * shape.width
    low, belt, height = 0.22, shape.belt, shape.height
    nose_y = 0.80 * belt
    roof_back, roof_front = shape.boot + shape.rake, shape.length - shape.bonnet - 0.65
    screen = shape.length - shape.bonnet

    side = body.side_facing()
    painted = body.ink(paint, side, paint=True)
    upper = body.ink(toned(paint, 0.93), side, paint=True)
    panes = body.ink(toned(glass, 0.75), side)
    lid = body.ink(toned(paint, 1.12), Facing.UP, paint=True)
    front = body.ink(toned(paint, 0.9), paint=True)
    window = body.ink(toned(glass, 0.85))

    if not body.crosses:
        body.strip(lid, (roof_back, height, top), (roof_front, height, top))
    greenhouse = ((shape.boot, belt), (roof_back, height), (roof_front, height), (screen, belt))
    body.lean(upper, greenhouse, (half, top))
    body.lean(panes, _shrunk(greenhouse), (half, top))
    middle = 0.5 * (roof_back + roof_front)
    post = ((middle - 0.05, belt), (middle - 0.05, height), (middle + 0.05, height), (middle + 0.05, belt))
    body.lean(upper, post, (half, top))
    nose = ((shape.length, nose_y), (shape.length, low))
    lower = ((0.0, low), (0.0, belt * 0.96), (shape.boot, belt), (screen, belt), *nose)
    body.side(painted, lower)
    body.panel(body.ink(toned(paint, 0.72), side), (0.05, shape.length - 0.05), (low, low + 0.12))
    body.wheels((0.19 * shape.length, 0.80 * shape.length), 0.33)
    if heading == "away":
        body.strip(upper, (shape.boot, belt, half), (roof_back, height, top))
        body.strip(window, (shape.boot + 0.02, belt + 0.06, half - 0.14), (roof_back, height - 0.08, top - 0.08))
        body.strip(lid, (0.0, belt * 0.96, half), (shape.boot, belt, half))
        body.end(front, (-half, half), (low, belt * 0.96))
        _tail(body, half, belt, low)
    elif heading == "toward":
        body.strip(upper, (screen, belt, half), (roof_front, height, top))
        body.strip(window, (screen - 0.02, belt + 0.05, half - 0.12), (roof_front, height - 0.07, top - 0.06))
        body.strip(lid, (shape.length, nose_y, half), (screen, belt, half))
        body.end(front, (-half, half), (low, nose_y))
        _nose(body, half, nose_y, low)


def _shrunk(points: Sequence[Point]) -> list[Point]:
    """A window's outline inside its frame."""
    middle_a = sum(a for a, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    return [(middle_a + 0.88 * (a - middle_a), middle_y + 0.76 * (y - middle_y)) for a, y in points]


def _tail(body: Body, half: float, belt: float, low: float) -> None:
    lamp, plate = body.ink(REAR_LAMP, Facing.GLOW), body.ink(PLATE)
    dark = body.ink(body.pen.looks.pick("dark"))
    body.end(dark, (-half + 0.04, half - 0.04), (low + 0.10, low + 0.19))
    for sign in (-1.0, 1.0):
        edges = sorted((sign * (half - 0.04), sign * (half - 0.36)))
        body.end(lamp, (edges[0], edges[1]), (belt - 0.30, belt - 0.10))
    body.end(plate, (-0.26, 0.26), (0.50, 0.61))


def _nose(body: Body, half: float, nose_y: float, low: float) -> None:
    lamp, plate = body.ink(HEADLAMP, Facing.GLOW), body.ink(PLATE)
    dark = body.ink(body.pen.looks.pick("dark"))
    body.end(dark, (-half + 0.42, half - 0.42), (nose_y - 0.26, nose_y - 0.10))
    body.end(dark, (-half + 0.10, half - 0.10), (low + 0.02, low + 0.12))
    for sign in (-1.0, 1.0):
        edges = sorted((sign * (half - 0.06), sign * (half - 0.40)))
        body.end(lamp, (edges[0], edges[1]), (nose_y - 0.24, nose_y - 0.08))
    body.end(plate, (-0.26, 0.26), (0.40, 0.51))


def truck(pen: Pen, x: float, z: float, heading: str) -> None:
    """A cab (at the front, high a) and a box behind it."""
    dice, looks = pen.dice, pen.looks
    length, width, height = dice.between((6.5, 9.5)), 2.35, dice.between((2.9, 3.5))
    body = Body(pen, TRUCK, x, z, length, width, heading)
    half, cab = 0.5 * width, 2.0
    box, paint = looks.pick("livery"), looks.pick("paint")
    glass, dark = looks.pick("glass"), looks.pick("dark")
    body.cast_shadow(height)
    body.underside(0.75)
    side = body.side_facing()
    cab_y = min(height - 0.2, 2.65)
    body.panel(body.ink(dark, side), (0.2, length - 0.2), (0.45, 0.85))
    cab_side = ((length - cab, 0.5), (length - cab, cab_y), (length - 0.45, cab_y), (length, 1.5), (length, 0.5))
    box_side, box_end = body.ink(box, side, paint=True), body.ink(toned(box, 0.9), paint=True)
    cab_panes = ((length - 1.35, 1.5), (length - 1.35, 2.25), (length - 0.55, 2.25), (length - 0.22, 1.5))

    body.side(body.ink(paint, side, paint=True), cab_side)
    body.side(body.ink(toned(glass, 0.75), side), cab_panes)
    body.panel(box_side, (0.0, length - cab - 0.25), (0.85, height))
    if dice.chance(0.5):
        stripe = mixed(box, looks.pick("livery"), 0.8)
        body.panel(body.ink(stripe, side, paint=True), (0.0, length - cab - 0.25), (1.5, 2.1))
    body.wheels((1.1, 2.1, length - 1.0) if length > 8.0 else (1.4, length - 1.0), 0.48)
    if heading == "toward":
        box_front = length - cab - 0.25
        body.strip(box_end, (box_front, 0.8, half), (box_front, height, half))
        body.end(body.ink(toned(paint, 0.92), paint=True), (-half, half), (0.5, cab_y))
        body.end(body.ink(toned(glass, 0.85)), (-half + 0.14, half - 0.14), (1.5, 2.35))
        body.end(body.ink(dark), (-half + 0.4, half - 0.4), (0.75, 1.1))
        _lamps(body, half, 0.72, HEADLAMP)
    elif heading == "away":
        body.end(box_end, (-half, half), (0.8, height))
        seam = body.ink(toned(box, 0.7))
        for b in (-half + 0.06, 0.0, half - 0.06):
            body.end(seam, (b - 0.03, b + 0.03), (0.85, height - 0.08))
        body.end(body.ink(dark), (-half, half), (0.62, 0.84))
        _lamps(body, half, 0.66, REAR_LAMP)


def _lamps(body: Body, half: float, y: float, colour: Colour) -> None:
    lamp = body.ink(colour, Facing.GLOW)
    body.end(lamp, (-half + 0.06, -half + 0.40), (y, y + 0.17))
    body.end(lamp, (half - 0.40, half - 0.06), (y, y + 0.17))


def bus(pen: Pen, x: float, z: float, heading: str) -> None:
    length, height = pen.dice.between((10.0, 12.5)), pen.dice.between((2.9, 3.15))
    body = Body(pen, BUS, x, z, length, 2.5, heading)
    body.cast_shadow(height)
    body.underside(0.4)
    _coach(body, height=height, sill=1.25, floor=0.32)
    body.wheels((2.6, length - 2.4), 0.50)
    _lamps(body, 1.25, 0.55, REAR_LAMP if heading == "away" else HEADLAMP)


def tram(pen: Pen, x: float, z: float, heading: str) -> None:
    length, height = pen.dice.between((16.0, 28.0)), pen.dice.between((3.2, 3.5))
    body = Body(pen, TRAIN, x, z, length, 2.5, heading)
    body.cast_shadow(height)
    _coach(body, height=height, sill=1.45, floor=0.18)
    dark = body.ink(toned(pen.looks.pick("dark"), 1.3), body.side_facing())
    body.panel(dark, (0.0, length), (0.10, 0.42))
    joint = body.ink(pen.looks.pick("dark"), body.side_facing())
    for share in (0.33, 0.67):
        body.panel(joint, (share * length - 0.22, share * length + 0.22), (0.3, height))
    body.end(dark, (-1.2, 1.2), (0.12, 0.42))
    _lamps(body, 1.25, 0.75, (252.0, 244.0, 210.0))
    arm = body.ink(pen.looks.pick("metal"))
    body.side(arm, ((6.0, height), (6.9, height + 0.8), (7.0, height + 0.8), (6.2, height)), inset=1.25)


def _coach(body: Body, *, height: float, sill: float, floor: float) -> None:
    """A long body with a row of windows, doors and a big front window."""
    looks, side, length = body.pen.looks, body.side_facing(), body.length
    colour, second = looks.pick("livery"), looks.pick("livery")
    glass = looks.pick("glass")
    half = 0.5 * body.width
    body.panel(body.ink(colour, side, paint=True), (0.0, length), (floor, height))
    body.panel(body.ink(mixed(colour, second, 0.7), side, paint=True), (0.0, length), (floor, 0.62 * sill))
    panes = body.ink(toned(glass, 0.7), side)
    body.panel(panes, (0.35, length - 0.25), (sill, height - 0.55))
    post = body.ink(toned(colour, 0.8), side)
    count = max(4, int(length / 1.5))
    for step in range(1, count):
        a = 0.35 + (length - 0.6) * step / count
        body.panel(post, (a - 0.06, a + 0.06), (sill, height - 0.55))
    for share in (0.24, 0.58, 0.88):
        body.panel(panes, (share * length, share * length + 1.1), (floor + 0.08, height - 0.55))
        body.panel(post, (share * length + 0.51, share * length + 0.59), (floor + 0.08, height - 0.55))
    body.end(body.ink(toned(colour, 0.93), paint=True), (-half, half), (floor, height))
    body.end(body.ink(mixed(colour, second, 0.7), paint=True), (-half, half), (floor, 0.62 * sill))
    body.end(body.ink(toned(glass, 0.8)), (-half + 0.16, half - 0.16), (sill - 0.1, height - 0.42))
    body.end(body.ink((236.0, 176.0, 60.0), Facing.GLOW), (-0.75, 0.75), (height - 0.34, height - 0.12))
