"""People and two-wheelers. A rider is the same person as a pedestrian: only what is below tells them apart."""

from __future__ import annotations

from dataclasses import replace
from math import cos, pi, sin

from mfm_dist.scenes.looks import Colour, Material, mixed, toned
from mfm_dist.scenes.pen import Board, Pen
from mfm_dist.scenes.view import Point

PERSON, RIDER, MOTORCYCLE, BICYCLE = 11, 12, 17, 18

END_ON = 0.3


def person(pen: Pen, x: float, z: float, y: float = 0.0) -> None:
    """A pedestrian, 1.5 to 1.9 m, standing or walking."""
    dice, looks = pen.dice, pen.looks
    tall = dice.between((0.86, 1.08))
    board = Board(pen, pen.view.project(x, y, z), pen.view.scale(z) * tall)
    pen.shadow((x - 0.22, x + 0.22), (z - 0.1, z + 0.1), 1.7)
    stride = dice.between((-0.24, 0.24))
    legs = pen.ink(PERSON, looks.pick("trousers"), z, Material.CLOTH)
    shoes = pen.ink(PERSON, looks.pick("dark"), z)
    for side, step in ((-0.07, stride), (0.07, -stride)):
        board.limb(legs, (side, 0.90), (side + step, 0.04), 0.17)
        board.box(shoes, (side + step - 0.08, side + step + 0.11), (0.0, 0.07))
    coat = looks.pick("cloth")
    if dice.chance(0.25):
        skirt = pen.ink(PERSON, toned(coat, 0.9), z, Material.CLOTH)
        board.shape(skirt, ((-0.17, 0.95), (0.17, 0.95), (0.27, 0.5), (-0.27, 0.5)))
    _torso(board, PERSON, z, coat, ((0.0, 0.88), (0.0, 1.42)), swing=-stride, face=dice.chance(0.6))
    if dice.chance(0.3):
        bag = pen.ink(PERSON, looks.pick("cloth"), z, Material.CLOTH)
        side = 0.28 if dice.chance(0.5) else -0.28
        board.box(bag, (side - 0.1, side + 0.1), (0.62, 0.92))


def _torso(
    board: Board, label: int, z: float, coat: Colour, spine: tuple[Point, Point], *, swing: float, face: bool
) -> None:
    """Trunk, arms and head on a spine from hip to shoulder; a body is as deep as wide, so it is never squeezed."""
    pen = board.pen
    spine = ((spine[0][0] * board.squeeze, spine[0][1]), (spine[1][0] * board.squeeze, spine[1][1]))
    board = replace(board, squeeze=1.0)
    cloth = pen.ink(label, coat, z, Material.CLOTH)
    sleeve = pen.ink(label, toned(coat, 0.8), z, Material.CLOTH)
    skin = pen.ink(label, pen.looks.pick("skin"), z, Material.CLOTH)
    hair = pen.ink(label, pen.looks.pick("hair"), z)
    (hx, hy), (sx, sy) = spine
    board.limb(sleeve, (sx - 0.2, sy - 0.04), (sx - 0.24 + swing, sy - 0.58), 0.11)
    board.shape(
        cloth,
        ((hx - 0.17, hy), (sx - 0.23, sy - 0.06), (sx - 0.12, sy + 0.03), (sx + 0.12, sy + 0.03),
         (sx + 0.23, sy - 0.06), (hx + 0.17, hy)),
    )  # fmt: skip
    board.limb(sleeve, (sx + 0.2, sy - 0.04), (sx + 0.24 - swing, sy - 0.58), 0.11)
    board.disc(skin, sx + 0.24 - swing, sy - 0.62, 0.05)
    head = (sx + 0.25 * (sx - hx), sy + 0.19)
    board.box(skin, (head[0] - 0.05, head[0] + 0.05), (sy, sy + 0.1))
    board.disc(hair, head[0], head[1] + 0.03, 0.115, 1.15)
    if face:
        board.disc(skin, head[0] + 0.015, head[1] - 0.025, 0.09, 1.2)


