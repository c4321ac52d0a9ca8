"""What stands where: the ground plan of a street and the traffic on it, drawn from far to near."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from mfm_dist.scenes import figures, furniture, vehicles
from mfm_dist.scenes.buildings import Plot, draw_plot
from mfm_dist.scenes.dice import Dice, Range
from mfm_dist.scenes.pen import Pen
from mfm_dist.scenes.view import View

KERB = 0.13
"""Metres that a pavement lies above the road."""
FAR = 130.0
"""Metres to the end of the street."""


@dataclass(frozen=True)
class Style:
    """Ranges and probabilities of one domain's streets; lengths in metres, densities a hundred metres."""

    camera_height: Range
    focal: Range
    horizon: Range
    lane: Range
    pavement: Range
    verge: float
    bend: float
    parking: float
    crossroads: float
    tram_line: float
    tree_rows: float
    storeys: Range
    plots: Mapping[str, float]
    moving: Range
    parked: float
    people: Range
    riders: Range
    two_wheelers: Range
    vehicle_kinds: Mapping[str, float]
    hood: float


STYLES: Mapping[str, Style] = {
    "game": Style(
        camera_height=(1.45, 1.75), focal=(1.15, 1.35), horizon=(0.40, 0.47), lane=(3.3, 4.0), pavement=(2.2, 3.6),
        verge=0.40, bend=0.0010, parking=0.45, crossroads=0.5, tram_line=0.20, tree_rows=0.4, storeys=(2.0, 5.5),
        plots={"block": 4.6, "house": 2.0, "park": 2.2, "wall": 0.7, "yard": 0.6},
        moving=(2.0, 6.0), parked=0.55, people=(3.0, 10.0), riders=(0.0, 2.6), two_wheelers=(0.0, 4.0),
        vehicle_kinds={"car": 6.0, "truck": 0.9, "bus": 0.8}, hood=0.0,
    ),
    "camera": Style(
        camera_height=(1.15, 1.45), focal=(1.30, 1.65), horizon=(0.34, 0.43), lane=(2.9, 3.5), pavement=(2.0, 3.5),
        verge=0.50, bend=0.0022, parking=0.75, crossroads=0.5, tram_line=0.20, tree_rows=0.5, storeys=(2.0, 4.4),
        plots={"block": 3.6, "house": 2.4, "park": 3.0, "wall": 0.9, "yard": 0.8},
        moving=(2.0, 7.0), parked=0.8, people=(4.0, 15.0), riders=(0.0, 3.2), two_wheelers=(1.0, 6.0),
        vehicle_kinds={"car": 8.0, "truck": 0.8, "bus": 0.8}, hood=0.45,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class SidePlan:
    """One side of the street: distances from the camera's line outwards, metres, all positive."""

    sign: float
    road_edge: float
    parking: bool
    pavement_edge: float
    tram_line: bool
    plot_edge: float


@dataclass(frozen=True)
class Street:
    """The ground plan; ``crossing`` is the near edge of the crossroads or None."""

    left: SidePlan
    right: SidePlan
    lane: float
    oncoming: bool
    crossing: float | None

    @property
    def sides(self) -> tuple[SidePlan, SidePlan]:
        return self.left, self.right


CROSSING_WIDTH = 8.0

Thing = tuple[float, Callable[[], None]]
"""Distance by which it is ordered, and how to draw it."""


def draw_view(dice: Dice, style: Style, aspect: float) -> View:
    return View(
        focal=dice.between(style.focal),
        height=dice.between(style.camera_height),
        horizon=dice.between(style.horizon),
        centre=0.5 * aspect + dice.between((-0.16, 0.16)),
        bend=style.bend * dice.between((-1.0, 1.0)),
    )


def draw_street(dice: Dice, style: Style) -> Street:
    lane = dice.between(style.lane)
    oncoming = dice.chance(0.75)
    crossing = dice.between((15.0, 48.0)) if dice.chance(style.crossroads) else None
    tram_side = dice.pick((-1.0, 1.0)) if dice.chance(style.tram_line) else 0.0
    plans = []
    for sign in (-1.0, 1.0):
        parking = dice.chance(style.parking)
        edge = lane * (1.55 if oncoming and sign < 0.0 else 0.55) + (2.2 if parking else 0.3)
        pavement = edge + dice.between(style.pavement)
        tram = tram_side == sign
        verge = dice.between((1.5, 5.0)) if dice.chance(style.verge) else 0.0
        beyond = 5.0 if tram else verge
        plans.append(SidePlan(sign, edge, parking, pavement, tram, pavement + beyond))
    return Street(plans[0], plans[1], lane, oncoming, crossing)


def things_of(pen: Pen, style: Style, street: Street) -> list[Thing]:
    """Everything that stands on the ground, ordered from far to near."""
    things: list[Thing] = []
    for side in street.sides:
        things += _plots(pen, style, street, side)
        things += _street_furniture(pen, style, street, side)
        things += _people(pen, style, street, side)
        if side.tram_line and pen.dice.chance(0.85):
            z = pen.dice.between((7.0, 30.0))
            heading = pen.dice.pick(("away", "toward"))
            x = side.sign * (side.pavement_edge + 2.4)
            things.append((z + 14.0, partial(vehicles.tram, pen, x, z, heading)))
        if side.parking:
            things += _parked(pen, style, street, side)
    things += _traffic(pen, style, street)
    if street.crossing is not None:
        things += _crossroads(pen, street, street.crossing)
    return sorted(things, key=lambda thing: -thing[0])


def _in_crossing(street: Street, z: float, margin: float = 1.0) -> bool:
    return street.crossing is not None and street.crossing - margin < z < street.crossing + CROSSING_WIDTH + margin


def _plots(pen: Pen, style: Style, street: Street, side: SidePlan) -> list[Thing]:
    dice = pen.dice
    things: list[Thing] = []
    z = -dice.between((2.0, 8.0))
    kind = dice.weighted(style.plots)
    while z < FAR - 20.0:
        end = z + dice.between((9.0, 17.0))
        if street.crossing is not None and z < street.crossing + CROSSING_WIDTH + 2.0 and end > street.crossing - 4.0:
            end = street.crossing - 2.5
        # Neighbours tend to be alike: what a street looks like here tells what it looks like further on.
        if not dice.chance(0.45):
            kind = dice.weighted(style.plots)
        if end - z > 3.0:
            plot = Plot(kind, side.sign * side.plot_edge, (z, end), round(dice.between(style.storeys)))
            things.append((end, partial(draw_plot, pen, plot)))
        z = max(end, z + 0.5)
        if street.crossing is not None and abs(z - (street.crossing - 2.5)) < 3.0:
            z = street.crossing + CROSSING_WIDTH + 2.5
    return things


def _street_furniture(pen: Pen, style: Style, street: Street, side: SidePlan) -> list[Thing]:
    dice = pen.dice
    things: list[Thing] = []
    x = side.sign * (side.road_edge + 0.45)
    if dice.chance(style.tree_rows) and side.pavement_edge - side.road_edge > 2.2:
        z, pitch = dice.between((6.0, 14.0)), dice.between((8.0, 13.0))
        while z < 80.0:
            if not _in_crossing(street, z, 3.0):
                size = dice.between((0.7, 1.0))
                things.append((z, partial(furniture.tree, pen, x + side.sign * 0.3, z, y=KERB, size=size)))
            z += dice.around(pitch, 0.15)
    if dice.chance(0.65):
        z, pitch = dice.between((8.0, 22.0)), dice.between((18.0, 26.0))
        while z < 90.0:
            if not _in_crossing(street, z, 2.0):
                things.append((z, partial(furniture.lamp_post, pen, x, z, KERB)))
            z += pitch
    for draw, most, reach in (
        (furniture.traffic_sign, 3.4, 35.0), (furniture.bin_or_box, 1.4, 30.0), (furniture.post, 4.0, 30.0),
    ):  # fmt: skip
        for _ in range(int(dice.between((0.0, most)))):
            z = dice.between((6.0, reach))
            if not _in_crossing(street, z):
                offset = dice.between((-0.1, 0.25))
                things.append((z, partial(draw, pen, x + side.sign * offset, z, KERB)))
    return things


def _people(pen: Pen, style: Style, street: Street, side: SidePlan) -> list[Thing]:
    dice = pen.dice
    things: list[Thing] = []
    for _ in range(int(0.5 * dice.between(style.people) + 0.5)):
        z = 5.0 + 40.0 * dice.unit() ** 1.4
        if _in_crossing(street, z, 0.0):
            continue
        x = side.sign * dice.between((side.road_edge + 0.5, side.pavement_edge - 0.3))
        things.append((z, partial(figures.person, pen, x, z, KERB)))
        if dice.chance(0.3):
            things.append((z + 0.2, partial(figures.person, pen, x + side.sign * 0.55, z + 0.2, KERB)))
    for _ in range(int(0.5 * dice.between(style.two_wheelers) + 0.5)):
        z = dice.between((6.0, 30.0))
        if _in_crossing(street, z, 0.0):
            continue
        draw = figures.bicycle if dice.chance(0.6) else figures.motorcycle
        near_wall = side.pavement_edge - 0.6 if dice.chance(0.5) else side.road_edge + 0.9
        for neighbour in range(1 + int(dice.unit() * 2.5)):
            zn = z + 0.75 * neighbour
            turn = dice.pick((1.0, 0.75, 0.5, 0.0))
            things.append((zn, partial(draw, pen, side.sign * near_wall, zn, y=KERB, ridden=False, turn=turn)))
    return things


def _parked(pen: Pen, style: Style, street: Street, side: SidePlan) -> list[Thing]:
    dice = pen.dice
    things: list[Thing] = []
    z = dice.between((4.2, 10.0))
    heading = "away" if side.sign > 0.0 or not street.oncoming else "toward"
    x = side.sign * (side.road_edge - 1.05)
    while z < 70.0:
        if dice.chance(style.parked) and not _in_crossing(street, z, 7.0):
            if dice.chance(0.06):
                things.append((z, partial(figures.motorcycle, pen, x, z, ridden=False, turn=0.0)))
            else:
                kind = vehicles.truck if dice.chance(0.04) else vehicles.car
                things.append((z, partial(kind, pen, x, z, heading)))
                z += 4.0 if kind is vehicles.truck else 0.0
        z += dice.between((5.3, 6.8))
    return things


def _traffic(pen: Pen, style: Style, street: Street) -> list[Thing]:
    dice = pen.dice
    things: list[Thing] = []
    draw = {"car": vehicles.car, "truck": vehicles.truck, "bus": vehicles.bus}
    lanes = {"away": (0.0, dice.between((8.0, 18.0)))}
    if street.oncoming:
        lanes["toward"] = (-street.lane, dice.between((6.0, 22.0)))
    for _ in range(int(dice.between(style.moving))):
        heading = dice.pick(tuple(lanes))
        x, z = lanes[heading]
        kind = dice.weighted(style.vehicle_kinds)
        if kind != "car":
            z += 3.0
        things.append((z, partial(draw[kind], pen, x + dice.between((-0.2, 0.2)), z, heading)))
        lanes[heading] = (x, z + dice.between((9.0, 26.0)) + (8.0 if kind != "car" else 0.0))
    for _ in range(int(dice.between(style.riders))):
        z = dice.between((6.0, 26.0))
        plan = street.right if dice.chance(0.65) or not street.oncoming else street.left
        x = plan.sign * (plan.road_edge - (2.9 if plan.parking else 0.75))
        ride = figures.bicycle if dice.chance(0.58) else figures.motorcycle
        things.append((z, partial(ride, pen, x, z, ridden=True, turn=dice.pick((0.75, 0.55, 0.45, 0.0)))))
    return things


def _crossroads(pen: Pen, street: Street, near: float) -> list[Thing]:
    dice = pen.dice
    things: list[Thing] = []
    lights = dice.chance(0.75)
    for side in street.sides:
        corner = side.sign * (side.road_edge + 0.5)
        if lights:
            things.append((near - 1.2, partial(furniture.traffic_light, pen, corner, near - 1.2, KERB)))
            far = near + CROSSING_WIDTH + 1.0
            things.append((far, partial(furniture.traffic_light, pen, corner, far, KERB)))
        else:
            things.append((near - 1.5, partial(furniture.traffic_sign, pen, corner, near - 1.5, KERB)))
    for _ in range(int(dice.between((0.0, 3.4)))):
        x = dice.between((-14.0, 14.0))
        kind = dice.weighted({"car": 5.0, "truck": 1.0, "bus": 1.2, "bicycle": 1.2, "motorcycle": 0.8})
        heading, z = dice.pick((("right", near + 5.6), ("left", near + 2.4)))
        if kind in ("bicycle", "motorcycle"):
            ride = figures.bicycle if kind == "bicycle" else figures.motorcycle
            things.append((z, partial(ride, pen, x, z, ridden=True, turn=1.0)))
        else:
            draw = {"car": vehicles.car, "truck": vehicles.truck, "bus": vehicles.bus}[kind]
            things.append((z - 1.0, partial(draw, pen, x, z, heading)))
    for _ in range(int(dice.between((0.0, 3.5)))):
        x = dice.between((-street.left.road_edge, street.right.road_edge))
        things.append((near - 2.4, partial(figures.person, pen, x, near - 2.4)))
    return things
