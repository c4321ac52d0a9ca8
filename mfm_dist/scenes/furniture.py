"""What stands along a street: trees and bushes, lamp posts, traffic lights, signs and bins."""

from __future__ import annotations

from math import cos, pi, sin

from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.scenes.looks import Colour, Material, toned
from mfm_dist.scenes.pen import Board, Pen
from mfm_dist.scenes.view import Facing, Point

POLE, LIGHT, SIGN, VEGETATION = 5, 6, 7, 8

DETAILED_TO = 32.0
"""Metres; trees further away get fewer clumps of leaves."""


def _leafy_outline(turn: int) -> list[Point]:
    """A circle of radius 1 whose edge wavers."""
    points = []
    for step in range(14):
        angle = 2.0 * pi * (step + turn / 7.0) / 14
        reach = (1.0 if step % 2 else 0.86) + 0.07 * sin(2.7 * step + turn)
        points.append((reach * cos(angle), reach * sin(angle)))
    return points


LEAFY_OUTLINES = tuple(_leafy_outline(turn) for turn in range(14))


def blob(board: Board, ink: int, right: float, up: float, radius: float, stretch: float = 1.0) -> None:
    """A clump of leaves."""
    outline = board.pen.dice.pick(LEAFY_OUTLINES)
    high = radius * stretch
    board.shape(ink, [(right + radius * x, up + high * y) for x, y in outline])


def tree(pen: Pen, x: float, z: float, *, y: float = 0.0, size: float = 1.0) -> None:
    dice, looks = pen.dice, pen.looks
    if not pen.sees(x, z, 4.0 * size):
        return
    board = pen.stand(x, z, y)
    crown, trunk = looks.pick("leaves"), looks.pick("trunk")
    height = size * dice.between((5.0, 8.5))
    clear = height * dice.between((0.26, 0.36))
    pen.shadow((x - 0.15, x + 0.15), (z - 0.1, z + 0.1), clear)
    fall = pen.light.shadow
    # The crown's shadow reaches from beside the trunk outwards, the longer the lower the sun stands.
    centre = pen.view.project(x + fall[0] * 0.5 * height, 0.0, max(z + fall[1] * 0.5 * height, 3.0))
    reach = 0.28 * height * board.scale
    pen.canvas.veil_ellipse(centre, reach * (1.0 + 1.1 * abs(fall[0])), 0.28 * reach * pen.view.height / 1.4, 0.75)

    bark = pen.ink(VEGETATION, trunk, z, Material.WOOD)
    width = 0.045 * height
    foot, neck = 0.6 * width, 0.35 * width
    board.shape(bark, ((-foot, 0.0), (-neck, clear * 1.5), (neck, clear * 1.5), (foot, 0.0)))
    if dice.chance(0.2):
        _conifer(board, z, crown, clear, height)
        return
    board.limb(bark, (0.0, clear), (-0.14 * height, 0.55 * height), 0.5 * width)
    board.limb(bark, (0.0, clear), (0.14 * height, 0.58 * height), 0.5 * width)
    radius = 0.5 * (height - clear) * dice.between((0.85, 1.1))
    middle = clear + 0.52 * (height - clear)
    tones = [pen.ink(VEGETATION, toned(crown, tone), z, Material.LEAVES) for tone in (0.66, 0.84, 1.0, 1.18)]
    spread = dice.between((0.9, 1.15))
    for tone, lift, count, share in ((0, -0.30, 4, 0.62), (1, -0.05, 5, 0.58), (2, 0.18, 4, 0.48), (3, 0.38, 4, 0.30)):
        for step in range(count if z < DETAILED_TO else count - 2):
            across = (2.0 * (step + 0.5) / count - 1.0) * 0.62 * spread
            across = across * (1.0 - 0.4 * max(lift, 0.0)) - 0.12 * (tone == 3)
            size_here = radius * share * dice.around(1.0, 0.16)
            blob(board, tones[tone], across * radius, middle + radius * dice.around(lift, 0.3), size_here)