def _wheel(board: Board, label: int, z: float, hub: Point, radius: float, tyre: float) -> None:
    """A spoked wheel: the ground shows through, the label covers it whole as annotators do."""
    pen = board.pen
    behind = pen.canvas.colour_at(board.at(*hub)) or (128.0, 128.0, 128.0)
    dark = pen.looks.pick("tyre")
    rubber = pen.ink(label, dark, z)
    board.disc(rubber, hub[0], hub[1], radius)
    board.disc(pen.ink(label, mixed(behind, dark, 0.22), z), hub[0], hub[1], radius - tyre)
    for turn in (0.0, 0.25, 0.5, 0.75):
        dx, dy = radius * cos(pi * turn), radius * sin(pi * turn)
        board.limb(rubber, (hub[0] - dx, hub[1] - dy), (hub[0] + dx, hub[1] + dy), 0.015)
    board.disc(rubber, hub[0], hub[1], 0.05)


def bicycle(pen: Pen, x: float, z: float, *, y: float = 0.0, ridden: bool, turn: float) -> None:
    """``turn`` is the share of its length that is seen: 1 from the side, below ``END_ON`` from behind."""
    board = pen.stand(x, z, y, max(turn, 0.4))
    pen.shadow((x - 0.8 * turn - 0.1, x + 0.8 * turn + 0.1), (z - 0.15, z + 0.15), 0.9, 0.8)
    flip = 1.0 if pen.dice.chance(0.5) else -1.0
    frame_colour = pen.looks.pick("paint")
    frame = pen.ink(BICYCLE, frame_colour, z)
    dark = pen.ink(BICYCLE, pen.looks.pick("dark"), z)
    if turn < END_ON:
        _bicycle_end_on(pen.stand(x, z, y), z, frame, dark, ridden)
        return
    back, front = (-0.52 * flip, 0.34), (0.52 * flip, 0.34)
    crank, seat, bars = (-0.06 * flip, 0.32), (-0.2 * flip, 0.86), (0.40 * flip, 0.98)
    for hub in (back, front):
        _wheel(board, BICYCLE, z, hub, 0.34, 0.055)
    for start, end in (
        (back, crank), (crank, seat), (back, (seat[0], 0.72)), (crank, (0.36 * flip, 0.72)),
        ((seat[0], 0.74), (0.36 * flip, 0.78)), (bars, front),
    ):  # fmt: skip
        board.limb(frame, start, end, 0.055)
    board.limb(dark, (bars[0] - 0.1 * flip, 1.0), (bars[0] + 0.08 * flip, 1.0), 0.05)
    board.box(dark, (seat[0] - 0.13, seat[0] + 0.13), (0.86, 0.92))
    if ridden:
        _rider_side_on(board, z, flip, seat=(seat[0], 0.92), foot=(crank[0] + 0.06 * flip, 0.2), hands=bars)


def _bicycle_end_on(board: Board, z: float, frame: int, dark: int, ridden: bool) -> None:
    board.disc(dark, 0.0, 0.34, 0.075, 4.5)
    board.limb(frame, (0.0, 0.4), (0.0, 0.95), 0.06)
    board.limb(dark, (-0.28, 1.0), (0.28, 1.0), 0.05)
    board.box(dark, (-0.1, 0.1), (0.86, 0.93))
    if ridden:
        _rider_end_on(board, z, seat_y=0.92)


