"""Every shipped configuration builds, and every launch file says only what a launch file may say."""

from __future__ import annotations

import json
import re
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml

from mfm_dist.build import build_train_module, render_scenes
from mfm_dist.config.loader import changed_keys, load_config, to_tree
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.launch import Launch, combination_problems, launch_problems
from mfm_dist.distributed.launcher import launch_environment
from mfm_dist.shards.card import read_card
from tests.helpers.classes import CLASSES
from tests.helpers.runs import REPOSITORY

RUNS = sorted(
    path
    for path in (REPOSITORY / "configs").rglob("*.yaml")
    if path.parent.name not in ("accelerate", "deepspeed", "plans", "rebuilder")
)
LAUNCHES = sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(REPOSITORY / "configs")))
def test_run_builds_with_mfm(path: Path) -> None:
    config = load_config(path, ["mfm.enabled=true"])
    assert config.model.pretrained or config.model.weights, "adaptation from random weights fails, and silently"
    if config.model.weights is None or not (REPOSITORY / config.model.weights).is_file():  # what a user has to fetch
        config.model.pretrained, config.model.weights = False, None
    with torch.device("meta"):
        module = build_train_module(config, CLASSES)
    assert sum(p.numel() for p in module.student.parameters()) > 0
    assert module.rebuilder is not None


@pytest.mark.parametrize(
    ("name", "millions"),
    [("paper", (14.545, 10.246)), ("base", (60.6, 50.4)), ("large", (359, 341)), ("huge", (1034, 991))],
)
def test_a_preset_of_the_rebuilder_has_the_size_that_is_said(name: str, millions: tuple[float, float]) -> None:
    """Behind MiT-B5 with a decoder of four maps, and behind ResNet-101 with DeepLabV2, which reads one."""
    preset = REPOSITORY / "configs" / "rebuilder" / f"{name}.yaml"
    for path, expected in zip(("gta2cs/daformer.yaml", "gta2cs/dacs.yaml"), millions, strict=True):
        config = load_config([REPOSITORY / "configs" / path, preset], ["model.pretrained=false", "model.weights=null"])
        with torch.device("meta"):
            rebuilder = build_train_module(config, CLASSES).rebuilder
        assert rebuilder is not None
        assert sum(p.numel() for p in rebuilder.parameters()) / 1e6 == pytest.approx(expected, rel=2e-3)
    assert config.mfm.enabled
    assert config.rebuilder.variant == ("paper" if name == "paper" else "stable")


@pytest.mark.parametrize("encoder", ["mit_b5", "dinov2_large"])
@pytest.mark.parametrize(("size", "preset"), [("300m", "large"), ("1b", "huge")])
def test_a_large_run_has_the_rebuilder_of_its_preset(encoder: str, size: str, preset: str) -> None:
    config = load_config(REPOSITORY / "configs" / "large" / f"{encoder}_{size}.yaml")
    given = load_config([REPOSITORY / "configs" / "rebuilder" / f"{preset}.yaml"])
    assert replace(config.rebuilder, grid=given.rebuilder.grid) == given.rebuilder
    assert config.mfm.enabled
    assert config.memory.checkpoint_rebuilder
    assert config.world_problems(8) == []


def test_run_folders_differ() -> None:
    folders = [load_config(path).run.folder for path in RUNS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "lab").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_bed_of_the_lab_can_be_compared(path: Path) -> None:
    config = load_config(path)
    assert config.train.steps == 10 * config.eval.every, "the figure is of 80, 90 and 100 % of the steps"
    assert config.checkpoint.every == config.train.steps
    if path.stem != "quickstart":
        assert (config.data.classes, config.train.clip_norm) == ("cityscapes7", 0.0)
        assert (config.scenes.size, config.scenes.val) == ((128, 256), 100) if path.stem == "hrda" else ((96, 192), 200)


def test_the_quickstarts_bed_trains_as_its_configuration_does() -> None:
    bed, own = (load_config(REPOSITORY / "configs" / name) for name in ("lab/quickstart.yaml", "scenes/dacs.yaml"))
    changed = {line.split(":")[0] for line in changed_keys(to_tree(own), bed)}
    assert changed == {"data.root", "eval.every", "eval.overlays", "checkpoint.every", "log.every", "log.trackers"}


