"""MIC's masks and the batch it masks, against slow references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import MICSection, RunConfig
from mfm_dist.errors import ConfigError
from mfm_dist.methods.augment import strong_augment
from mfm_dist.methods.base import StepInputs
from mfm_dist.methods.mic import chosen_images, masked_batch, masked_draws, visible_blocks, with_masked_image
from mfm_dist.methods.self_training import PseudoTarget, without_margins
from mfm_dist.rng import Stream, keyed_generator, torch_generator
from tests.helpers.classes import CLASSES
from tests.helpers.modules import block, config_with, inputs_with


@pytest.mark.parametrize(
    ("size", "side", "grid"),
    [
        ((512, 512), 32, (16, 16)), ((1024, 1024), 64, (16, 16)), ((1080, 1920), 64, (17, 30)),
        ((512, 512), None, (16, 16)), ((1024, 1024), None, (16, 16)), ((128, 256), None, (16, 32)),
        ((12, 20), None, (12, 20)),
    ],
)  # fmt: skip
def test_the_grid_has_as_many_blocks_as_published(
    size: tuple[int, int], side: int | None, grid: tuple[int, int]
) -> None:
    visible = visible_blocks(size, MICSection(mask_block_pixels=side, mask_ratio=0.5), torch.Generator().manual_seed(0))
    kept = torch.rand(grid, generator=torch.Generator().manual_seed(0)) > 0.5
    rows = torch.arange(size[0]) * grid[0] // size[0]
    columns = torch.arange(size[1]) * grid[1] // size[1]
    assert torch.equal(visible.bool(), kept)
    enlarged = F.interpolate(visible[None, None], size, mode="nearest")[0, 0]  # as ``with_masked_image`` does
    assert torch.equal(enlarged.bool(), kept[rows][:, columns])


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 1.0), (0.7, 0.3), (1.0, 0.0)])
def test_blocks_are_hidden_with_the_mask_ratio_each_by_itself(ratio: float, share: float) -> None:
    settings = MICSection(mask_block_pixels=1, mask_ratio=ratio)
    visible = torch.stack([visible_blocks((16, 16), settings, torch.Generator().manual_seed(n)) for n in range(200)])
    assert visible.mean().item() == pytest.approx(share, abs=0.01)
    if 0 < ratio < 1:
        assert visible.mean(dim=(1, 2)).std().item() > 0.01  # no exact count


@pytest.mark.parametrize(
    ("mode", "batch", "expected"),
    [
        ("separatetrg", 3, (0, 3)), ("separatesrc", 3, (3, 0)), ("separate", 2, (1, 1)), ("separate", 1, (1, 1)),
        ("separate", 3, (1, 2)), ("separate", 4, (2, 2)),
    ],
)  # fmt: skip
def test_each_mode_masks_its_images(mode: str, batch: int, expected: tuple[int, int]) -> None:
    assert chosen_images(batch, mode) == expected


def inputs_of(count: int = 2, threshold_share: float = 0.25) -> StepInputs:
    generator = torch.Generator().manual_seed(count)
    shape = (count, 32, 32)
    valid = without_margins(torch.ones(shape, dtype=torch.bool), 2, 3)
    confidence = torch.rand(shape, generator=generator)
    return inputs_with(
        source_image=torch.randn(count, 3, 32, 32, generator=generator),
        source_label=torch.randint(0, 19, shape, generator=generator, dtype=torch.uint8),
        target_image=torch.randn(count, 3, 32, 32, generator=generator),
        pseudo=PseudoTarget(
            torch.randint(0, 19, shape, generator=generator), threshold_share * valid, confidence, valid
        ),
        seed=3,
        block=5,
        positions=range(5 * count, 6 * count),
    )


def masked(inputs: StepInputs, config: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    draws = masked_draws(inputs, (32, 32), config.mic, config.self_training)
    inputs = with_masked_image(replace(inputs, draws=draws), config.mic, config.self_training)
    return masked_batch(inputs, config.mic)


@pytest.mark.parametrize("mode", ["separatetrg", "separatesrc", "separate"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_masked_batch_is_the_images_times_their_masks(mode: str, count: int) -> None:
    inputs = inputs_of(count)
    config = load_config(None, ["mic.augment=false", f"mic.mode={mode}", "mic.mask_block_pixels=8"])
    image, label, weight = masked(inputs, config)
    source, target = chosen_images(count, mode)
    assert len(image) == source + target
    assert inputs.pseudo is not None
    for index in range(source + target):
        domain, i = (0, index) if index < source else (1, index - source)
        visible = visible_blocks((32, 32), config.mic, torch_generator(3, Stream.MIC_MASK, 5 * count + i, domain))
        visible = visible.repeat_interleave(8, 0).repeat_interleave(8, 1)
        clean = (inputs.source_image, inputs.target_image)[domain][i]
        assert torch.equal(image[index], clean * visible)
        if domain == 0:
            assert torch.equal(label[index], inputs.source_label[i].long())
            assert weight[index].eq(1).all()
        else:
            assert torch.equal(label[index], inputs.pseudo.label[i])
            assert torch.equal(weight[index], inputs.pseudo.weight[i])  # 0 in the margins


def test_augmentation_comes_before_the_mask_and_leaves_the_batch_alone() -> None:
    inputs = inputs_of()
    before = inputs.target_image.clone()
    config = load_config(
        None,
        ["mic.mask_block_pixels=8", "self_training.jitter_prob=1", "self_training.blur_prob=1", "mic.mask_ratio=0.5"],
    )
    image, _, _ = masked(inputs, config)
    assert torch.equal(inputs.target_image, before)
    draws = keyed_generator(3, Stream.MIC_AUGMENT, 5)
    augmented = strong_augment(before, config.self_training, draws, scope="batch")
    hidden = image == 0
    assert 0.2 < hidden.float().mean() < 0.8
    assert torch.equal(image[~hidden], augmented[~hidden])
    assert not torch.equal(augmented, before)


def test_a_threshold_of_its_own_gives_a_weight_of_its_own() -> None:
    inputs = inputs_of()
    assert inputs.pseudo is not None
    shared = load_config(None, [])
    every = load_config(None, ["mic.pseudo_threshold=0"])
    half = load_config(None, ["mic.pseudo_threshold=0.5"])
    weights = [masked(inputs, c)[2] for c in (shared, every, half)]
    share = (inputs.pseudo.confidence >= 0.5).float().mean()
    assert torch.equal(weights[0], inputs.pseudo.weight)
    assert torch.equal(weights[1], inputs.pseudo.valid.float())
    assert torch.equal(weights[2], share * inputs.pseudo.valid)


def test_the_weight_scales_every_loss_of_the_masked_pass() -> None:
    options = ["method.name=mic", "mic.base_method=hrda", "hrda.attention_options={width: 8}", "mfm.enabled=false"]
    module = build_train_module(
        config_with(*options, "data.crop=64", "mic.mask_block_pixels=16", "mic.loss_weight=0.5"), CLASSES
    )
    output = module(block(), 0.0, "masked")
    losses = output.losses
    expected = 0.5 * (0.9 * losses["masked"] + 0.1 * losses["masked_detail"])
    assert torch.allclose(output.total, expected)


def test_masked_images_without_a_teacher() -> None:
    """Supervised use: masked labelled images, and nothing else."""
    config = config_with("method.name=mic", "mic.base_method=source_only", "mic.mode=separatesrc", "mfm.enabled=false")
    module = build_train_module(config, CLASSES)
    assert module.teacher is None
    assert set(module(block(), 0.0).losses) == {"source", "masked"}


def test_a_base_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"mic\.base_method: expected one of source_only, dacs, daformer, hrda"):
        load_config(None, ["mic.base_method=hrd"])
