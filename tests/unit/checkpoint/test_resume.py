"""What may differ between a checkpoint and the run that goes on from it, and what may not."""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

from mfm_dist.checkpoint.files import Checkpoint
from mfm_dist.checkpoint.progress import Progress
from mfm_dist.checkpoint.resume import IMMUTABLE_KEYS, resume_problems
from mfm_dist.config.class_files import load_class_set
from mfm_dist.config.loader import changed_keys, to_tree
from mfm_dist.config.schema import LoRASection, RunConfig
from mfm_dist.data.manifest import Manifest, Recipe
from mfm_dist.data.shard_records import ShardRecord, ShardRecords
from tests.helpers.classes import CLASSES

OTHER = {
    "seed": 1,
    "method.name": "daformer",
    "mfm.use_rebuilder": False,
    "mfm.reconstruction": "pixels",
    "mic.base_method": "dacs",
    "hrda.attention": "daformer",
    "hrda.attention_options": {"width": 64},
    "mfm.enabled": False,
    "optim.name": "sgd",
    "train.micro_batch": 1,
    "model.backbone": "resnet50c",
    "model.backbone_options": {"output_stride": 8},
    "model.freeze": True,
    "model.lora": LoRASection(rank=4),
    "model.decoder": "deeplabv2",
    "model.decoder_options": {"width": 64},
    "rebuilder.depth": 3,
    "rebuilder.width": 256,
    "rebuilder.heads": 8,
    "rebuilder.mlp_ratio": 2.0,
    "rebuilder.grid": (8, 8),
    "rebuilder.qk_norm": True,
    "rebuilder.peri_norm": True,
    "rebuilder.depth_scaling": True,
    "rebuilder.readout": 2,
}
"""Another value of each setting that must stay."""
FREE = {
    "run.folder": Path("elsewhere"),
    "data.root": Path("/moved"),
    "data.target": "renamed",
    "data.crop": (256, 256),
    "data.workers": 7,
    "model.weights": Path("gone.safetensors"),
    "mfm.loss_weight": 0.0,
    "optim.lr": 1e-3,
    "train.global_batch": 8,
    "train.steps": 80_000,
    "train.precision": "bf16",
    "checkpoint.background": False,
}
"""Settings of which some would like to change one in the middle of a run."""


