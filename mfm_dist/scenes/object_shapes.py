"""Things that no street has, and walls, fences and grass seen from the front; drawn flat on a ``Board``."""

from __future__ import annotations

from itertools import pairwise
from math import cos, pi, sin

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.scenes.dice import Range
from mfm_dist.scenes.looks import Colour, Material, toned
from mfm_dist.scenes.object_looks import any_colour
from mfm_dist.scenes.pen import Board, Pen
from mfm_dist.scenes.view import Facing

MATERIALS = tuple(Material)


def flat_ink(pen: Pen, colour: Colour, material: Material = Material.SMOOTH, facing: Facing = Facing.CAMERA) -> int:
    """An ink without a class; the air does not reach it."""
    return pen.ink(IGNORE_INDEX, colour, 0.0, material, facing)


def _inks(pen: Pen, *tones: float) -> list[int]:
    """Tones of one free colour on one free material."""
    colour, material = any_colour(pen.looks.dice), pen.dice.pick(MATERIALS)
    return [flat_ink(pen, toned(colour, tone), material) for tone in tones]


def ball(pen: Pen, x: float, z: float) -> None:
    """1 m wide: shaded, with a band, patches or meridians."""
    board, dice = pen.stand(x, z), pen.dice
    pen.shadow((x - 0.45, x + 0.45), (z - 0.3, z + 0.3), 0.8)
    dark, plain, light = _inks(pen, 0.6, 1.0, 1.35)
    (second,) = _inks(pen, 1.0)
    board.disc(dark, 0.0, 0.5, 0.5)
    board.disc(plain, -0.03, 0.53, 0.455)
    kind = dice.pick(("band", "patches", "meridians", "plain"))
    if kind == "band":
        board.disc(second, 0.0, 0.5, 0.49, 0.35)
    elif kind == "patches":
        for step in range(6):
            angle, reach = 2.0 * pi * (step + dice.unit() * 0.2) / 5, 0.0 if step == 5 else 0.36
            board.disc(second, reach * cos(angle), 0.5 + reach * sin(angle), 0.13)
    elif kind == "meridians":
        for width in (0.30, 0.08):
            board.disc(second, 0.0, 0.5, width, 0.49 / width)
            board.disc(plain, 0.0, 0.5, width - 0.05, 0.49 / width)
    board.disc(light, -0.17, 0.7, 0.1)


def chair(pen: Pen, x: float, z: float) -> None:
    """0.6 m wide and 1 m high, its side turned a little to the camera."""
    board, dice = pen.stand(x, z), pen.dice
    flip = dice.pick((-1.0, 1.0))
    pen.shadow((x - 0.3, x + 0.3), (z - 0.2, z + 0.2), 0.9)
    plain, dark, light = _inks(pen, 1.0, 0.65, 1.25)
    lean, seat, depth, thick = dice.between((0.0, 0.08)), dice.between((0.4, 0.5)), 0.14, dice.between((0.035, 0.06))
    top = dice.between((0.9, 1.1))
    for right, up in ((-0.12, 0.1), (0.3, 0.1), (-0.26, 0.0), (0.16, 0.0)):
        board.limb(dark if up else plain, (flip * right, seat), (flip * right, up), thick)
    sheet = ((-0.28, seat), (0.18, seat), (0.18 + depth, seat + 0.1), (-0.28 + depth, seat + 0.1))
    back = ((-0.12, seat + 0.1), (0.32, seat + 0.1), (0.32 + lean, top), (-0.12 + lean, top))
    if dice.chance(0.5):
        board.shape(plain, [(flip * a, b) for a, b in back])
    else:
        for right in (-0.12, 0.02, 0.16, 0.30):
            board.limb(plain, (flip * right, seat + 0.1), (flip * (right + lean), top), thick)
        board.limb(plain, (flip * (-0.14 + lean), top), (flip * (0.33 + lean), top), 2.0 * thick)
    board.shape(light, [(flip * a, b) for a, b in sheet])
    board.limb(dark, (flip * -0.28, seat - 0.02), (flip * 0.18, seat - 0.02), 0.05)


