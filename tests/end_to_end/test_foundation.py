"""Foundation encoders through the real command, at random weights: DINOv2 with rates by layer, DINOv3 with LoRA."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import mfm_dist
from mfm_dist import export, train
from mfm_dist.build import build_train_module
from mfm_dist.checkpoint.contents import load_modules
from mfm_dist.checkpoint.files import find_latest
from mfm_dist.config.loader import load_config
from tests.helpers.classes import CLASSES
from tests.helpers.runs import DEFAULTS, assert_equal_bits, final_tensors, metrics_of, run_train, tiny_overrides

SMALL = "depth: 3, embed_dim: 32, num_heads: 2, init_values: 1.0, dynamic_img_size: true, pyramid: true"
"""Blocks count from the start: DINO's own layer scale of 1e-5 would let next to no gradient through."""
DINOV2 = ["model.backbone=vit_small_patch14_dinov2", "optim.layer_decay=0.8",
          f"model.backbone_options={{{SMALL}, img_size: 64, patch_size: 16}}"]  # fmt: skip
DINOV3 = ["model.backbone=vit_small_patch16_dinov3", f"model.backbone_options={{{SMALL}}}", "model.freeze=true",
          "model.lora.rank=4", "model.lora.targets=[attn.qkv, mlp.fc1]"]  # fmt: skip
OTHERS = ["optim.lr=1e-2", "mfm.mask_block_cells=2", "self_training.pseudo_threshold=0", "debug.audit_every=2"]
"""A random teacher is sure of nothing: above a threshold of 0 the MFM term would be 0."""


def overrides(scenes: Path, run: Path, *network: str) -> list[str]:
    return [*tiny_overrides(scenes, run), *network, *OTHERS]


def without_the_last_checkpoint(run: Path, copy: Path) -> Path:
    """What a kill leaves: step 2 is the newest checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000004")
    return copy


def exported(run: Path, folder: Path) -> torch.nn.Module:
    assert export.main(["--run", str(run), "--output", str(folder)]) == 0
    return mfm_dist.load(str(folder))


def test_dinov2_trains_resumes_and_is_exported(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.main([*DEFAULTS, *overrides(scenes, run, *DINOV2)]) == 0
    again = without_the_last_checkpoint(run, tmp_path / "again")
    assert train.main([*DEFAULTS, *overrides(scenes, again, *DINOV2)]) == 0
    assert_equal_bits(run, again)
    lines = metrics_of(run)
    assert lines == metrics_of(again)
    assert {key for key in lines[0] if key.startswith(("lr/", "grad_norm/"))} == {
        *(f"lr/{part}{norm}" for part in ("encoder", "decoder", "rebuilder") for norm in ("", "_norm")),
        *(f"grad_norm/{part}" for part in ("encoder", "decoder", "rebuilder", "total")),
    }
    assert lines[0]["lr/encoder"] == pytest.approx(1e-2)
    model = exported(run, tmp_path / "export")
    image = torch.zeros(3, 50, 70, dtype=torch.uint8)  # no multiple of a patch
    assert model.predict(image).shape == (50, 70)


@pytest.fixture(scope="module")
def frozen(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DINOv3, frozen, with LoRA, under ZeRO-3 on two processes."""
    run = tmp_path_factory.mktemp("frozen") / "run"
    completed = run_train(overrides(scenes, run, *DINOV3), launch="cpu_zero3")
    assert completed.returncode == 0, completed.stderr[-4000:]
    return run


def test_a_frozen_encoder_keeps_its_bits_and_only_what_is_added_moves(frozen: Path) -> None:
    config = load_config(frozen / "config.yaml")
    initial = dict(build_train_module(config, CLASSES).student.backbone.named_parameters())
    tensors = final_tensors(frozen)
    for part in ("student", "teacher"):
        prefix = f"{part}/backbone."
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        found.pop("net.model.rope.periods", None)  # a buffer, which a checkpoint has once
        assert found.keys() == initial.keys()
        moved = {name for name, tensor in found.items() if not torch.equal(tensor, initial[name])}
        assert moved == {name for name in found if ".lora_" in name}, part
    states = {name.partition("/")[2].rpartition("/")[0] for name in tensors if name.startswith("optimizer/")}
    assert {name for name in states if ".backbone." in name} == {
        f"student.backbone.{name}" for name in initial if ".lora_" in name
    }


@pytest.mark.parametrize("launch", [None, pytest.param("cpu_zero2", marks=pytest.mark.campaign)])
def test_a_frozen_run_resumes_at_another_stage(launch: str | None, frozen: Path, scenes: Path, tmp_path: Path) -> None:
    run = without_the_last_checkpoint(frozen, tmp_path / "run")
    arguments = overrides(scenes, run, *DINOV3)
    if launch is None:
        assert train.main([*DEFAULTS, *arguments]) == 0
    else:
        completed = run_train(arguments, launch=launch)
        assert completed.returncode == 0, completed.stderr[-4000:]
    ours, theirs = final_tensors(run), final_tensors(frozen)
    compared = {name for name in theirs if name.startswith(("student/backbone", "teacher/backbone", "rebuilder/"))}
    added = [float(theirs[name].abs().max()) for name in compared if "lora_B" in name]
    assert min(added) > 1e-4, "an addition starts at 0, so this is how far it moved"
    for name in compared:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6, msg=name)


def test_additions_are_merged_in_the_export(frozen: Path, tmp_path: Path) -> None:
    model = exported(frozen, tmp_path / "export")
    names = set(model.state_dict())
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    checkpoint = find_latest(frozen / "checkpoints", print)
    assert checkpoint is not None
    module = build_train_module(load_config(frozen / "config.yaml"), CLASSES)
    load_modules(checkpoint, module)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(image), module.student.eval()(image), rtol=1e-4, atol=1e-5)
