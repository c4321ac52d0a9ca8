"""Pictures of single objects: functions of their arguments, every kind drawn, varied and fast."""

from __future__ import annotations

import time

import numpy as np
import pytest

import mfm_dist.scenes as scenes
import mfm_dist.scenes.objects as objects
from mfm_dist.errors import ConfigError
from mfm_dist.rng import keyed_generator
from mfm_dist.scenes import DOMAINS, OBJECT_KINDS, SPLITS, ObjectPicture, render_object, render_scene
from mfm_dist.scenes.dice import Dice
from mfm_dist.scenes.pen import Pen
from tests.helpers.classes import CLASSES

KINDS = len(OBJECT_KINDS)


def render(index: int, split: str = "train", seed: int = 0, size: tuple[int, int] = (64, 64)) -> ObjectPicture:
    return render_object(seed=seed, split=split, index=index, size=size)


@pytest.fixture(scope="module")
def pictures() -> list[ObjectPicture]:
    return [render(index) for index in range(6 * KINDS)]


def test_pure_function_of_its_arguments() -> None:
    first = render(5)
    render(6)
    again = render(5)
    assert first.kind == again.kind
    assert np.array_equal(first.image, again.image)


def test_every_argument_gives_another_picture() -> None:
    # The same kind each time, so that what differs is the draw.
    images = [render(3 + KINDS * turn, split, seed).image for turn in range(3) for split in SPLITS for seed in (0, 1)]
    for place, image in enumerate(images):
        assert all(abs(image.astype(float) - other).mean() > 5.0 for other in images[:place])


def test_shares_no_draws_with_the_streets(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, set[tuple[int, ...]]] = {"objects": set(), "streets": set()}
    for name, module in (("objects", objects), ("streets", scenes)):

        def noted(*key: int, name: str = name) -> np.random.Generator:
            keys[name].add(key)
            return keyed_generator(*key)

        monkeypatch.setattr(module, "keyed_generator", noted)
    for split in SPLITS:
        render(7, split)
        for domain in DOMAINS:
            render_scene(seed=0, domain=domain, split=split, index=7, height=64, width=64)
    assert len(keys["objects"]) == 6 * len(SPLITS)
    assert keys["streets"]
    assert not keys["objects"] & keys["streets"]


def test_kinds_take_turns(pictures: list[ObjectPicture]) -> None:
    assert len(set(OBJECT_KINDS)) == KINDS >= 20
    assert (np.bincount([picture.kind for picture in pictures], minlength=KINDS) == 6).all()


def test_the_street_classes_are_among_the_kinds() -> None:
    other_names = {"pole": "lamp post", "sidewalk": "pavement", "vegetation": "tree", "terrain": "grass"}
    assert {other_names.get(name, name) for name in CLASSES.names} <= set(OBJECT_KINDS)


@pytest.mark.parametrize("kind", range(KINDS), ids=OBJECT_KINDS)
def test_every_kind_is_drawn(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same picture without its object: much of the middle changes, whatever the kind."""
    indices = [kind + KINDS * turn for turn in range(6)]
    full = [render(index).image.astype(float) for index in indices]
    build = objects.KINDS[OBJECT_KINDS[kind]]

    def empty(dice: Dice, aspect: float) -> objects.Shot:
        def draw_nothing(pen: Pen) -> None:
            pass

        return objects.Shot(build(dice, aspect).view, draw_nothing)

    monkeypatch.setattr(objects, "KINDS", {OBJECT_KINDS[kind]: empty})
    bare = [render(index).image.astype(float) for index in indices]
    changed = [(abs(a - b).max(axis=2) > 8.0)[8:56, 8:56].mean() for a, b in zip(full, bare, strict=True)]
    assert np.median(changed) > 0.1


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (131, 97), (32, 32)])
def test_any_size(size: tuple[int, int]) -> None:
    for index in range(KINDS):
        image = render(index, size=size).image
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8


def mean_colours(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([image.mean(axis=(0, 1)) for image in images])


def test_more_varied_than_both_streets(pictures: list[ObjectPicture]) -> None:
    ours = mean_colours([picture.image for picture in pictures])
    for domain in DOMAINS:
        streets = [
            render_scene(seed=0, domain=domain, split="train", index=index, height=64, width=128).image
            for index in range(40)
        ]
        theirs = mean_colours(streets)
        assert (ours.std(axis=0) > 1.3 * theirs.std(axis=0)).all()
        hues, their_hues = (means - means.mean(axis=1, keepdims=True) for means in (ours, theirs))
        assert hues.std() > 1.5 * their_hues.std()
    contrasts = [picture.image.std() for picture in pictures]
    assert min(contrasts) > 8.0


def test_fast() -> None:
    """About a third of what one core reached when this was written, in processor time: a busy machine passes."""
    render(0, size=(96, 96))
    start = time.process_time()
    for index in range(3 * KINDS):
        render(index, size=(96, 96))
    assert 3 * KINDS / (time.process_time() - start) > 60.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"split": "vall"}, ("vall", "train, val", "did you mean 'val'")), ({"size": (16, 96)}, ("16 x 96", "32"))],
)
def test_mistakes_are_named(arguments: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        render_object(**{"seed": 0, "split": "train", "index": 0, **arguments})  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)
