"""The embedded scenes as shards: a folder for each domain and split."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfm_dist.classes import ClassSet, Relabelling
from mfm_dist.config.class_files import DEFAULT, load_class_set, shipped_class_sets
from mfm_dist.data.manifest import Recipe, class_arguments
from mfm_dist.errors import ConfigError
from mfm_dist.scenes import DOMAINS, GENERATOR_VERSION, SPLITS, Gap, render_scene
from mfm_dist.shards.packing import PackableSet, Report, pack

if TYPE_CHECKING:  # imported where needed, because it loads torch
    from mfm_dist.shards.writer import RawSample

ALL_CAUSES = tuple(asdict(Gap()))
SCENE_SETS = tuple(f"{domain}_{split}" for domain, split in product(DOMAINS, SPLITS))
"""Folders that can be written."""
BYTES_PER_PIXEL = 1.0
"""Room asked for before packing; scenes take about half of it."""


@dataclass(frozen=True, kw_only=True)
class SceneSplit(PackableSet):
    """One folder of scenes."""

    domain: str
    split: str
    height: int
    width: int
    seed: int
    gap: Gap
    relabelling: Relabelling | None
    """From the classes that scenes are drawn in; None where they stay."""

    def bytes_per_sample(self) -> int:
        return int(self.height * self.width * BYTES_PER_PIXEL)

    def sample(self, number: int) -> RawSample:
        from mfm_dist.shards.writer import RawSample

        scene = render_scene(
            seed=self.seed,
            domain=self.domain,
            split=self.split,
            index=number,
            height=self.height,
            width=self.width,
            gap=self.gap,
        )
        label = scene.label if self.relabelling is None else self.relabelling.apply(scene.label)
        origin = {"domain": self.domain, "split": self.split, "index": number, "seed": self.seed}
        return RawSample(key=f"{self.folder.name}_{number:06d}", image=scene.image, label=label, meta=origin)


def write_scenes(
    output: Path,
    *,
    train: int,
    val: int,
    size: tuple[int, int],
    seed: int,
    report: Report,
    gap: Collection[str] = ALL_CAUSES,
    classes: str = DEFAULT,
    shard_size: int = 100,
    workers: int | None = None,
    overwrite: bool = False,
    only: Collection[str] = SCENE_SETS,
) -> None:
    """Write ``game_train``, ``game_val``, ``camera_train`` and ``camera_val`` below ``output``, or what is missing.

    Args:
        train, val: images of each ``*_train`` and of each ``*_val``.
        size: height and width in pixels.
        gap: causes of the difference between the domains, of ``ALL_CAUSES``.
        classes: name or file of the class set; scenes are drawn in those of ``DEFAULT`` and mapped by name.
        shard_size, workers: images a shard; processes, None is one a core.
        overwrite: replace folders that hold other shards.
        only: folders to write, of ``SCENE_SETS``.

    Raises:
        ConfigError, StorageError: as ``pack`` does.
    """
    causes, chosen = Gap.of(gap), load_class_set(classes)
    relabelling = _from_drawn(chosen, classes)
    named = ",".join(cause for cause in ALL_CAUSES if cause in gap) or "none"
    command = (
        f"mfm-shards make scenes --train {train} --val {val} --height {size[0]} --width {size[1]} "
        f"--seed {seed} --shard-size {shard_size} --gap {named}"
    )
    if classes != DEFAULT:
        file = classes if classes in shipped_class_sets() else str(Path(classes).absolute())
        command += f" --classes {shlex.quote(file)}"
    sets = []
    for domain, split in (name.split("_") for name in SCENE_SETS if name in only):
        arguments: dict[str, Any] = {
            "domain": domain,
            "split": split,
            "samples": {"train": train, "val": val}[split],
            "shard_size": shard_size,
            "height": size[0],
            "width": size[1],
            "seed": seed,
        }
        full = {**arguments, "gap": asdict(causes), **class_arguments(chosen)}
        recipe = Recipe(generator="scenes", version=GENERATOR_VERSION, arguments=full)
        folder = output / f"{domain}_{split}"
        sets.append(
            SceneSplit(
                folder=folder,
                recipe=recipe,
                command=command,
                classes=chosen,
                relabelling=relabelling,
                gap=causes,
                **arguments,
            )
        )
    pack(sets, output=output, workers=workers, overwrite=overwrite, report=report)


def _from_drawn(chosen: ClassSet, name: str) -> Relabelling | None:
    """Map the classes that scenes are drawn in to others. Raises ConfigError: they have nothing in common."""
    drawn = load_class_set(DEFAULT)
    relabelling = chosen.relabelling(drawn)
    if relabelling is not None and not relabelling.matches:
        raise ConfigError(f"--classes {name}: none of them is a class of the scenes, or merges one, {drawn}")
    return relabelling
