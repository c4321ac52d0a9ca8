"""What ``--check`` finds without training: networks that cannot be built, or cannot take a crop."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mfm_dist.build import build_train_module, open_readers
from mfm_dist.config.loader import load_config
from mfm_dist.data.concatenated import ConcatenatedReader
from mfm_dist.errors import ConfigError, UserError
from mfm_dist.train import check
from tests.helpers.classes import CLASSES
from tests.helpers.runs import REPOSITORY
from tests.helpers.shards import ShardFolder

SMALL = ["model.backbone=mit_b0", "data.crop=64x64", "rebuilder.grid=4", "mfm.enabled=true", "data.render_scenes=true"]

DINO14 = "{pyramid: true, dynamic_img_size: true, depth: 1}"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.backbone_options={drop_path_rate: 5}"], "drop_path_rate=5: must be at least 0 and below 1"),
        (["model.backbone_options={in_chans: 4}"], "may not set in_chans: images are RGB"),
        (["model.backbone_options={out_indices: []}"], "at least one, in rising order"),
        (["model.backbone_options={out_indices: [3, 1]}"], "in rising order"),
        (["model.backbone_options={out_indices: [-1]}"], "from 0 on"),
        (["model.backbone=vit_tiny_patch16_224", "model.backbone_options={pyramid: true}"], "cannot take crops of"),
        (["model.backbone=vit_small_patch14_dinov2"], "of 14, as 70x70 is; or resample patches of 14 by"),
        (["model.freeze=true", "model.lora.rank=2"], "encoder is called attn.qkv; their names end in attn.q, attn.kv"),
        ([f"model.backbone_options={DINO14}", "model.backbone=vit_small_patch14_dinov2", "method.name=hrda",
          "data.crop=112x112"], "a whole number of pixels, this one has 3.5"),
        (["model.backbone_options={depths: [100000, 2, 2, 2]}"], "more than 20,000 layers"),
        (["model.decoder_options={width: 100000000}"], "at most 65,536"),
        (["rebuilder.width=65536", "rebuilder.depth=1000"], "rebuilder.width, depth, mlp_ratio and grid: a network of"),
    ],
)  # fmt: skip
def test_networks_that_would_fail_later_are_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(load_config(None, [*SMALL, *overrides]))
    assert reason in str(caught.value)


PAGE = (REPOSITORY / "docs" / "methods.md").read_text().replace("model.backbone=vit_large", "model.backbone=vit_small")
ENCODERS = [list(found) for found in re.findall(r"(model\.backbone=\w+) (model\.backbone_options=\{[^}]*\})", PAGE)]


def test_the_documentation_has_encoders_to_try() -> None:
    assert len(ENCODERS) == 2


def test_everything_is_told_at_once_and_weights_that_cannot_be_fetched_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No request leaves the machine: the hub is a port that nobody listens at, and nothing is in its cache."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    words = ["model.pretrained=true", "model.backbone=resnet18", "model.decoder=segformer", "data.root=nowhere"]
    with pytest.raises(ConfigError) as caught:
        check(load_config(None, [*words, "model.decoder_options={width: 100000000}"]))
    *data, weights, decoder = caught.value.problems
    assert [problem.split(";")[0] for problem in data] == [
        f"there is no shard folder nowhere/{name}" for name in ("game_train", "camera_train", "camera_val")
    ]
    assert re.match(r"model.pretrained: timm's weights for 'resnet18' could not be fetched \(\w+: [^\n]*$", weights)
    assert "at most 65,536" in decoder
    assert capfd.readouterr() == ("", ""), "the library would try ten times, and say so"
    with pytest.raises(ConfigError, match="timm has no weights for 'mit_b0'"):
        check(load_config(None, [*SMALL, "model.pretrained=true"]))


@pytest.mark.parametrize(
    "overrides",
    [
        *([*encoder, "data.crop=512x512", "rebuilder.grid=32"] for encoder in ENCODERS),
        [],
        ["method.name=hrda", "data.crop=128x128"],
        ["mfm.reconstruction=pixels"],
        ["rebuilder.variant=stable"],
        ["model.backbone=vit_small_patch14_dinov2", f"model.backbone_options={DINO14}", "data.crop=518x518"],
    ],
)
def test_networks_that_fit_pass(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    check(load_config(None, [*SMALL, *overrides]))
    assert capsys.readouterr().out.startswith("ok: ")


@pytest.mark.parametrize("more", [[], ["model.freeze=true"], ["mfm.use_rebuilder=false"]])
def test_the_rebuilders_size_is_its_own(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever else is frozen."""
    config = load_config(None, [*SMALL, *more])
    check(config)
    rebuilder = build_train_module(config, CLASSES).rebuilder
    parameters = sum(p.numel() for p in rebuilder.parameters()) if rebuilder is not None else 0
    assert f", {parameters / 1e6:.2f} M in the Rebuilder" in capsys.readouterr().out
    assert (parameters == 0) == ("mfm.use_rebuilder=false" in more)


def test_all_that_is_wrong_with_a_launch_is_told_before_it_starts() -> None:
    started = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "3", "ACCELERATE_MIXED_PRECISION": "fp16"}
    with pytest.raises(ConfigError) as caught:
        check(load_config(None, [*SMALL, "train.cuda_graph=true", "train.global_batch=4"]), started)
    file, graph, batch = caught.value.problems
    assert file.startswith("the launch file sets mixed_precision: fp16")
    assert graph.startswith("train.cuda_graph under ZeRO")
    assert "train.global_batch=4" in batch


def test_several_sets_are_checked_and_their_shares_said(
    shard_folder: ShardFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("one", 6), ("two", 2), ("few", 3)):
        shard_folder(name, count=count)
    shard_folder("target", labelled=False)
    sets = [f"data.root={tmp_path}", "data.render_scenes=false", "data.target=target", "data.validation=null"]
    for text, said in [
        ("{one: 1, two: 3}", "data.source: one 25.0 % (6), two 75.0 % (2)"),
        ("[one, two]", "data.source: one 75.0 % (6), two 25.0 % (2)"),
    ]:
        check(load_config(None, [*SMALL, *sets, f"data.source={text}", "data.target_labelled=few"]))
        assert said in capsys.readouterr().out.splitlines()
    with pytest.raises(UserError) as caught:
        check(load_config(None, [*SMALL, *sets, "data.source={one: 1, target: 1}", "data.target_labelled=target"]))
    assert "data.source=" in str(caught.value)
    assert "set data.target_labelled=null, or pack it again" in str(caught.value)
    with pytest.raises(UserError, match="gone"):
        check(load_config(None, [*SMALL, *sets, "data.source=[one, gone]"]))
    # What a run renders itself counts as it will be.
    check(load_config(None, [*SMALL, "data.source=[game_train, game_val]", f"data.root={tmp_path}", "scenes.train=30"]))
    assert "data.source: game_train 23.1 % (30), game_val 76.9 % (100)" in capsys.readouterr().out


def test_the_oracle_is_supervised_on_all_targets_in_their_shares(shard_folder: ShardFolder, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shard_folder(name, count=3)
    shard_folder("val")
    sets = [f"data.root={tmp_path}", "method.name=oracle", "data.target={one: 2, two: 1}", "data.validation=val"]
    readers = open_readers(load_config(None, [*SMALL, *sets, "data.render_scenes=false", "data.source=gone"]))
    assert isinstance(readers.labelled, ConcatenatedReader)
    assert readers.labelled.shares == (2.0, 1.0)
    assert readers.labelled.fingerprint == readers.target.fingerprint
    assert len(readers.first_target) == 3
    assert readers.samples == 6 + 6 + len(readers.validation or ())
