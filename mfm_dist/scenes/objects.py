"""One object to a picture, with its kind: what an encoder is pre-trained on before it sees a street.

The role is that of ImageNet for the published methods, and so is the rule: the pictures are more varied in colour,
light and surface than either domain of the streets, and are drawn from ranges of their own. No palette,
weather, texture or street plan of either domain is used, so that pre-training tells nothing of the target's look.
Shapes are shared with the streets, as the cars of ImageNet are those of Cityscapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from mfm_dist.errors import ConfigError
from mfm_dist.rng import Stream, keyed_generator
from mfm_dist.scenes import figures, furniture, object_shapes, vehicles
from mfm_dist.scenes.buildings import Plot, building, fence, wall
from mfm_dist.scenes.choices import SPLITS, check_choice
from mfm_dist.scenes.dice import Dice, Range
from mfm_dist.scenes.ground import draw_backdrop, draw_ground, draw_sky
from mfm_dist.scenes.layout import KERB, SidePlan, Street
from mfm_dist.scenes.light import develop, light_of
from mfm_dist.scenes.looks import mixed
from mfm_dist.scenes.object_looks import ANY_DAY, any_colour, draw_looks, draw_textures, finish
from mfm_dist.scenes.object_shapes import MATERIALS, clutter, flat_ink, meadow, slabs
from mfm_dist.scenes.pen import Pen
from mfm_dist.scenes.view import Canvas, Facing, View

_SHAPE, _LOOKS, _LIGHT, _TEXTURE, _SENSOR, _FINISH = range(6)
"""What a draw is for; see ``render_scene``."""


@dataclass(frozen=True)
class ObjectPicture:
    """One picture and what it shows.

    Attributes:
        image: RGB, uint8 [H, W, 3].
        kind: index into ``OBJECT_KINDS``.
    """

    image: np.ndarray
    kind: int


@dataclass(frozen=True)
class Shot:
    """A camera and what it is pointed at."""

    view: View
    draw: Callable[[Pen], None]


Box = tuple[Range, Range, Range]
"""Extents of a thing in x, y and z, metres."""


def _framed(dice: Dice, aspect: float, box: Box, share: Range = (0.5, 1.2)) -> View:
    """The view in which a box fills a share of the picture, about its middle; above 1 the picture cuts it."""
    eye = box[1][0] + dice.between((0.15, 1.3)) * (box[1][1] - box[1][0])
    eye = max(eye, 0.3)
    corners = [(x / z, (eye - y) / z) for x in box[0] for y in box[1] for z in box[2]]
    (left, right), (top, bottom) = (((min(side), max(side))) for side in zip(*corners, strict=True))
    fill = dice.between(share)
    focal = fill * min(aspect / (right - left), 1.0 / (bottom - top))
    u = aspect * (0.5 + dice.between((-0.13, 0.13))) - 0.5 * focal * (left + right)
    v = 0.5 + dice.between((-0.11, 0.11)) - 0.5 * focal * (top + bottom)
    return View(focal=focal, height=eye, horizon=v, centre=u, bend=0.0)


Draw = Callable[[Pen, float, float], None]


def _upright(draw: Draw, width: float, up: Range, dice: Dice, aspect: float) -> Shot:
    """A thing that stands facing the camera: of it ``width`` metres and the heights ``up`` are framed."""
    x, z = dice.between((-3.0, 3.0)), dice.between((5.0, 20.0))
    box = ((x - 0.5 * width, x + 0.5 * width), up, (z, z + 0.01))
    return Shot(_framed(dice, aspect, box), lambda pen: draw(pen, x, z))


def _vehicle(
    draw: Callable[[Pen, float, float, str], None], length: float, width: float, height: float, dice: Dice,
    aspect: float,
) -> Shot:  # fmt: skip
    heading = dice.pick(("away", "toward", "left", "right"))
    z = dice.between((1.2, 3.0)) * (length if heading in ("left", "right") else width + 2.0)
    if heading in ("left", "right"):
        x, box_x, depth = 0.0, 0.5 * length, 0.1
    else:
        x, box_x, depth = z * dice.between((-0.8, 0.8)), 0.5 * width, length
    box = ((x - box_x, x + box_x), (0.0, height), (z, z + depth))
    # What is long and low may be cut at both ends: its whole length would leave it a few pixels high.
    share = (0.6, 1.2) if length < 5.0 or box_x < length / 2.0 else (0.9, 1.8)
    return Shot(_framed(dice, aspect, box, share), lambda pen: draw(pen, x, z, heading))


def _two_wheeler(draw: Callable[..., None], ridden: bool, dice: Dice, aspect: float) -> Shot:
    turn = dice.pick((1.0, 1.0, 0.8, 0.6, 0.0))
    width = 0.8 if turn == 0.0 else 1.9 * turn
    return _upright(partial(draw, ridden=ridden, turn=turn), width, (0.0, 1.75 if ridden else 1.1), dice, aspect)


def _rider(dice: Dice, aspect: float) -> Shot:
    return _two_wheeler(dice.pick((figures.bicycle, figures.motorcycle)), True, dice, aspect)


def _building(gabled: bool, dice: Dice, aspect: float) -> Shot:
    side, near = dice.pick((-1.0, 1.0)), dice.between((9.0, 16.0))
    x = side * dice.between((5.0, 14.0))
    storeys = int(dice.between((1.0, 3.0) if gabled else (3.0, 6.0)))
    plot = Plot("block", x, (near, near + dice.between((7.0, 12.0))), storeys)
    top = 3.4 + 3.1 * (storeys - 1) + (2.6 if gabled else 0.0)
    far_x = x + side * (9.0 if gabled else 1.0)
    box = ((min(x, far_x), max(x, far_x)), (0.0, top), plot.z)
    share = (0.7, 1.1) if gabled else (0.9, 1.6)
    return Shot(_framed(dice, aspect, box, share), lambda pen: building(pen, plot, x, gabled=gabled))


def _barrier(
    front: Draw, width: float, height: float, receding: Callable[[Pen, float, Range], None], dice: Dice, aspect: float
) -> Shot:
    """Seen from the front, or along its length."""
    if dice.chance(0.6):
        return _upright(front, width, (0.0, height), dice, aspect)
    x, near = dice.pick((-1.0, 1.0)) * dice.between((1.8, 3.0)), dice.between((3.5, 5.0))
    z = (near, 4.0 * near)
    view = _framed(dice, aspect, ((x - 0.1, x + 0.1), (0.0, 0.8 * height), z), (0.65, 0.9))
    return Shot(view, lambda pen: receding(pen, x, z))


def _ground(on_pavement: bool, dice: Dice, aspect: float) -> Shot:
    """A road with its edges, or the pavement beside one."""
    plans = []
    for sign in (-1.0, 1.0):
        edge = dice.between((0.3, 1.5) if on_pavement else (2.0, 6.5))
        pavement = edge + dice.between((2.0, 5.0) if on_pavement else (1.0, 4.0))
        plans.append(SidePlan(sign, edge, not on_pavement and dice.chance(0.3), pavement, False, pavement))
    street = Street(plans[0], plans[1], dice.between((2.4, 4.6)), not on_pavement and dice.chance(0.8), None)
    side = dice.pick(plans)
    at = 0.5 * side.sign * (side.road_edge + side.pavement_edge) if on_pavement else 0.0
    eye, focal, horizon = dice.between((1.0, 4.0)), dice.between((0.7, 1.6)), dice.between((-0.3, 0.35))
    depth = focal * eye / (dice.between((0.55, 0.8)) - horizon)
    centre = aspect * dice.between((0.35, 0.65)) - at * focal / depth
    view = View(focal, eye, horizon, centre, dice.between((-0.004, 0.004)))

    def draw(pen: Pen) -> None:
        draw_ground(pen, street)
        if on_pavement:
            for side in street.sides:
                edges = sorted((side.sign * (side.road_edge + 0.22), side.sign * side.pavement_edge))
                slabs(pen, (edges[0], edges[1]), KERB)

    return Shot(view, draw)


def _lamp_post(dice: Dice, aspect: float) -> Shot:
    """The head of the post and its arm, which reaches towards the middle of the street."""
    side, z = dice.pick((-1.0, 1.0)), dice.between((5.0, 20.0))
    foot = 3.0 * side
    box = ((foot - side * 2.2, foot + side * 0.4), (dice.between((3.5, 5.6)), 7.8), (z, z + 0.01))
    return Shot(_framed(dice, aspect, box, (0.6, 1.1)), lambda pen: furniture.lamp_post(pen, foot, z, 0.0))


def _grass(dice: Dice, aspect: float) -> Shot:
    horizon = dice.between((-0.1, 0.5))
    return Shot(View(1.0, 1.5, horizon, 0.5 * aspect, 0.0), lambda pen: meadow(pen, horizon))


def _sky(dice: Dice, aspect: float) -> Shot:
    view = View(dice.between((0.6, 1.5)), 2.0, dice.between((0.75, 1.0)), 0.5 * aspect, 0.0)

    def draw(pen: Pen) -> None:
        draw_sky(pen, pen.dice, aspect, pen.looks.pick("zenith"), pen.looks.pick("haze"))
        if pen.dice.chance(0.5):
            draw_backdrop(pen)

    return Shot(view, draw)


def _bushes(pen: Pen, x: float, z: float) -> None:
    for _ in range(int(pen.dice.between((1.0, 5.0)))):
        furniture.bush(pen, x + pen.dice.between((-0.6, 0.6)), z)


KINDS: Mapping[str, Callable[[Dice, float], Shot]] = {
    "car": partial(_vehicle, vehicles.car, 4.5, 1.8, 1.5),
    "truck": partial(_vehicle, vehicles.truck, 8.0, 2.4, 3.2),
    "bus": partial(_vehicle, vehicles.bus, 10.5, 2.5, 3.0),
    "train": partial(_vehicle, vehicles.tram, 15.0, 2.5, 3.9),
    "motorcycle": partial(_two_wheeler, figures.motorcycle, False),
    "bicycle": partial(_two_wheeler, figures.bicycle, False),
    "person": partial(_upright, figures.person, 0.7, (0.0, 1.75)),
    "rider": _rider,
    "traffic light": partial(_upright, partial(furniture.traffic_light, y=0.0), 0.9, (1.5, 3.7)),
    "traffic sign": partial(_upright, partial(furniture.traffic_sign, y=0.0), 1.1, (1.6, 2.9)),
    "tree": partial(_upright, furniture.tree, 4.5, (0.0, 6.8)),
    "lamp post": _lamp_post,
    "building": partial(_building, False),
    "house": partial(_building, True),
    "fence": partial(_barrier, object_shapes.front_fence, 2.6, 1.4, fence),
    "wall": partial(_barrier, object_shapes.brick_wall, 5.0, 3.0, partial(wall, height=2.2)),
    "bush": partial(_upright, _bushes, 1.6, (0.0, 1.3)),
    "grass": _grass,
    "road": partial(_ground, False),
    "pavement": partial(_ground, True),
    "sky": _sky,
    "ball": partial(_upright, object_shapes.ball, 1.0, (0.0, 1.0)),
    "chair": partial(_upright, object_shapes.chair, 0.6, (0.0, 1.0)),
    "bottle": partial(_upright, object_shapes.bottle, 0.35, (0.0, 1.0)),
    "cup": partial(_upright, object_shapes.cup, 0.95, (0.0, 0.75)),
    "star": partial(_upright, object_shapes.star, 1.0, (0.0, 1.0)),
    "flower": partial(_upright, object_shapes.flower, 0.7, (0.0, 1.0)),
    "fish": partial(_upright, object_shapes.fish, 1.0, (0.0, 0.55)),
}

OBJECT_KINDS: tuple[str, ...] = tuple(KINDS)


def _background(pen: Pen) -> None:
    """Covers the whole picture: plain, graded, striped or tiled; often with ground below and shapes strewn over it."""
    dice, canvas = pen.dice, pen.canvas
    aspect, first, second = canvas.aspect, any_colour(pen.looks.dice), any_colour(pen.looks.dice)
    material = dice.pick(MATERIALS)
    kind = dice.weighted({"plain": 2.0, "graded": 2.0, "stripes": 1.0, "tiles": 1.0})
    canvas.polygon(flat_ink(pen, first, material), ((0.0, 0.0), (aspect, 0.0), (aspect, 1.0), (0.0, 1.0)))
    if kind == "graded":
        for step in range(1, 16):
            ink = flat_ink(pen, mixed(first, second, step / 15.0), material)
            canvas.polygon(ink, ((0.0, step / 16.0), (aspect, step / 16.0), (aspect, 1.0), (0.0, 1.0)))
    elif kind == "stripes":
        ink, pitch, lean = flat_ink(pen, second, material), dice.between((0.06, 0.3)), dice.between((-1.0, 1.0))
        for step in range(int(-1.0 / pitch), int((aspect + 1.0) / pitch) + 1):
            u = step * pitch
            canvas.polygon(ink, ((u, 0.0), (u + 0.5 * pitch, 0.0), (u + 0.5 * pitch + lean, 1.0), (u + lean, 1.0)))
    elif kind == "tiles":
        ink, pitch = flat_ink(pen, second, material), dice.between((0.08, 0.3))
        for row in range(int(1.0 / pitch) + 1):
            for column in range(row % 2, int(aspect / pitch) + 1, 2):
                u, v = column * pitch, row * pitch
                canvas.polygon(ink, ((u, v), (u + pitch, v), (u + pitch, v + pitch), (u, v + pitch)))
    if dice.chance(0.35):
        clutter(pen, int(dice.between((3.0, 14.0))))
    if dice.chance(0.55):
        line = pen.view.horizon
        ink = flat_ink(pen, any_colour(pen.looks.dice), dice.pick(MATERIALS), Facing.UP)
        canvas.polygon(ink, ((0.0, line), (aspect, line), (aspect, 1.0), (0.0, 1.0)))


def render_object(*, seed: int, split: str, index: int, size: tuple[int, int] = (96, 96)) -> ObjectPicture:
    """One picture of one object: a pure function of its arguments.

    Args:
        seed: of the whole data set.
        split: one of ``SPLITS``; the splits share no draws, and none is shared with the streets.
        index: 0, 1, 2, … without end; the kinds take turns, so any run of ``len(OBJECT_KINDS)`` has each once.
        size: height and width of the picture, pixels.

    Raises:
        ConfigError: unknown split, or a size below 32 pixels.
    """
    check_choice("split", split, SPLITS)
    height, width = size
    if height < 32 or width < 32:
        raise ConfigError(f"object pictures are at least 32 pixels high and wide, not {height} x {width}")
    place = SPLITS.index(split)

    def generator(purpose: int) -> np.random.Generator:
        return keyed_generator(seed, Stream.OBJECT, index, place * 16 + purpose)

    kind = index % len(OBJECT_KINDS)
    dice, light_dice = Dice(generator(_SHAPE)), Dice(generator(_LIGHT))
    looks, light = draw_looks(Dice(generator(_LOOKS))), light_of(light_dice, ANY_DAY)
    canvas = Canvas(height, width)
    shot = KINDS[OBJECT_KINDS[kind]](dice, width / height)
    pen = Pen(canvas, shot.view, light, dice, looks)
    _background(pen)
    shot.draw(pen)
    scene = develop(
        canvas, shot.view, light, air=looks.pick("haze"), cloud=looks.pick("cloud"),
        textures=draw_textures(light_dice), texture_generator=generator(_TEXTURE), sensor_generator=generator(_SENSOR),
    )  # fmt: skip
    return ObjectPicture(finish(scene.image, Dice(generator(_FINISH))), kind)
