"""Sun, air, lens and sensor: from ink numbers to a photograph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from mfm_dist.scenes.dice import Dice, Range
from mfm_dist.scenes.looks import Colour
from mfm_dist.scenes.view import SUPERSAMPLING, Canvas, Facing, View

SKY = 10


@dataclass(frozen=True)
class Scene:
    """One picture and its truth.

    Attributes:
        image: RGB, uint8 [H, W, 3].
        label: train ids 0..18, 255 where unlabelled, uint8 [H, W].
    """

    image: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class Light:
    """How one scene is lit and taken.

    Attributes:
        shadow: (x, z) metres that a shadow falls per metre of height.
        shadow_strength: 0 no shadow to 1 black.
        facing: brightness of surfaces by ``Facing``.
        ambient: RGB gains of the light.
        haze: per metre; a surface at distance d keeps exp(-haze * d) of its colour.
        exposure: gain of the whole picture.
        gamma: exponent of the tone curve; above 1 darkens the middle.
        vignette: loss of brightness in the corners, as a share.
        blur: radius in image heights.
        noise: standard deviation of the sensor noise, of 255.
        clouds: number of clouds.
        cloud_strength: 0 unseen to 1 opaque.
    """

    shadow: tuple[float, float]
    shadow_strength: float
    facing: tuple[float, float, float, float, float]
    ambient: Colour
    haze: float
    exposure: float
    gamma: float
    vignette: float
    blur: float
    noise: float
    clouds: int
    cloud_strength: float


@dataclass(frozen=True)
class Weather:
    """What ``Light`` is drawn from: one kind of day."""

    sun: Range
    shadow_strength: Range
    contrast: Range
    warmth: Range
    tint: Range
    haze: Range
    exposure: Range
    gamma: Range
    vignette: Range
    blur: Range
    noise: Range
    clouds: Range
    cloud_strength: Range


NOON = Weather(
    sun=(0.15, 0.35), shadow_strength=(0.38, 0.42), contrast=(0.12, 0.16), warmth=(0.0, 0.0), tint=(0.0, 0.0),
    haze=(0.0010, 0.0014), exposure=(1.0, 1.03), gamma=(1.0, 1.0), vignette=(0.0, 0.0), blur=(0.0, 0.0),
    noise=(0.0, 0.0), clouds=(3.0, 7.0), cloud_strength=(0.85, 0.95),
)  # fmt: skip
SUNNY = Weather(
    sun=(0.5, 1.2), shadow_strength=(0.45, 0.60), contrast=(0.25, 0.38), warmth=(0.00, 0.10), tint=(-0.03, 0.03),
    haze=(0.002, 0.005), exposure=(1.10, 1.42), gamma=(0.90, 1.15), vignette=(0.08, 0.25), blur=(0.0008, 0.0020),
    noise=(2.0, 4.5), clouds=(4.0, 12.0), cloud_strength=(0.45, 0.85),
)  # fmt: skip
OVERCAST = Weather(
    sun=(0.0, 0.1), shadow_strength=(0.25, 0.40), contrast=(0.04, 0.10), warmth=(-0.08, 0.02), tint=(-0.02, 0.04),
    haze=(0.006, 0.014), exposure=(0.98, 1.25), gamma=(0.90, 1.15), vignette=(0.10, 0.30), blur=(0.0012, 0.0026),
    noise=(2.5, 5.5), clouds=(8.0, 16.0), cloud_strength=(0.15, 0.40),
)  # fmt: skip
LOW_SUN = Weather(
    sun=(1.4, 2.6), shadow_strength=(0.42, 0.58), contrast=(0.32, 0.45), warmth=(0.06, 0.18), tint=(-0.02, 0.03),
    haze=(0.006, 0.013), exposure=(1.00, 1.35), gamma=(0.95, 1.2), vignette=(0.15, 0.35), blur=(0.0010, 0.0024),
    noise=(3.0, 5.5), clouds=(4.0, 12.0), cloud_strength=(0.40, 0.75),
)  # fmt: skip
DUSK = Weather(
    sun=(0.0, 0.3), shadow_strength=(0.30, 0.45), contrast=(0.06, 0.14), warmth=(-0.20, -0.08), tint=(-0.02, 0.02),
    haze=(0.004, 0.009), exposure=(0.62, 0.80), gamma=(0.95, 1.15), vignette=(0.20, 0.40), blur=(0.0016, 0.0030),
    noise=(5.0, 8.0), clouds=(6.0, 12.0), cloud_strength=(0.20, 0.50),
)  # fmt: skip

DAYS: Mapping[str, tuple[Weather, ...]] = {
    "game": (NOON,),
    "camera": (SUNNY, SUNNY, SUNNY, OVERCAST, OVERCAST, OVERCAST, LOW_SUN, LOW_SUN, DUSK),
}


def draw_light(dice: Dice, domain: str) -> Light:
    return light_of(dice, dice.pick(DAYS[domain]))


def light_of(dice: Dice, day: Weather) -> Light:
    """One picture's light on a day of that kind."""
    sun = dice.between(day.sun)
    side = -1.0 if dice.chance(0.5) else 1.0
    contrast = dice.between(day.contrast)
    warmth, tint = dice.between(day.warmth), dice.between(day.tint)
    # The sun stands to the left where shadows fall to the right: surfaces that look left are bright then.
    left, right = (1.0, 1.0 - contrast) if side > 0 else (1.0 - contrast, 1.0)
    return Light(
        shadow=(side * sun, dice.between((-0.4, 0.3)) * sun),
        shadow_strength=dice.between(day.shadow_strength),
        facing=(1.0, 1.0 - contrast * dice.between((0.3, 0.7)), left, right, 1.0),
        ambient=(1.0 + warmth, 1.0 + 0.25 * warmth + tint, 1.0 - warmth),
        haze=dice.between(day.haze),
        exposure=dice.between(day.exposure),
        gamma=dice.between(day.gamma),
        vignette=dice.between(day.vignette),
        blur=dice.between(day.blur),
        noise=dice.between(day.noise),
        clouds=int(dice.between(day.clouds)),
        cloud_strength=dice.between(day.cloud_strength),
    )