def bottle(pen: Pen, x: float, z: float) -> None:
    """0.34 m wide and 1 m high."""
    board, dice = pen.stand(x, z), pen.dice
    pen.shadow((x - 0.16, x + 0.16), (z - 0.1, z + 0.1), 0.9)
    plain, light = _inks(pen, 1.0, 1.4)
    (label,), (cap,) = _inks(pen, 1.0), _inks(pen, 1.0)
    half, neck, shoulder = dice.between((0.12, 0.2)), dice.between((0.045, 0.07)), dice.between((0.5, 0.66))
    slope = dice.between((0.08, 0.2))
    right = (
        (half, 0.0),
        (half, shoulder),
        (0.75 * half, shoulder + 0.55 * slope),
        (neck, shoulder + slope),
        (neck, 0.95),
    )
    board.shape(plain, [*right, *((-a, b) for a, b in reversed(right))])
    board.box(cap, (-neck - 0.015, neck + 0.015), (0.92, 1.0))
    if dice.chance(0.75):
        low = dice.between((0.1, 0.25))
        board.box(label, (-half, half), (low, low + dice.between((0.15, 0.3))))
    board.box(light, (-0.7 * half, -0.45 * half), (0.06, shoulder))


def cup(pen: Pen, x: float, z: float) -> None:
    """0.9 m wide with its handle and 0.75 m high."""
    board, dice = pen.stand(x, z), pen.dice
    pen.shadow((x - 0.35, x + 0.35), (z - 0.2, z + 0.2), 0.6)
    flip, foot, tall = dice.pick((-1.0, 1.0)), dice.between((0.17, 0.34)), dice.between((0.5, 0.75))
    plain, dark, inside = _inks(pen, 1.0, 0.75, 0.5)
    (second,) = _inks(pen, 1.0)
    ring = [(flip * (0.34 + 0.2 * cos(pi * s / 8)), (0.52 + 0.24 * sin(pi * s / 8)) * tall) for s in range(-8, 9)]
    for start, end in pairwise(ring):
        board.limb(dark, start, end, 0.075)
    board.shape(plain, ((-foot, 0.02), (-0.36, tall), (0.36, tall), (foot, 0.02)))
    board.disc(plain, 0.0, 0.03, foot, 0.18)
    if dice.chance(0.5):
        board.box(second, (-0.8 * foot - 0.05, 0.8 * foot + 0.05), (0.35 * tall, 0.6 * tall))
    board.disc(plain, 0.0, tall, 0.36, 0.22)
    board.disc(inside, 0.0, tall, 0.32, 0.17)


def star(pen: Pen, x: float, z: float) -> None:
    """A star of four to seven points, 1 m wide."""
    board, dice = pen.stand(x, z), pen.dice
    rim, plain = _inks(pen, 0.6, 1.0)
    points, turn, waist = int(dice.between((4.0, 8.0))), pi * dice.between((-0.1, 0.1)), dice.between((0.35, 0.55))
    for ink, radius in ((rim, 0.5), (plain, dice.between((0.38, 0.46)))):
        angles = [(step, pi * step / points + 0.5 * pi + turn) for step in range(2 * points)]
        reach = [radius * (waist if step % 2 else 1.0) for step, _ in angles]
        board.shape(ink, [(r * cos(a), 0.5 + r * sin(a)) for r, (_, a) in zip(reach, angles, strict=True)])


def flower(pen: Pen, x: float, z: float) -> None:
    """0.7 m wide and 1 m high."""
    board, dice = pen.stand(x, z), pen.dice
    green = flat_ink(pen, pen.looks.pick("leaves"), Material.LEAVES)
    dark_green = flat_ink(pen, toned(pen.looks.pick("leaves"), 0.7), Material.LEAVES)
    petal, shade = _inks(pen, 1.0, 0.75)
    (heart,) = _inks(pen, 1.0)
    sway, up = dice.between((-0.12, 0.12)), 0.68
    board.limb(green, (-sway, 0.0), (0.0, up), 0.045)
    for side in (-1.0, 1.0):
        board.shape(dark_green, ((-0.6 * sway, 0.12), (side * 0.18, 0.34), (side * 0.3, 0.3), (side * 0.16, 0.16)))
    count, reach = int(dice.between((5.0, 10.0))), dice.between((0.19, 0.25))
    for step in range(count):
        angle = 2.0 * pi * (step + 0.25) / count
        board.limb(shade, (0.0, up), (1.3 * reach * cos(angle), up + 1.3 * reach * sin(angle)), 0.13)
        board.disc(petal, reach * cos(angle), up + reach * sin(angle), 1.5 * reach / count + 0.04)
    board.disc(heart, 0.0, up, 0.11)


