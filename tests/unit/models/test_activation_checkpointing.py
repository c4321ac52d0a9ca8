"""Activation checkpointing of the encoder: which blocks, and that nothing but memory and time changes."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from mfm_dist.distributed.running_statistics import running_statistics
from mfm_dist.errors import ConfigError
from mfm_dist.models.activation_checkpointing import checkpoint_blocks, find_blocks, find_stages
from mfm_dist.models.backbone import Backbone
from mfm_dist.train_module import batch_norm_untracked

SMALL = ("test_resnet", "test_convnext", "mit_b0", "swin_tiny_patch4_window7_224", "regnetx_002", "dla46_c")
"""BatchNorm, a layer scale of the block's own, drop-path in stages with other parts, maps of another layout, and two
whose stages are checkpointed whole."""


def small_backbone(name: str) -> Backbone:
    torch.manual_seed(0)
    options = {
        "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": (1, 2, 1, 1), "img_size": 64, "drop_path_rate": 0.5}
    }
    return Backbone(name, options=options.get(name)).train()


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet101c", {"Bottleneck": 3 + 4 + 23 + 3}),
        ("mit_b5", {"Block": 3 + 6 + 40 + 3}),
        ("convnext_tiny", {"ConvNeXtBlock": 3 + 3 + 9 + 3}),
        ("swin_tiny_patch4_window7_224", {"SwinTransformerBlock": 2 + 2 + 6 + 2}),
        ("vit_tiny_patch16_224", {"Block": 12}),
        ("hrnet_w18_small", {"Bottleneck": 2 + 3, "BasicBlock": 2 * (2 + 3 + 4)}),
    ],
)
def test_blocks_are_those_of_the_papers(name: str, blocks: dict[str, int]) -> None:
    with torch.device("meta"):
        found = find_blocks(Backbone(name).net)
    assert Counter(type(block).__name__ for block in found) == blocks


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("regnety_002", {"ConvNormAct": 1, "RegStage": 4}),
        ("densenet121", {"DenseBlock": 4, "DenseTransition": 3}),
        ("dla34", {"Sequential": 2 + 1, "DlaTree": 4}),
    ],
)
def test_stages_where_there_are_no_blocks(name: str, stages: dict[str, int]) -> None:
    with torch.device("meta"):
        net = Backbone(name).net
    assert find_blocks(net) == []
    assert Counter(type(stage).__name__ for stage in find_stages(net)) == stages


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn", "nasnetalarge"])
def test_an_encoder_without_blocks_is_refused(name: str) -> None:
    with torch.device("meta"):
        backbone = Backbone(name)
    with pytest.raises(ConfigError, match="no block was found"):
        checkpoint_blocks(backbone)


def gradients(backbone: Backbone, *, untracked: bool = False) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Maps, gradients of all parameters and the next random number, from a forward with keyed draws."""
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    with batch_norm_untracked(backbone) if untracked else nullcontext():
        maps = backbone(image)
    sum(feature.square().mean() for feature in maps).backward()  # type: ignore[union-attr]
    return maps, [p.grad for p in backbone.parameters() if p.grad is not None], torch.rand(1)


@pytest.mark.parametrize("untracked", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_maps_gradients_statistics_and_draws_are_the_same_bits(name: str, untracked: bool) -> None:
    """``untracked``: the forward's BatchNorm setting holds in the recomputation, which runs after it was put back."""
    plain, checkpointed = small_backbone(name), small_backbone(name)
    checkpoint_blocks(checkpointed)
    before = [b.clone() for b in running_statistics(plain)]
    for ours, theirs in zip(
        gradients(checkpointed, untracked=untracked), gradients(plain, untracked=untracked), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    statistics = running_statistics(plain)
    assert all(torch.equal(a, b) for a, b in zip(running_statistics(checkpointed), statistics, strict=True))
    unmoved = all(torch.equal(a, b) for a, b in zip(before, statistics, strict=True))
    assert unmoved == (untracked or not statistics)


def counted(backbone: Backbone) -> list[nn.Module]:
    """Grows by one with every run of a layer of a block."""
    runs: list[nn.Module] = []
    block = find_blocks(backbone.net)[0]
    next(iter(block.children())).register_forward_hook(lambda layer, *_: runs.append(layer))
    return runs


def test_recomputes_once_and_only_for_a_backward() -> None:
    backbone = small_backbone("test_resnet")
    checkpoint_blocks(backbone)
    runs = counted(backbone)
    image = torch.randn(2, 3, 64, 64)
    maps = backbone(image)
    assert len(runs) == 1
    sum(feature.sum() for feature in maps).backward()
    assert len(runs) == 2
    with torch.no_grad():
        backbone(image)
    assert len(runs) == 3


def test_a_copy_runs_its_own_layers_and_names_stay() -> None:
    """The teacher is a copy of a student that may be checkpointed already."""
    backbone = small_backbone("test_resnet")
    names = list(backbone.state_dict())
    checkpoint_blocks(backbone)
    assert list(backbone.state_dict()) == names
    copy = deepcopy(backbone)
    image = torch.randn(2, 3, 64, 64)
    before = [feature.detach() for feature in backbone(image)]
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, backbone(image), strict=True))
    assert not torch.equal(before[-1], copy(image)[-1])


def test_holds_less_for_the_backward() -> None:
    def held(backbone: Backbone) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = backbone(torch.randn(2, 3, 64, 64))
        return sum(sizes.values()) if maps else 0

    plain, checkpointed = small_backbone("mit_b0"), small_backbone("mit_b0")
    checkpoint_blocks(checkpointed)
    assert held(checkpointed) < 0.6 * held(plain)