def ink_colours(canvas: Canvas, light: Light, air: Colour) -> np.ndarray:
    """Lit and hazed colour of every ink, uint8 [inks, 4]; the fourth byte is padding."""
    inks = canvas.inks
    colour = np.array(inks.colour, dtype=np.float32)
    colour *= np.array(light.facing, dtype=np.float32)[inks.facing][:, None]
    kept = np.exp(-light.haze * np.array(inks.depth, dtype=np.float32))[:, None]
    colour = colour * kept + np.array(air, dtype=np.float32) * (1.0 - kept)
    packed = np.zeros((len(colour), 4), dtype=np.uint8)
    packed[:, :3] = colour.clip(0.0, 255.0)
    return packed


def picture_noise(generator: np.random.Generator, height: int, width: int, octaves: tuple[int, ...]) -> np.ndarray:
    """Noise in the picture plane, float32 [height, width]: a sum of grids of ``octaves`` cells a height.

    Each octave is enlarged to the next before it is added, so that only the last is enlarged to full size.
    """
    total = np.zeros((1, 2), dtype=np.float32)
    for cells in octaves:
        coarse = np.asarray(Image.fromarray(total).resize((2 * cells, cells), Image.Resampling.BICUBIC))
        total = coarse + generator.standard_normal((cells, 2 * cells), dtype=np.float32)
    total /= np.float32(len(octaves) ** 0.5)
    return np.asarray(Image.fromarray(total).resize((width, height), Image.Resampling.BICUBIC))


def ground_noise(generator: np.random.Generator, view: View, height: int, width: int) -> np.ndarray:
    """Noise that lies on the road and shrinks with distance, float32 [H, W]; 0 above the horizon."""
    side, texels = 256, 14.0  # texels a metre
    tile = np.zeros((1, 1), dtype=np.float32)
    for cells, strength in ((12, 0.6), (64, 0.5), (side, 0.5)):
        coarse = np.asarray(Image.fromarray(tile).resize((cells, cells), Image.Resampling.BILINEAR))
        tile = coarse + generator.standard_normal((cells, cells), dtype=np.float32) * np.float32(strength)
    v = (np.arange(height, dtype=np.float32) + 0.5) / height
    first = int(np.searchsorted(v, view.horizon + 0.01))
    depth = view.focal * view.height / (v[first:] - view.horizon)
    u = (np.arange(width, dtype=np.float32) + 0.5) / height - view.centre
    # The tile is laid out mirrored, back and forth, so that no seam shows.
    columns = (depth[:, None] * (u * np.float32(texels / view.focal)) + 8192.0).astype(np.int32) & (2 * side - 1)
    columns = np.minimum(columns, 2 * side - 1 - columns)
    rows = (depth * texels * 0.6).astype(np.int32) & (2 * side - 1)
    rows = np.minimum(rows, 2 * side - 1 - rows)
    field = np.zeros((height, width), dtype=np.float32)
    # Far away one pixel spans many texels, whose mean is grey.
    field[first:] = tile.take(columns + rows[:, None] * side) * np.minimum(1.0, 12.0 / depth)[:, None]
    return field