def test_the_aligned_bed_is_stride_8_without_the_layout_gap(tmp_path: Path) -> None:
    beds = [load_config(REPOSITORY / "configs" / "lab" / f"{name}.yaml") for name in ("stride8", "aligned")]
    told = [line.split(":")[0] for line in changed_keys(to_tree(beds[0]), beds[1])]
    assert told == ["data.root", "scenes.gap"]
    beds[1].data.root, beds[1].scenes.train, beds[1].scenes.val = tmp_path, 1, 1
    render_scenes(beds[1])
    recipe = json.loads((tmp_path / "camera_val" / "dataset.json").read_text())["recipe"]
    assert recipe["arguments"]["gap"] == {"photometric": True, "texture": True, "layout": False}


FOUNDATION = [path for path in RUNS if path.stem.startswith("dinov2_")]
PAPER = [path for path in RUNS if "2" in path.parent.name and path not in FOUNDATION]


def test_there_is_a_run_for_each_method_on_each_benchmark() -> None:
    methods = ["dacs", "daformer", "hrda", "mic"]
    folders = ["cs2acdc", "cs2dz", "gta2cs", "scenes", "syn2cs"]
    found = [(path.parent.name, path.stem) for path in RUNS if path.parent.name in folders and path not in FOUNDATION]
    assert found == [(folder, method) for folder in folders for method in methods]


def test_the_strong_source_is_drawn_by_size() -> None:
    """As published code that concatenates its sources and samples rare classes in each of them (VFM-UDA++)."""
    sources = load_config(REPOSITORY / "configs" / "strong2cs" / "mic.yaml").data.source
    assert isinstance(sources, dict)
    cards = {f"{name}/train": read_card(name) for name in ("gta", "synthia", "urbansyn")}
    assert sources == {name: card.splits[0].samples for name, card in cards.items()}


@pytest.mark.parametrize("path", PAPER, ids=lambda p: str(p.relative_to(REPOSITORY / "configs")))
def test_a_paper_run_has_its_data_packed_without_loss(path: Path) -> None:
    """Published code reads PNG."""
    packing = [line for line in path.read_text().splitlines() if "--input DIR" in line]
    assert len(packing) >= 2
    assert [line for line in packing if not line.endswith(" --format png")] == []


@pytest.mark.parametrize("path", FOUNDATION, ids=lambda p: p.stem)
def test_a_run_on_a_foundation_encoder_hides_blocks_of_patches(path: Path) -> None:
    """STABILITY: a grid of patches, and blocks of 4 to 8 of them; no feature distance, no HRDA."""
    config = load_config(path, ["mfm.enabled=true"])
    patch = config.model.backbone_options["patch_size"]
    assert tuple(cells * patch for cells in config.rebuilder.grid) == config.data.crop
    assert 4 <= config.mfm.mask_block_cells <= 8
    assert 0.6 <= config.mfm.mask_ratio <= 0.8
    assert (config.method.name, config.mic.base_method) == ("mic", "dacs")
    assert config.optim.layer_decay < 1 or config.model.freeze


SIZES = {
    # published boxes of source and target by benchmark: at 512, at full size (UDA_FACTS 7.3; None: as stored)
    "gta2cs": (((720, 1280), (512, 1024)), ((1440, 2560), None)),
    "syn2cs": ((None, (512, 1024)), ((1520, 2560), None)),
    "strong2cs": (None, ((1440, 2560), None)),
    "cs2acdc": (((512, 1024), (540, 960)), (None, None)),
    "cs2dz": (((512, 1024), (540, 960)), (None, None)),
}


