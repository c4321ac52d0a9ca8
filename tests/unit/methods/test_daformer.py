"""The feature distance of DAFormer and the positions it counts, against slow references."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from mfm_dist.batch import UDABatch
from mfm_dist.build import build_train_module
from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.methods.daformer import feature_distance, thing_mask
from mfm_dist.models.preprocessing import normalise
from tests.helpers.classes import CLASSES
from tests.helpers.modules import block, config_with


def slow_mask(label: Tensor, rows: int, columns: int, share: float) -> Tensor:
    """Position by position: count the classes below it, take the winner."""
    high, wide = label.shape[1] // rows, label.shape[2] // columns
    mask = torch.zeros(len(label), rows, columns, dtype=torch.bool)
    for b in range(len(label)):
        for r in range(rows):
            for c in range(columns):
                cell = label[b, r * high : (r + 1) * high, c * wide : (c + 1) * wide]
                winner, count = Counter(cell.flatten().tolist()).most_common(1)[0]
                mask[b, r, c] = winner in CLASSES.indices(CLASSES.things) and count / cell.numel() >= share
    return mask


@pytest.mark.parametrize("share", [0.4, 0.75])
def test_the_mask_is_where_one_thing_class_covers_its_share(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.tensor([0, 13, 13, 11, IGNORE_INDEX, 18, 8])[torch.randint(7, (2, 12, 12), generator=generator)]
    label = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)  # [2, 48, 48]
    noise = torch.rand(label.shape, generator=generator) < 0.2
    label[noise] = 13
    label = label.roll(3, dims=2).to(torch.uint8)
    mask = thing_mask(label, CLASSES, (6, 6), share)
    assert torch.equal(mask, slow_mask(label, 6, 6, share))
    assert 0 < int(mask.sum()) < mask.numel()


def test_three_quarters_are_enough_and_ignored_pixels_count_as_a_class() -> None:
    label = torch.full((1, 4, 4), 13, dtype=torch.uint8)
    label[0, 0] = IGNORE_INDEX
    assert thing_mask(label, CLASSES, (1, 1), 0.75).all()
    label[0, 1, 0] = IGNORE_INDEX
    assert not thing_mask(label, CLASSES, (1, 1), 0.75).any()


def test_things_are_the_classes_that_imagenet_knows() -> None:
    assert list(CLASSES.things) == [
        "traffic light", "traffic sign", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ]  # fmt: skip


def test_the_distance_is_the_mean_norm_over_the_mask() -> None:
    generator = torch.Generator().manual_seed(1)
    ours, initial = torch.randn(2, 2, 5, 3, 4, generator=generator)
    mask = torch.rand(2, 3, 4, generator=generator) < 0.5
    norms = [
        math.sqrt(sum(float(ours[b, k, y, x] - initial[b, k, y, x]) ** 2 for k in range(5)))
        for b in range(2)
        for y in range(3)
        for x in range(4)
        if mask[b, y, x]
    ]
    assert float(feature_distance(ours, initial, mask)) == pytest.approx(sum(norms) / len(norms), rel=1e-6)


def test_an_empty_mask_gives_exactly_zero_and_no_gradient() -> None:
    ours = torch.randn(2, 5, 3, 4, requires_grad=True)
    distance = feature_distance(ours, torch.randn(2, 5, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool))
    distance.backward()
    assert distance.item() == 0.0
    assert ours.grad is not None
    assert not ours.grad.any()


def test_equal_features_have_a_finite_gradient() -> None:
    ours = torch.ones(1, 5, 2, 2, requires_grad=True)
    feature_distance(ours, torch.ones(1, 5, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)).backward()
    assert ours.grad is not None
    assert torch.isfinite(ours.grad).all()


def labelled(batch: UDABatch, value: int) -> UDABatch:
    return UDABatch(**{**vars(batch), "source_label": torch.full_like(batch.source_label, value)})


def test_the_term_is_the_distance_to_the_initial_encoder_on_source_images() -> None:
    module = build_train_module(config_with("method.name=daformer", "mfm.enabled=false"), CLASSES)
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.mul_(1.1)
    batch = labelled(block(), 13)
    losses = module(batch, 0.0).losses
    image = normalise(batch.source_image)
    initial = module.initial_encoder
    assert initial is not None
    expected = (module.student.encode(image)[-1] - initial.backbone(image)[-1]).square().sum(1).sqrt().mean()
    assert losses["feature_distance"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert module(labelled(batch, 0), 0.0).losses["feature_distance"].item() == 0.0


def test_the_total_holds_the_distance_with_its_weight() -> None:
    module = build_train_module(
        config_with("method.name=daformer", "mfm.enabled=false", "daformer.feature_distance_weight=0.5"), CLASSES
    )
    output = module(labelled(block(), 13), 0.0)
    expected = output.losses["source"] + 0.5 * output.losses["feature_distance"] + output.losses["mixed"]
    assert torch.allclose(output.total, expected)


def test_the_initial_encoder_stays_as_it_was_in_evaluation_mode() -> None:
    module = build_train_module(config_with("method.name=daformer", "mfm.enabled=false"), CLASSES)
    initial = module.initial_encoder
    assert initial is not None
    fingerprint = initial.fingerprint()
    module.train()
    module(block(), 0.0).total.backward()
    assert not any(layer.training for layer in initial.backbone.modules())
    assert all(p.grad is None and not p.requires_grad for p in initial.parameters())
    assert initial.fingerprint() == fingerprint


def test_its_fingerprint_follows_from_the_configuration_alone() -> None:
    def fingerprint(*overrides: str) -> str:
        initial = build_train_module(config_with("method.name=daformer", *overrides), CLASSES).initial_encoder
        assert initial is not None
        return initial.fingerprint()

    assert fingerprint() == fingerprint("mfm.enabled=false") != fingerprint("seed=1")


def test_without_the_distance_it_is_dacs() -> None:
    def losses(name: str) -> tuple[dict[str, Tensor], list[nn.Parameter]]:
        module = build_train_module(
            config_with(f"method.name={name}", "mfm.enabled=false", "daformer.feature_distance_weight=0"), CLASSES
        )
        output = module(block(), 0.0)
        output.total.backward()
        return output.losses, list(module.student.parameters())

    (daformer, ours), (dacs, theirs) = losses("daformer"), losses("dacs")
    assert all(torch.equal(daformer[name], dacs[name]) for name in dacs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