def fish(pen: Pen, x: float, z: float) -> None:
    """1 m long and 0.5 m high."""
    board, dice = pen.stand(x, z), pen.dice
    flip, stretch = dice.pick((-1.0, 1.0)), dice.between((0.4, 0.65))
    plain, dark, light = _inks(pen, 1.0, 0.65, 1.3)
    (second,) = _inks(pen, 1.0)
    for tail in (((-0.2, 0.27), (-0.52, 0.48), (-0.43, 0.27), (-0.52, 0.06)),
                 ((-0.1, 0.27), (-0.02, 0.27 + 0.75 * stretch), (0.16, 0.3))):  # fmt: skip
        board.shape(dark, [(flip * a, b) for a, b in tail])
    board.disc(plain, flip * 0.1, 0.27, 0.37, stretch)
    board.disc(light, flip * 0.12, 0.27 - 0.12 * stretch, 0.28, 0.6 * stretch)
    if dice.chance(0.6):
        for right in (-0.08, 0.08, 0.22):
            board.box(
                second, (flip * right - 0.025, flip * right + 0.025), (0.27 - 0.3 * stretch, 0.27 + 0.3 * stretch)
            )
    board.disc(flat_ink(pen, (245.0, 245.0, 240.0)), flip * 0.33, 0.3, 0.055)
    board.disc(flat_ink(pen, (15.0, 15.0, 20.0)), flip * 0.34, 0.3, 0.03)


def brick_wall(pen: Pen, x: float, z: float) -> None:
    """8 m wide and 3 m high, in courses of bricks or blocks."""
    board, dice, looks = pen.stand(x, z), pen.dice, pen.looks
    colour = looks.pick("barrier")
    joint = flat_ink(pen, toned(colour, dice.pick((0.55, 1.5))), Material.MASONRY)
    bricks = [flat_ink(pen, looks.vary(colour), Material.MASONRY) for _ in range(4)]
    high = dice.between((0.2, 0.5))
    long, gap = high * dice.between((1.4, 2.8)), 0.14 * high
    board.box(joint, (-4.0, 4.0), (0.0, 3.0))
    for row in range(int(3.0 / high)):
        at = -4.0 - 0.5 * long * (row % 2)
        while at < 4.0:
            left, right = max(at, -4.0), min(at + long - gap, 4.0)
            if right > left:
                board.box(dice.pick(bricks), (left, right), (row * high, (row + 1) * high - gap))
            at += long
    if dice.chance(0.5):
        board.box(bricks[0], (-4.1, 4.1), (2.9, 3.1))


def front_fence(pen: Pen, x: float, z: float) -> None:
    """4 m wide and 1.4 m high: pickets, bars or wire; the background shows between them."""
    board, dice = pen.stand(x, z), pen.dice
    colour = pen.looks.pick("fence")
    ink, shade = flat_ink(pen, colour, Material.WOOD), flat_ink(pen, toned(colour, 0.7), Material.WOOD)
    kind = dice.pick(("pickets", "bars", "mesh"))
    if kind == "mesh":
        for step in range(-4, 17):
            board.limb(ink, (0.25 * step - 2.0, 0.0), (0.25 * step - 1.0, 1.3), 0.025)
            board.limb(ink, (0.25 * step - 1.0, 0.0), (0.25 * step - 2.0, 1.3), 0.025)
        for right in (-2.0, 0.0, 2.0):
            board.box(shade, (right - 0.05, right + 0.05), (0.0, 1.4))
        return
    for up in (0.3, 1.0):
        board.box(shade, (-2.0, 2.0), (up, up + 0.1))
    half, pitch, tip = {"pickets": (0.07, 0.24, 0.1), "bars": (0.025, 0.17, 0.12)}[kind]
    tip *= dice.pick((0.0, 1.0))
    at = -1.95
    while at < 2.0:
        board.shape(ink, ((at - half, 0.0), (at - half, 1.2), (at, 1.2 + tip), (at + half, 1.2), (at + half, 0.0)))
        at += pitch