@pytest.mark.parametrize("path", PAPER, ids=lambda p: str(p.relative_to(REPOSITORY / "configs")))
def test_paper_run_keeps_the_published_recipe(path: Path) -> None:
    config = load_config(path)
    large = path.stem in ("hrda", "mic")
    assert path.stem == config.method.name
    assert config.data.crop == ((1024, 1024) if large else (512, 512))
    assert (config.data.source_resize, config.data.target_resize) == SIZES[path.parent.name][large]
    to_cityscapes = path.parent.name.endswith("2cs")
    test_box = (512, 1024) if to_cityscapes else (540, 960)  # UDA_FACTS 7.3 and 8
    assert config.eval.resize == (None if large else test_box)
    assert config.two_resolutions == large
    assert config.data.rare_class_sampling.enabled == (path.stem != "dacs")
    assert config.self_training.ema_decay == (0.99 if path.stem == "dacs" else 0.999)
    assert config.data.target_margins == ((30, 240, 30, 30) if large and to_cityscapes else (0, 0, 0, 0))
    tells = config.self_training
    rows = (tells.pseudo_weight_ignore_top, tells.pseudo_weight_ignore_bottom)
    assert rows == ((15, 120) if path.stem == "daformer" else (0, 0))  # on ACDC and Dark Zurich, too: UDA_FACTS 2.5
    assert (config.mic.mode, config.mic.augment) == (
        ("separate", False) if path.stem == "mic" and not to_cityscapes else ("separatetrg", True)
    )
    rare = config.data.rare_class_sampling
    if rare.enabled:  # as many pixels of the crop as published, to a rounded per mille
        assert rare.min_pixels * rare.min_crop_ratio == pytest.approx(6000 if large else 1500, rel=1e-3)
    assert (len(config.eval.class_sets) == 2) == (path.parent.name == "syn2cs")


@pytest.mark.parametrize("path", PAPER, ids=lambda p: str(p.relative_to(REPOSITORY / "configs")))
def test_paper_run_keeps_the_published_network_and_schedule(path: Path) -> None:
    config, default = load_config(path), RunConfig()
    deeplab = path.stem == "dacs"
    assert (config.model.backbone, config.model.decoder) == (
        ("resnet101c", "deeplabv2") if deeplab else ("mit_b5", "daformer")
    )
    options = {"output_stride": 8, "out_indices": [1, 2, 3, 4]} if deeplab else {}
    assert (config.model.backbone_options, config.model.decoder_options) == (options, {})
    # All else is as the table of published defaults below has it.
    for section in ("optim", "train", "hrda", "daformer", "rebuilder", "recovery"):
        assert getattr(config, section) == getattr(default, section), section
    assert config.mfm == replace(default.mfm, view="fused" if config.two_resolutions else "context")
    changed = {"self_training": ["ema_decay", "pseudo_weight_ignore_top", "pseudo_weight_ignore_bottom"]}
    changed["mic"] = ["mode", "augment"]
    for section, keys in changed.items():
        ours = replace(getattr(config, section), **{key: getattr(getattr(default, section), key) for key in keys})
        assert ours == getattr(default, section), section
    assert config.data.scale_range == (1.0, 1.0)