def motorcycle(pen: Pen, x: float, z: float, *, y: float = 0.0, ridden: bool, turn: float) -> None:
    """``turn`` as of a bicycle."""
    board = pen.stand(x, z, y, max(turn, 0.4))
    pen.shadow((x - turn - 0.25, x + turn + 0.25), (z - 0.3, z + 0.3), 0.8)
    flip = 1.0 if pen.dice.chance(0.5) else -1.0
    paint = pen.looks.pick("paint")
    body = pen.ink(MOTORCYCLE, paint, z, Material.PAINT)
    dark = pen.ink(MOTORCYCLE, pen.looks.pick("dark"), z)
    chrome = pen.ink(MOTORCYCLE, pen.looks.pick("hub"), z)
    if turn < END_ON:
        board = pen.stand(x, z, y)
        board.disc(dark, 0.0, 0.32, 0.13, 2.5)
        board.shape(body, ((-0.22, 0.5), (-0.26, 0.78), (-0.14, 0.96), (0.14, 0.96), (0.26, 0.78), (0.22, 0.5)))
        board.box(chrome, (0.14, 0.26), (0.24, 0.42))
        board.box(pen.ink(MOTORCYCLE, (206.0, 44.0, 36.0), z), (-0.10, 0.10), (0.70, 0.80))
        board.limb(dark, (-0.40, 1.06), (0.40, 1.06), 0.06)
        for mirror in (-0.38, 0.38):
            board.disc(dark, mirror, 1.18, 0.08, 0.7)
        if ridden:
            _rider_end_on(board, z, seat_y=0.90)
        return
    back, front = (-0.68 * flip, 0.32), (0.70 * flip, 0.32)
    for hub in (back, front):
        board.disc(dark, hub[0], hub[1], 0.32)
        board.disc(chrome, hub[0], hub[1], 0.15)
    board.limb(chrome, front, (0.42 * flip, 0.98), 0.09)
    board.shape(dark, [(flip * a, b) for a, b in ((-0.5, 0.3), (-0.3, 0.66), (0.36, 0.66), (0.40, 0.26), (0.0, 0.16))])
    tank = ((-0.02, 0.66), (0.04, 0.90), (0.40, 0.94), (0.46, 0.70))
    seat = ((-0.86, 0.82), (-0.80, 0.92), (0.02, 0.82), (0.0, 0.64), (-0.5, 0.64))
    board.shape(body, [(flip * a, b) for a, b in tank])
    board.shape(dark, [(flip * a, b) for a, b in seat])
    board.limb(body, (0.52 * flip, 0.62), (0.86 * flip, 0.60), 0.10)
    board.limb(chrome, (-0.1 * flip, 0.26), (-0.84 * flip, 0.34), 0.10)
    board.limb(dark, (0.42 * flip, 0.98), (0.24 * flip, 1.08), 0.06)
    if ridden:
        _rider_side_on(board, z, flip, seat=(-0.3 * flip, 0.86), foot=(0.0, 0.32), hands=(0.28 * flip, 1.05))


def _rider_side_on(board: Board, z: float, flip: float, *, seat: Point, foot: Point, hands: Point) -> None:
    pen = board.pen
    legs = pen.ink(RIDER, pen.looks.pick("trousers"), z, Material.CLOTH)
    shoes = pen.ink(RIDER, pen.looks.pick("dark"), z)
    coat = pen.looks.pick("cloth")
    shoulder = (seat[0] + 0.22 * flip, seat[1] + 0.52)
    knee = (seat[0] + 0.36 * flip, 0.5 * (seat[1] + foot[1]) + 0.06)
    board.limb(legs, (seat[0], seat[1] + 0.06), knee, 0.18)
    board.limb(legs, knee, foot, 0.14)
    board.box(shoes, (foot[0] - 0.12, foot[0] + 0.12), (foot[1] - 0.06, foot[1] + 0.03))
    _torso(board, RIDER, z, coat, (seat, shoulder), swing=0.0, face=True)
    sleeve = pen.ink(RIDER, toned(coat, 0.72), z, Material.CLOTH)
    board.limb(sleeve, (shoulder[0], shoulder[1] - 0.05), (hands[0], hands[1] + 0.02), 0.11)


def _rider_end_on(board: Board, z: float, seat_y: float) -> None:
    pen = board.pen
    legs = pen.ink(RIDER, pen.looks.pick("trousers"), z, Material.CLOTH)
    shoes = pen.ink(RIDER, pen.looks.pick("dark"), z)
    for side, lift in ((-0.17, 0.14), (0.17, 0.34)):
        board.limb(legs, (0.6 * side, seat_y + 0.04), (side, lift), 0.16)
        board.box(shoes, (side - 0.07, side + 0.07), (lift - 0.06, lift + 0.06))
    _torso(board, RIDER, z, pen.looks.pick("cloth"), ((0.0, seat_y), (0.0, seat_y + 0.54)), swing=-0.06, face=False)