def set_key(config: RunConfig, key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    owner = getattr(config, section) if section else config
    assert hasattr(owner, name), key
    setattr(owner, name, value)


def trained(config: RunConfig, **data: str) -> Checkpoint:
    return Checkpoint(
        Path("run/checkpoints/step_00000200"), Progress(step=200), to_tree(config), data, CLASSES, world_size=1
    )


@pytest.fixture
def config() -> RunConfig:
    config = RunConfig()
    config.mfm.enabled = True
    config.method.name = "mic"  # on HRDA
    return config


def test_the_rule_names_settings_that_exist_and_the_table_here_has_all() -> None:
    assert OTHER.keys() == IMMUTABLE_KEYS.keys()
    assert not OTHER.keys() & FREE.keys()


@pytest.mark.parametrize("key", OTHER)
def test_what_must_stay_is_refused_with_both_values_and_the_way_out(key: str, config: RunConfig) -> None:
    checkpoint = trained(config)
    set_key(config, key, OTHER[key])
    (problem,) = resume_problems(checkpoint, config, {}, CLASSES)
    before: Any = checkpoint.config
    for name in key.split("."):
        before = before[name]
    other: Any = OTHER[key]
    now = list(other) if isinstance(other, tuple) else to_tree(other) if is_dataclass(other) else other
    assert problem.startswith(f"{key}={now}, but ")
    assert problem.endswith(f": keep {before}, or choose another run.folder")
    assert str(checkpoint.path) in problem


@pytest.mark.parametrize("key", FREE)
def test_everything_else_may_change_and_is_listed(key: str, config: RunConfig) -> None:
    checkpoint = trained(config)
    set_key(config, key, FREE[key])
    assert resume_problems(checkpoint, config, {}, CLASSES) == []
    assert [line.split(":")[0] for line in changed_keys(checkpoint.config, config)] == [key][key == "run.folder" :]


def test_the_same_settings_are_no_problem_after_a_trip_through_json(config: RunConfig) -> None:
    config.model.backbone_options = {"out_indices": [1, 2], "drop_path_rate": 0.1}
    stored = json.loads(json.dumps(to_tree(config)))
    checkpoint = Checkpoint(Path("step_00000200"), Progress(step=200), stored, {}, CLASSES, world_size=1)
    assert resume_problems(checkpoint, config, {}, CLASSES) == []


def test_a_rebuilder_that_is_not_used_may_be_anything(config: RunConfig) -> None:
    config.mfm.enabled = False
    checkpoint = trained(config)
    config.rebuilder.width = 64
    assert resume_problems(checkpoint, config, {}, CLASSES) == []


def test_a_rebuilder_that_is_left_out_may_be_anything_but_its_grid_masks(config: RunConfig) -> None:
    config.mfm.enabled, config.mfm.use_rebuilder = True, False
    checkpoint = trained(config)
    config.rebuilder.width = 64
    assert resume_problems(checkpoint, config, {}, CLASSES) == []
    config.rebuilder.grid = (2, 2)
    assert [problem.split("=")[0] for problem in resume_problems(checkpoint, config, {}, CLASSES)] == ["rebuilder.grid"]


def test_all_problems_are_told_at_once(config: RunConfig) -> None:
    checkpoint = trained(config, target="aaa")
    config.seed, config.optim.name, config.train.steps = 5, "sgd", 199
    problems = resume_problems(checkpoint, config, {"target": "bbb"}, CLASSES)
    assert [problem.split("=")[0] for problem in problems if "=" in problem] == ["seed", "optim.name", "train.steps"]
    assert "the target shards are not those that run/checkpoints/step_00000200 was trained on" in problems[2]
    assert len(problems) == 4


def test_data_is_known_by_content_not_by_name(config: RunConfig) -> None:
    checkpoint = trained(config, labelled="aaa", target="bbb")
    assert resume_problems(checkpoint, config, {"labelled": "aaa", "target": "bbb"}, CLASSES) == []
    (problem,) = resume_problems(checkpoint, config, {"labelled": "ccc", "target": "bbb"}, CLASSES)
    assert problem.startswith("the labelled shards are not those")
    assert "put the former shards back, or choose another run.folder" in problem
    assert resume_problems(trained(config), config, {"labelled": "c"}, CLASSES) == []  # before data was recorded


def test_labelled_target_images_may_come_and_go_but_not_change(config: RunConfig) -> None:
    with_some, without = trained(config, labelled="aaa", target_labelled="bbb"), trained(config, labelled="aaa")
    (problem,) = resume_problems(with_some, config, {"labelled": "aaa", "target_labelled": "ccc"}, CLASSES)
    assert problem.startswith("the labelled target shards are not those")
    assert resume_problems(with_some, config, {"labelled": "aaa"}, CLASSES) == []
    assert resume_problems(without, config, {"labelled": "aaa", "target_labelled": "bbb"}, CLASSES) == []


def test_a_run_keeps_its_classes_and_what_it_made_of_its_labels(config: RunConfig) -> None:
    checkpoint = trained(config, labelled="aaa", relabelling="of one file")
    (problem,) = resume_problems(checkpoint, config, {"labelled": "aaa", "relabelling": "of another"}, CLASSES)
    assert "data.classes makes other classes" in problem
    (problem,) = resume_problems(checkpoint, config, {"labelled": "aaa"}, load_class_set("synthia13"))
    assert "    19: road" in problem
    assert "    13: road" in problem


def test_a_fingerprint_follows_the_shards_and_their_order_and_nothing_else() -> None:
    def manifest(name: str, *sums: str) -> Manifest:
        shards = [
            ShardRecord(
                file=f"{s}.tar", samples=1, bytes=9, sha256=64 * s, index_sha256=64 * s, image_sizes={}, pixel_counts={}
            )
            for s in sums
        ]
        recipe = Recipe(generator="folder", version=1, arguments={"name": name})
        return Manifest(name=name, classes=None, recipe=recipe, command=name, shards=ShardRecords(shards))

    prints = [m.fingerprint for m in (manifest("a", "1", "2"), manifest("b", "1", "2"))]
    assert prints[0] == prints[1]
    others = [manifest("a", "2", "1"), manifest("a", "1"), manifest("a", "1", "3")]
    assert len({prints[0], *(m.fingerprint for m in others)}) == 4