PUBLISHED = {
    "self_training.ema_decay": 0.999,  # UDA_FACTS 2.1
    "self_training.pseudo_threshold": 0.968,  # UDA_FACTS 1
    "self_training.class_draw": "batch",  # UDA_FACTS 2.2
    "self_training.jitter_prob": 0.8,  # UDA_FACTS 2.3
    "self_training.jitter_strength": 0.2,  # UDA_FACTS 2.3
    "self_training.blur_prob": 0.5,  # UDA_FACTS 2.3
    "self_training.augment_form": "published",
    "daformer.feature_distance_weight": 0.005,  # UDA_FACTS 3.2
    "daformer.feature_distance_share": 0.75,  # UDA_FACTS 3.2
    "data.rare_class_sampling.temperature": 0.01,  # UDA_FACTS 3.1
    "data.rare_class_sampling.min_pixels": 3000,  # UDA_FACTS 3.1
    "data.rare_class_sampling.min_crop_ratio": 0.5,  # UDA_FACTS 3.1, at 512
    "data.crop": (512, 512),  # UDA_FACTS 7.3
    "data.scale_range": (1.0, 1.0),  # UDA_FACTS 7.3: no scale jitter
    "hrda.detail_loss_weight": 0.1,  # UDA_FACTS 5
    "hrda.attention": "segformer",  # UDA_FACTS 4.3
    "hrda.attention_options": {"width": 256},  # UDA_FACTS 4.3
    "mic.mode": "separatetrg",  # UDA_FACTS 6
    "mic.augment": True,  # UDA_FACTS 6
    "mic.mask_ratio": 0.7,  # UDA_FACTS 6
    "mic.mask_block_pixels": None,  # UDA_FACTS 6: 32 at 512, 64 at 1024
    "mic.loss_weight": 1.0,  # UDA_FACTS 6
    "mic.pseudo_threshold": None,  # UDA_FACTS 6: that of the step
    "model.backbone": "mit_b5",  # UDA_FACTS 4.1
    "model.decoder": "daformer",  # UDA_FACTS 4.3
    "optim.name": "adamw",  # UDA_FACTS 3.3, as all of this section but the Rebuilder's rate
    "optim.lr": 6e-5,
    "optim.decoder_lr_factor": 10.0,
    "optim.weight_decay": 0.01,
    "optim.betas": (0.9, 0.999),
    "optim.eps": 1e-8,
    "optim.warmup_steps": 1500,
    "optim.warmup_ratio": 1e-6,
    "optim.rebuilder_lr": 2e-4,  # MFM_PAPER, the Rebuilder
    "train.steps": 40_000,  # UDA_FACTS 3.3
    "train.micro_batch": 2,  # UDA_FACTS 3.3
    "train.global_batch": 2,  # UDA_FACTS 3.3
    "train.precision": "fp32",  # UDA_FACTS 1
    "train.clip_norm": 0.0,  # UDA_FACTS 1
    "eval.resize": None,
    "eval.every": 4000,  # UDA_FACTS 3.3
    "mfm.loss_weight": 1.0,  # MFM_PAPER, the task, as all of this section but the mask ratio
    "mfm.loss_on": "all",
    "mfm.ramp_from": 0,
    "mfm.ramp_to": 0,
    "mfm.reconstruction": "classes",
    "mfm.use_rebuilder": True,
    "mfm.domain": "target",
    "mfm.trained_parts": "both",
    "mfm.view": "context",  # what HRDA's rows have is inferred
    "mfm.mask_ratio": 0.4,  # MFM_PAPER, the Rebuilder, as all of the next section
    "rebuilder.depth": 2,
    "rebuilder.width": 512,
    "rebuilder.heads": 16,
    "rebuilder.mlp_ratio": 4.0,
    "rebuilder.grid": (16, 16),
}
"""The defaults that were published, by key, with where the number is from."""


@pytest.mark.parametrize("key", PUBLISHED)
def test_default_is_the_published_one(key: str) -> None:
    value: object = RunConfig()
    for part in key.split("."):
        value = getattr(value, part)
    assert value == PUBLISHED[key]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(REPOSITORY / "configs")))
def test_run_says_only_what_differs_from_the_defaults(path: Path) -> None:
    def repeated(tree: dict, default: object, prefix: str = "") -> list[str]:
        names = []
        for key, value in tree.items():
            there = getattr(default, key)
            if is_dataclass(there):
                names += repeated(value, there, f"{prefix}{key}.")
            elif prefix + key != "method.name" and value == there:  # a run may well name its method
                names.append(prefix + key)
        return names

    assert repeated(yaml.safe_load(path.read_text()), RunConfig()) == []


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda p: p.stem)
def test_launch_file_leaves_the_mathematics_to_the_run(path: Path) -> None:
    environment = launch_environment(path)
    assert launch_problems(environment) == []
    stage = re.search(r"zero(\d)", path.stem)
    assert Launch.from_environment(environment).zero_stage == (int(stage[1]) if stage else None)


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda p: p.stem)
def test_a_launch_file_says_whether_it_is_for_the_cpu(path: Path) -> None:
    assert Launch.from_environment(launch_environment(path)).use_cpu == path.stem.startswith("cpu_")


@pytest.mark.parametrize("path", [path for path in LAUNCHES if "hpz" in path.stem], ids=lambda p: p.stem)
def test_a_second_copy_is_cut_within_each_node(path: Path) -> None:
    launch = Launch.from_environment(launch_environment(path))
    assert launch.zero_settings["zero_hpz_partition_size"] == launch.local_world_size == 8
    assert launch.world_size > 8, "within one node it would be a copy for nothing"
    assert combination_problems(RunConfig(), launch) == []
