"""Procedural street scenes in the 19 Cityscapes classes: a data set that needs no download.

Two domains hold the same classes. ``game`` looks like a renderer at noon: flat, clean and saturated. ``camera`` looks
like a photograph: worn materials, weather, haze, lens and sensor, and other streets. ``Gap`` switches each cause of
the difference by itself.

    scene = render_scene(seed=0, domain="camera", split="train", index=7)
    scene.image, scene.label    # uint8 [256, 512, 3], uint8 [256, 512]

``render_object`` draws pictures of single objects, on which an encoder is pre-trained before it sees a street.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

import numpy as np

from mfm_dist.errors import ConfigError
from mfm_dist.rng import Stream, keyed_generator
from mfm_dist.scenes.choices import SPLITS, check_choice
from mfm_dist.scenes.dice import Dice
from mfm_dist.scenes.ground import draw_backdrop, draw_ground, draw_hood, draw_sky
from mfm_dist.scenes.layout import STYLES, draw_street, draw_view, things_of
from mfm_dist.scenes.light import Scene, develop, draw_light
from mfm_dist.scenes.looks import TEXTURES, Looks
from mfm_dist.scenes.objects import OBJECT_KINDS, ObjectPicture, render_object
from mfm_dist.scenes.pen import Pen
from mfm_dist.scenes.view import Canvas

__all__ = [
    "DOMAINS", "GENERATOR_VERSION", "OBJECT_KINDS", "SPLITS", "Gap", "ObjectPicture", "Scene", "render_object",
    "render_scene",
]  # fmt: skip

DOMAINS = ("game", "camera")

GENERATOR_VERSION = 1
"""Raised whenever any picture or label changes; shards record it."""

_LAYOUT, _LOOKS, _LIGHT, _CLOUDS, _TEXTURE, _SENSOR = range(6)
"""What a draw is for. Each has numbers of its own, so that switching one cause off leaves the others as they were."""


@dataclass(frozen=True)
class Gap:
    """Which causes of the difference between the domains are on. All off: ``camera`` is drawn as ``game`` is.

    Attributes:
        photometric: light, haze, exposure, white balance, vignette, blur and sensor noise.
        texture: palettes and surface noise.
        layout: camera position, width of roads and pavements, buildings, density of traffic and people, ego hood.
    """

    photometric: bool = True
    texture: bool = True
    layout: bool = True

    @classmethod
    def of(cls, causes: Collection[str]) -> Gap:
        """Make the gap that has these causes and no other."""
        return cls(**{cause.name: cause.name in causes for cause in fields(cls)})


def render_scene(
    *, seed: int, domain: str, split: str, index: int, height: int = 256, width: int = 512, gap: Gap = Gap()
) -> Scene:
    """One scene: a pure function of its arguments, the same street at every size of equal proportions.

    Args:
        seed: of the whole data set.
        domain: one of ``DOMAINS``.
        split: one of ``SPLITS``; the splits share no draws.
        index: 0, 1, 2, … without end.
        height, width: of the picture, pixels.
        gap: which causes of the domain gap are on; without effect on ``game``.

    Raises:
        ConfigError: unknown domain or split, or a size below 32 pixels.
    """
    check_choice("domain", domain, DOMAINS)
    check_choice("split", split, SPLITS)
    if height < 32 or width < 32:
        raise ConfigError(f"scenes are at least 32 pixels high and wide, not {height} x {width}")
    place = DOMAINS.index(domain) * len(SPLITS) + SPLITS.index(split)

    def generator(purpose: int) -> np.random.Generator:
        return keyed_generator(seed, Stream.SCENE, index, place * 16 + purpose)

    def source(is_on: bool) -> str:
        return domain if is_on else "game"

    aspect = width / height
    layout_dice, looks = Dice(generator(_LAYOUT)), Looks.of_domain(Dice(generator(_LOOKS)), source(gap.texture))
    light = draw_light(Dice(generator(_LIGHT)), source(gap.photometric))
    style = STYLES[source(gap.layout)]
    view = draw_view(layout_dice, style, aspect)
    street = draw_street(layout_dice, style)
    canvas = Canvas(height, width)
    pen = Pen(canvas, view, light, layout_dice, looks)

    zenith, air, cloud = looks.pick("zenith"), looks.pick("haze"), looks.pick("cloud")
    draw_sky(pen, Dice(generator(_CLOUDS)), aspect, zenith, air)
    draw_backdrop(pen)
    draw_ground(pen, street)
    for _, draw in things_of(pen, style, street):
        draw()
    if layout_dice.chance(style.hood):
        draw_hood(pen, aspect, layout_dice.between((0.035, 0.07)))

    return develop(
        canvas, view, light, air=air, cloud=cloud, textures=TEXTURES[source(gap.texture)],
        texture_generator=generator(_TEXTURE), sensor_generator=generator(_SENSOR),
    )  # fmt: skip