def _conifer(board: Board, z: float, crown: Colour, clear: float, height: float) -> None:
    pen = board.pen
    bottom = 0.5 * clear
    for layer in range(4):
        share = layer / 4.0
        ink = pen.ink(VEGETATION, toned(crown, 0.66 + 0.12 * layer), z, Material.LEAVES)
        low = bottom + share * (height - bottom)
        half = (0.26 - 0.19 * share) * height
        peak = min(height, low + 0.42 * (height - bottom))
        waist, shoulder = 0.3 * half, low + 0.1 * height
        outline = ((-half, low), (-waist, shoulder), (0.0, peak), (waist, shoulder), (half, low))
        board.shape(ink, (*outline, (0.0, low - 0.03 * height)))


def bush(pen: Pen, x: float, z: float) -> None:
    board = pen.stand(x, z)
    crown = pen.looks.pick("leaves")
    radius = pen.dice.between((0.4, 0.95))
    pen.shadow((x - radius, x + radius), (z - 0.3, z + 0.3), radius, 0.8)
    for tone, lift, share in ((0.72, 0.5, 1.0), (0.92, 0.75, 0.8), (1.12, 0.95, 0.45)):
        ink = pen.ink(VEGETATION, toned(crown, tone), z, Material.LEAVES)
        blob(board, ink, 0.0, lift * radius, share * radius, 0.85)


def hedge(pen: Pen, x: float, z: tuple[float, float], height: float) -> None:
    """A clipped hedge beside the pavement."""
    crown = pen.looks.pick("leaves")
    facing = Facing.RIGHT if x < 0.0 else Facing.LEFT
    middle = 0.5 * (z[0] + z[1])
    pen.along(pen.ink(VEGETATION, toned(crown, 0.8), middle, Material.LEAVES, facing), x, z, (0.0, height))
    pen.along(pen.ink(VEGETATION, toned(crown, 1.05), middle, Material.LEAVES), x, z, (height * 0.82, height))
    outer = x + (0.9 if x > 0.0 else -0.9)
    end = pen.ink(VEGETATION, toned(crown, 0.9), z[0], Material.LEAVES)
    pen.across(end, z[0], (x, outer), (0.0, height))


def lamp_post(pen: Pen, x: float, z: float, y: float) -> None:
    """A tall post with an arm over the road."""
    board = pen.stand(x, z, y)
    pen.shadow((x - 0.06, x + 0.06), (z - 0.05, z + 0.05), 6.0, 0.8)
    inward = -1.0 if x > 0.0 else 1.0
    metal = pen.looks.pick("metal")
    ink, shade = pen.ink(POLE, metal, z), pen.ink(POLE, toned(metal, 0.72), z)
    board.box(shade, (-0.13, 0.13), (0.0, 0.9))
    board.box(ink, (-0.085, 0.085), (0.0, 7.2))
    board.limb(ink, (0.0, 7.15), (inward * 1.5, 7.5), 0.11)
    board.shape(shade, ((inward * 1.2, 7.36), (inward * 1.3, 7.6), (inward * 2.1, 7.64), (inward * 2.2, 7.44)))


def traffic_light(pen: Pen, x: float, z: float, y: float) -> None:
    board = pen.stand(x, z, y)
    dice = pen.dice
    pen.shadow((x - 0.08, x + 0.08), (z - 0.05, z + 0.05), 3.4, 0.8)
    pole = pen.ink(POLE, pen.looks.pick("metal"), z)
    board.box(pole, (-0.08, 0.08), (0.0, 2.4))
    heads = [(0.0, 2.3)]
    if dice.chance(0.5):
        inward = -1.0 if x > 0.0 else 1.0
        board.box(pole, (-0.08, 0.08), (2.4, 5.3))
        board.limb(pole, (0.0, 5.2), (inward * 3.6, 5.3), 0.13)
        heads.append((inward * 3.4, 4.7))
    lit = int(dice.unit() * 3.0)
    box = pen.ink(LIGHT, pen.looks.pick("lamp box"), z)
    colours = ((238.0, 52.0, 40.0), (250.0, 186.0, 44.0), (58.0, 218.0, 120.0))
    for right, up in heads:
        board.box(box, (right - 0.25, right + 0.25), (up, up + 1.30))
        for place, colour in enumerate(colours):
            bright = place == lit
            lamp = pen.ink(LIGHT, colour if bright else toned(colour, 0.34), z, Material.SMOOTH, Facing.GLOW)
            board.disc(lamp, right, up + 1.07 - 0.42 * place, 0.17)