def develop(
    canvas: Canvas, view: View, light: Light, *, air: Colour, cloud: Colour, textures: np.ndarray,
    texture_generator: np.random.Generator, sensor_generator: np.random.Generator,
) -> Scene:  # fmt: skip
    """The finished picture and its label.

    Args:
        textures: strengths of the surface noise, one row for each ``Material``; columns as in ``TEXTURES``.
    """
    height, width = canvas.height, canvas.width
    buffer = canvas.ink_map()
    packed = ink_colours(canvas, light, air).view(np.uint32)[:, 0].take(buffer)
    fine = Image.frombuffer("RGBX", (packed.shape[1], packed.shape[0]), packed, "raw", "RGBX", 0, 1)
    rgb = np.asarray(fine.reduce(SUPERSAMPLING))[:, :, :3].astype(np.float32)
    inks = buffer[1::SUPERSAMPLING, 1::SUPERSAMPLING].astype(np.intp)
    label = np.array(canvas.inks.label, dtype=np.uint8).take(inks)

    veil = canvas.veil().filter(ImageFilter.BoxBlur(height / 200.0)).resize((width, height), Image.Resampling.BILINEAR)
    cover = np.asarray(veil).astype(np.float32) / 255.0
    top = int(view.horizon * height)
    share = (cover[:top] * (label[:top] == SKY))[:, :, None]
    rgb[:top] += (np.array(cloud, dtype=np.float32) - rgb[:top]) * share

    # Shadows lie on what looks up, which among the inks means the ground.
    looks_up = (np.array(canvas.inks.facing) == Facing.UP).astype(np.float32) * np.float32(light.shadow_strength)
    gain = 1.0 - cover * looks_up.take(inks)
    gain *= _texture(canvas, view, inks, textures, texture_generator)
    if light.vignette > 0.0:
        across = np.linspace(-1.0, 1.0, width, dtype=np.float32) ** 2
        down = np.linspace(-1.0, 1.0, height, dtype=np.float32) ** 2
        gain *= 1.0 - np.float32(light.vignette * 0.5) * (down[:, None] + across[None, :])
    rgb *= gain[:, :, None]
    picture = Image.fromarray(rgb.clip(0.0, 255.0).astype(np.uint8))
    return Scene(image=expose(picture, light, sensor_generator), label=label)


def _texture(
    canvas: Canvas, view: View, inks: np.ndarray, textures: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Brightness of the materials around 1, float32 [H, W]."""
    height, width = inks.shape
    ground, broad, fine = textures[canvas.inks.material].T.copy()
    texture = ground.take(inks) * ground_noise(generator, view, height, width)
    texture += broad.take(inks) * picture_noise(generator, height, width, (4, 12, 32))
    texture += fine.take(inks) * picture_noise(generator, height, width, (64, 128))
    texture += 1.0
    return texture


def expose(picture: Image.Image, light: Light, generator: np.random.Generator) -> np.ndarray:
    """White balance, exposure, tone curve, blur and sensor noise: mode RGB to uint8 [H, W, 3]."""
    width, height = picture.size
    levels = np.arange(256) / 255.0
    gains = np.array(light.ambient) * light.exposure
    curves = 255.0 * (gains[:, None] * levels).clip(0.0, 1.0) ** light.gamma
    picture = picture.point(curves.round().astype(int).ravel().tolist())
    if light.blur > 0.0:
        picture = picture.filter(ImageFilter.BoxBlur(light.blur * height))
    if light.noise > 0.0:
        shifts = (6, 3, 0)
        grain = generator.standard_normal((height, width + shifts[0]), dtype=np.float32) * np.float32(light.noise)
        levels_of_grain = (grain + 128.0).astype(np.uint8)
        # The three colours see the same grain a few pixels apart: noise in colour for the price of one draw.
        noise = np.stack([levels_of_grain[:, shift : shift + width] for shift in shifts], axis=2)
        picture = ImageChops.add(picture, Image.fromarray(noise), offset=-128)
    return np.array(picture)