def meadow(pen: Pen, horizon: float) -> None:
    """Grass below ``horizon``, with blades that grow towards the camera and sometimes flowers."""
    dice, looks, aspect = pen.dice, pen.looks, pen.canvas.aspect
    colour = looks.pick("grass")
    ground = flat_ink(pen, colour, Material.GRASS, Facing.UP)
    pen.canvas.polygon(ground, ((0.0, horizon), (aspect, horizon), (aspect, 1.0), (0.0, 1.0)))
    blades = [flat_ink(pen, toned(colour, tone), Material.GRASS) for tone in (0.6, 0.8, 1.0, 1.2, 1.4)]
    petals, long = flat_ink(pen, any_colour(looks.dice)), dice.between((0.5, 1.2))
    flowers = dice.pick((0.0, 0.0, 0.12))
    for step in range(170):
        near = (step + 1.0) / 170.0
        u, v = aspect * dice.unit(), horizon + (1.05 - horizon) * near
        tall, lean = long * (0.03 + 0.14 * near) * dice.around(1.0, 0.4), dice.between((-0.05, 0.05)) * (0.3 + near)
        half = 0.003 + 0.008 * near
        pen.canvas.polygon(dice.pick(blades), ((u - half, v), (u + half, v), (u + lean, v - tall)))
        if dice.chance(flowers):
            pen.canvas.ellipse(petals, (u + lean, v - tall), 2.0 * half, 2.0 * half)


def slabs(pen: Pen, x: Range, height: float) -> None:
    """Paving laid between two lines along the street, ``height`` metres above the road, up to 14 m away."""
    dice, looks = pen.dice, pen.looks
    colour = looks.pick("paving")
    joint = flat_ink(pen, toned(colour, dice.pick((0.5, 0.7, 1.4))), Material.PAVING, Facing.UP)
    stones = [flat_ink(pen, looks.vary(colour), Material.PAVING, Facing.UP) for _ in range(4)]
    pen.floor(joint, x, (1.0, 14.0), height)
    columns, long = int(dice.between((2.0, 6.0))), dice.between((0.4, 1.0))
    wide, shift = (x[1] - x[0]) / columns, dice.pick((0.0, 0.5))
    for row in range(int(12.0 / long)):
        for column in range(columns):
            left, near = x[0] + column * wide, 1.0 + long * (row + shift * (column % 2))
            pen.floor(dice.pick(stones), (left, left + 0.92 * wide), (near, near + 0.9 * long), height)


def clutter(pen: Pen, count: int) -> None:
    """Shapes of any colour anywhere in the picture."""
    dice, aspect = pen.dice, pen.canvas.aspect
    for _ in range(count):
        ink = flat_ink(pen, any_colour(pen.looks.dice), dice.pick(MATERIALS))
        u, v = aspect * dice.unit(), dice.unit()
        reach, turn = dice.between((0.04, 0.3)), 2.0 * pi * dice.unit()
        kind = dice.pick(("ellipse", "polygon", "bar"))
        if kind == "ellipse":
            pen.canvas.ellipse(ink, (u, v), reach, reach * dice.between((0.4, 1.0)))
        elif kind == "polygon":
            corners = int(dice.between((3.0, 6.0)))
            angles = [turn + 2.0 * pi * corner / corners for corner in range(corners)]
            pen.canvas.polygon(ink, [(u + reach * cos(angle), v + reach * sin(angle)) for angle in angles])
        else:
            dx, dy = 3.0 * reach * cos(turn), 3.0 * reach * sin(turn)
            Board(pen, (u, v), 1.0).limb(ink, (-dx, -dy), (dx, dy), 0.3 * reach)