SIGN_COLOURS: tuple[tuple[Colour, Colour], ...] = (
    ((214.0, 44.0, 46.0), (244.0, 242.0, 238.0)),
    ((40.0, 92.0, 186.0), (240.0, 242.0, 244.0)),
    ((248.0, 200.0, 48.0), (60.0, 56.0, 50.0)),
    ((242.0, 240.0, 234.0), (54.0, 54.0, 58.0)),
)  # fmt: skip


def traffic_sign(pen: Pen, x: float, z: float, y: float) -> None:
    board = pen.stand(x, z, y)
    dice = pen.dice
    pen.shadow((x - 0.05, x + 0.05), (z - 0.05, z + 0.05), 2.6, 0.8)
    board.box(pen.ink(POLE, pen.looks.pick("metal"), z), (-0.055, 0.055), (0.0, 2.5))
    rim, face = dice.pick(SIGN_COLOURS)
    rim_ink, face_ink = pen.ink(SIGN, rim, z), pen.ink(SIGN, face, z)
    kind = dice.pick(("round", "triangle", "square", "board"))
    if kind == "round":
        board.disc(rim_ink, 0.0, 2.45, 0.36)
        board.disc(face_ink, 0.0, 2.45, 0.26)
        board.box(rim_ink, (-0.16, 0.16), (2.40, 2.50))
    elif kind == "triangle":
        board.shape(rim_ink, ((-0.44, 2.12), (0.0, 2.88), (0.44, 2.12)))
        board.shape(face_ink, ((-0.27, 2.22), (0.0, 2.69), (0.27, 2.22)))
    elif kind == "square":
        board.shape(face_ink, ((-0.42, 2.45), (0.0, 2.87), (0.42, 2.45), (0.0, 2.03)))
        board.shape(rim_ink, ((-0.33, 2.45), (0.0, 2.78), (0.33, 2.45), (0.0, 2.12)))
    else:
        board.box(rim_ink, (-0.62, 0.62), (2.1, 2.8))
        board.box(face_ink, (-0.48, 0.3), (2.52, 2.62))
        board.box(face_ink, (-0.48, 0.1), (2.28, 2.38))


def post(pen: Pen, x: float, z: float, y: float) -> None:
    """A plain post: a bollard or a short rail end."""
    board = pen.stand(x, z, y)
    metal = pen.looks.pick("metal")
    board.box(pen.ink(POLE, metal, z), (-0.07, 0.07), (0.0, 1.0))
    board.box(pen.ink(POLE, toned(metal, 1.3), z), (-0.07, 0.07), (0.78, 0.88))


def bin_or_box(pen: Pen, x: float, z: float, y: float) -> None:
    """Street clutter that belongs to none of the 19 classes."""
    board = pen.stand(x, z, y)
    colour = pen.looks.pick("door")
    height = pen.dice.between((0.8, 1.2))
    pen.shadow((x - 0.3, x + 0.3), (z - 0.2, z + 0.2), height)
    board.box(pen.ink(IGNORE_INDEX, colour, z), (-0.3, 0.3), (0.0, height))
    board.box(pen.ink(IGNORE_INDEX, toned(colour, 1.25), z), (-0.34, 0.34), (height - 0.16, height))
