"""Street scenes: functions of their arguments, with sound labels and the gap between the domains as asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mfm_dist.scenes as scenes
from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.errors import ConfigError
from mfm_dist.rng import keyed_generator
from mfm_dist.scenes import DOMAINS, SPLITS, Gap, Scene, render_scene
from mfm_dist.scenes.dice import Dice
from mfm_dist.scenes.layout import STYLES, draw_view
from mfm_dist.scenes.light import draw_light
from mfm_dist.scenes.looks import Looks
from mfm_dist.scenes.pen import Pen
from mfm_dist.scenes.vehicles import CAR, car
from mfm_dist.scenes.view import SUPERSAMPLING, Canvas
from tests.helpers.classes import CLASSES
from tools.contact_sheet import main as draw_contact_sheet

FULL_GAP = Gap()
NO_GAP = Gap(photometric=False, texture=False, layout=False)
ROAD, SKY = CLASSES.names.index("road"), CLASSES.names.index("sky")


def render(domain: str, index: int, split: str = "train", gap: Gap = FULL_GAP, size: int = 128) -> Scene:
    return render_scene(seed=0, domain=domain, split=split, index=index, height=size, width=2 * size, gap=gap)


@pytest.fixture(scope="module")
def validation() -> dict[str, list[Scene]]:
    return {domain: [render(domain, index, "val") for index in range(100)] for domain in DOMAINS}


def test_shapes_types_and_labels(validation: dict[str, list[Scene]]) -> None:
    allowed = {*range(len(CLASSES.names)), IGNORE_INDEX}
    for scene in validation["game"] + validation["camera"]:
        assert scene.image.shape == (128, 256, 3)
        assert scene.label.shape == (128, 256)
        assert scene.image.dtype == scene.label.dtype == np.uint8
        assert set(np.unique(scene.label)) <= allowed


@pytest.mark.parametrize("size", [(97, 131), (64, 64), (33, 200)])
def test_any_size(size: tuple[int, int]) -> None:
    height, width = size
    scene = render_scene(seed=0, domain="camera", split="val", index=0, height=height, width=width)
    assert scene.image.shape == (height, width, 3)
    assert scene.label.shape == (height, width)


@pytest.mark.parametrize("domain", DOMAINS)
def test_pure_function_of_its_arguments(domain: str) -> None:
    first = render(domain, 5)
    render(domain, 6)
    again = render(domain, 5)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label, again.label)


def test_every_argument_gives_another_scene() -> None:
    labels = [render(domain, index, split).label for domain in DOMAINS for split in SPLITS for index in range(3)]
    labels.append(render_scene(seed=1, domain="game", split="train", index=0, height=128, width=256).label)
    for place, label in enumerate(labels):
        assert all((label != other).mean() > 0.05 for other in labels[:place])


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_class_in_a_validation_split(domain: str, validation: dict[str, list[Scene]]) -> None:
    scenes_with = np.zeros(len(CLASSES.names), dtype=int)
    for scene in validation[domain]:
        scenes_with += np.bincount(scene.label.ravel(), minlength=256)[: len(CLASSES.names)] >= 5
    rare = {name: int(count) for name, count in zip(CLASSES.names, scenes_with, strict=True) if count < 5}
    assert not rare


@pytest.mark.parametrize("domain", DOMAINS)
def test_few_pixels_are_unlabelled(domain: str, validation: dict[str, list[Scene]]) -> None:
    shares = [float((scene.label == IGNORE_INDEX).mean()) for scene in validation[domain]]
    assert max(shares) < 0.08
    assert np.mean(shares) < 0.03


@pytest.mark.parametrize("domain", DOMAINS)
def test_road_below_and_sky_above(domain: str, validation: dict[str, list[Scene]]) -> None:
    labels = np.stack([scene.label for scene in validation[domain]])
    road = (labels == ROAD).mean(axis=(0, 2))
    assert road[:40].max() == 0.0
    thirds = [float(road[start : start + 16].mean()) for start in (56, 76, 96)]
    assert thirds == sorted(thirds)
    assert not (labels[:, 64:] == SKY).any()
    assert (labels[:, :8] == SKY).mean() > 0.2


def test_nearer_cars_are_larger_and_lower() -> None:
    def pixels_and_lowest_row(distance: float) -> tuple[int, int]:
        dice = Dice(np.random.default_rng(0))
        looks = Looks.of_domain(Dice(np.random.default_rng(1)), "game")
        light = draw_light(Dice(np.random.default_rng(2)), "game")
        canvas = Canvas(128, 256)
        pen = Pen(canvas, draw_view(dice, STYLES["game"], 2.0), light, dice, looks)
        pen.ink(SKY, (0.0, 0.0, 0.0), 0.0)
        car(pen, 1.0, distance, "away")
        inks = canvas.ink_map()[1::SUPERSAMPLING, 1::SUPERSAMPLING]
        rows = np.nonzero((np.array(canvas.inks.label)[inks] == CAR).any(axis=1))[0]
        return int((np.array(canvas.inks.label)[inks] == CAR).sum()), int(rows.max())

    areas, rows = zip(*(pixels_and_lowest_row(distance) for distance in (6.0, 12.0, 24.0, 48.0)), strict=True)
    assert list(areas) == sorted(areas, reverse=True)
    assert list(rows) == sorted(rows, reverse=True)
    assert areas[0] > 8 * areas[2]


@pytest.mark.parametrize("domain", DOMAINS)
def test_same_scene_at_every_size(domain: str) -> None:
    for index in range(4):
        small, large = render(domain, index, size=128), render(domain, index, size=256)
        assert (small.label == large.label[1::2, 1::2]).mean() > 0.95
        reduced = np.asarray(Image.fromarray(large.image).reduce(2)).astype(float)
        assert abs(small.image.astype(float) - reduced).mean() < 12.0


def test_camera_without_gap_is_drawn_as_game_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_domain(seed: int, stream: int, index: int, sub_index: int) -> np.random.Generator:
        return keyed_generator(seed, stream, index, sub_index % 16)

    monkeypatch.setattr(scenes, "keyed_generator", without_domain)
    for index in range(3):
        game, camera = render("game", index), render("camera", index, gap=NO_GAP)
        assert np.array_equal(game.image, camera.image)
        assert np.array_equal(game.label, camera.label)
        assert np.array_equal(game.image, render("game", index, gap=NO_GAP).image)


def saturation(scene: Scene) -> float:
    picture = scene.image.astype(float)
    return float((picture.max(axis=2) - picture.min(axis=2)).mean())


def test_each_cause_of_the_gap_by_itself() -> None:
    indices = range(16)
    plain = [render("camera", index, gap=NO_GAP) for index in indices]
    photometric = [render("camera", index, gap=Gap(texture=False, layout=False)) for index in indices]
    texture = [render("camera", index, gap=Gap(photometric=False, layout=False)) for index in indices]
    layout = [render("camera", index, gap=Gap(photometric=False, texture=False)) for index in indices]

    for changed in (photometric, texture):
        assert all(np.array_equal(a.label, b.label) for a, b in zip(plain, changed, strict=True))
        assert all(abs(a.image.astype(float) - b.image).mean() > 8.0 for a, b in zip(plain, changed, strict=True))
    brightness = {name: np.std([scene.image.mean() for scene in group]) for name, group in
                  (("plain", plain), ("photometric", photometric))}  # fmt: skip
    assert brightness["photometric"] > 1.5 * brightness["plain"]
    assert np.mean([saturation(scene) for scene in texture]) < 0.75 * np.mean([saturation(scene) for scene in plain])
    assert all((a.label != b.label).mean() > 0.02 for a, b in zip(plain, layout, strict=True))


def test_layout_gap_moves_class_frequencies(validation: dict[str, list[Scene]]) -> None:
    cars = {domain: np.mean([(scene.label == CAR).mean() for scene in validation[domain]]) for domain in DOMAINS}
    assert cars["camera"] > 1.4 * cars["game"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"domain": "gaem"}, ("gaem", "game, camera", "did you mean 'game'")),
        ({"split": "test"}, ("split 'test'", "train, val")),
        ({"height": 16}, ("16 x 512", "32")),
    ],
)
def test_mistakes_are_named(arguments: dict[str, str | int], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        render_scene(**{"seed": 0, "domain": "game", "split": "train", "index": 0, **arguments})  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


def test_contact_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "sheet.png"
    draw_contact_sheet(["--output", str(output), "--game", "0", "1", "--camera", "2", "3"])
    sheet = np.asarray(Image.open(output))
    assert sheet.shape[2] == 3
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000
    assert "sheet.png" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        draw_contact_sheet(["--output", str(output), "--game", "0", "--camera", "2", "3"])
