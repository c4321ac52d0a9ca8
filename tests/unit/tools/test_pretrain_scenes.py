"""The pre-training tool, and the weights it made that the scenes' configurations start from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mfm_dist.models.backbone import Backbone
from tests.helpers.runs import REPOSITORY
from tools import pretrain_scenes

SHIPPED = sorted((REPOSITORY / "configs" / "scenes").glob("*.safetensors"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_weights_are_those_of_their_recipe_and_fit(path: Path) -> None:
    recipe = json.loads(path.with_suffix(".json").read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == recipe["sha256"]
    assert recipe["accuracy"] > 10 / len(recipe["kinds"])
    backbone = Backbone(recipe["backbone"], weights=path)
    stored = load_file(path)
    first = next(iter(backbone.net.state_dict().values()))
    assert any(first.shape == t.shape and torch.equal(first, t.float()) for t in stored.values())


def test_what_the_tool_writes_starts_an_encoder(tmp_path: Path) -> None:
    command = f"--output {tmp_path / 'small'} --images 56 --val 28 --size 32 --epochs 1 --batch 28 --threads 1"
    before = torch.get_num_threads()
    try:
        assert pretrain_scenes.main(command.split()) == 0
    finally:
        torch.set_num_threads(before)
    recipe = json.loads((tmp_path / "small.json").read_text())
    assert 0 <= recipe["accuracy"] <= 1
    weights = tmp_path / "small.safetensors"
    assert all(t.dtype in (torch.float16, torch.int64) for t in load_file(weights).values())
    started, fresh = Backbone("test_resnet", weights=weights), Backbone("test_resnet")
    assert not torch.equal(started.net.conv1[0].weight, fresh.net.conv1[0].weight)


def test_a_view_of_an_even_image_is_that_image() -> None:
    """Cropping, scaling and mirroring move pixels; they invent none, not even at the border."""
    torch.manual_seed(0)
    image = torch.full((4, 3, 16, 16), 0.7)
    torch.testing.assert_close(pretrain_scenes.random_view(image), image)
