"""The probe: what it says of Rebuilders that are known, and every figure against a slow reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mfm_dist.batch import UDABatch
from mfm_dist.build import build_train_module
from mfm_dist.classes import IGNORE_INDEX
from mfm_dist.data.reader import ShardReader
from mfm_dist.errors import ConfigError, DataError
from mfm_dist.inference.probe import (
    BINS,
    RESAMPLES,
    Look,
    agreement,
    as_in_training_without_dropout,
    calibration,
    cosine_with_interval,
    fill_from_neighbours,
    gradients,
    gradients_of,
    look_at,
    output_change,
    probe,
    read_batches,
    split_loss,
)
from mfm_dist.methods.mfm import draw_mask, hide, masked_features_loss, rebuild
from mfm_dist.models.layers import resize
from mfm_dist.models.rebuilder import hidden_places
from mfm_dist.train_module import TrainModule
from tests.helpers.classes import CLASSES
from tests.helpers.methods import EXTRA
from tests.helpers.modules import config_with
from tests.helpers.shards import ShardFolder, damage

EVERY_PIXEL = "self_training.pseudo_threshold=0"
"""A random teacher is sure of nothing, and all gradients would be 0."""


class CopiesNeighbours(nn.Module):
    """In a Rebuilder's place: the neighbours' average, and a bias that has learned nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, last_feature: Tensor, features: list[Tensor], mask: Tensor) -> list[Tensor]:  # noqa: ARG002
        hidden = [hidden_places(mask, one).unsqueeze(1) for one in features]
        return [fill_from_neighbours(one, where) + self.bias for one, where in zip(features, hidden, strict=True)]


class ReadsTheLastMapAlone(nn.Module):
    """In a Rebuilder's place: every map, visible places too, is made of the last one."""

    def forward(self, last_feature: Tensor, features: list[Tensor], mask: Tensor) -> list[Tensor]:  # noqa: ARG002
        mean = last_feature.mean(dim=1, keepdim=True)
        return [resize(mean, one.shape[-2:]).expand_as(one) for one in features]


def module_with(*overrides: str) -> TrainModule:
    """The tiny networks at random, whose decoder tells classes apart."""
    module = build_train_module(config_with("data.crop=64x64", EVERY_PIXEL, *overrides), CLASSES)
    for network in (module.student, module.teacher):
        assert network is not None
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.shape[0] == len(CLASSES) and parameter.ndim > 1:
                    parameter.normal_(generator=generator)
    return module


@pytest.fixture(scope="module")
def batches(scenes: Path) -> list[UDABatch]:
    """Two micro-batches of real validation scenes."""
    found, bad = read_batches(ShardReader(scenes / "camera_val"), config_with("data.crop=64x64").data)
    assert bad == []
    return found


def looks_of(module: TrainModule, batches: Sequence[UDABatch]) -> list[Look]:
    return [look_at(module, batch) for batch in batches]


def test_a_random_rebuilder_and_one_that_copies_its_neighbours_are_told_apart(batches: list[UDABatch]) -> None:
    module = module_with()
    random = probe(module, batches)
    module.rebuilder = CopiesNeighbours()  # type: ignore[assignment]
    copies = probe(module, batches)
    assert random["rebuilder_minus_diffusion"] < -0.05
    assert copies["rebuilder_minus_diffusion"] == 0
    assert copies["agreement"]["rebuilder"] == copies["agreement"]["diffusion"]
    assert copies["agreement"]["other_image"] == copies["agreement"]["rebuilder"], "it does not look at the image"
    assert random["agreement"]["diffusion"] == copies["agreement"]["diffusion"]
    assert random["agreement"]["all_hidden"]["visible"] is None


def test_with_nothing_hidden_the_student_agrees_with_the_teacher_that_it_is(batches: list[UDABatch]) -> None:
    module = module_with("mfm.mask_ratio=0")
    found = probe(module, batches)
    everything = found["agreement"].pop("all_hidden")
    assert everything["hidden"] < 1
    assert all(values == {"visible": 1.0, "hidden": None} for values in found["agreement"].values())
    assert found["rebuilder_minus_diffusion"] is None
    assert found["alignment"]["hidden"] == {"cosine": None, "low": None, "high": None}
    assert found["gradient_share"] == 0


def test_agreement_counts_pixels_one_by_one(batches: list[UDABatch]) -> None:
    module = module_with()
    batch = replace(batches[0], target_valid=torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.5)
    with torch.no_grad(), as_in_training_without_dropout(module.student):
        look = look_at(module, batch)
        found = agreement(module, [look])
        features = module.student.encode(look.image)
        rebuilder = module.rebuilder
        assert rebuilder is not None
        ways = {
            "zero_fill": hide(features[-1], features, look.mask),
            "rebuilder": rebuilder(features[-1], features, look.mask),
            "other_image": rebuilder(features[-1].flip(0), features, look.mask),  # of two, the other one
            "diffusion": CopiesNeighbours()(features[-1], features, look.mask),
        }
        for name, rebuilt in ways.items():
            logits = nn.functional.interpolate(module.student.decode(rebuilt), (64, 64), mode="bilinear")
            classes, pseudo, valid = (one.tolist() for one in (logits.argmax(1), look.pseudo.label, batch.target_valid))
            same: dict[bool, list[bool]] = {False: [], True: []}
            for b, y, x in product(range(2), range(64), range(64)):
                if valid[b][y][x]:
                    hidden = bool(look.mask[b, y // 16, x // 16])
                    same[hidden].append(classes[b][y][x] == pseudo[b][y][x])
            assert found[name] == {"visible": float(np.mean(same[False])), "hidden": float(np.mean(same[True]))}
    assert len({values["hidden"] for values in found.values()}) == len(found), "all of them differ"


def test_filling_keeps_constants_and_stays_between_what_is_seen() -> None:
    hidden = draw_mask(3, (7, 13), 0.6, torch.Generator().manual_seed(0))[:, None]
    constant = torch.full((3, 2, 7, 13), 4.0)
    torch.testing.assert_close(fill_from_neighbours(constant.masked_fill(hidden, 99.0), hidden), constant)
    feature = torch.randn(3, 2, 7, 13, generator=torch.Generator().manual_seed(1))
    filled = fill_from_neighbours(feature, hidden)
    assert torch.equal(filled, fill_from_neighbours(feature.masked_fill(hidden, 99.0), hidden))
    for b in range(3):
        seen = feature[b][:, ~hidden[b, 0]]
        assert (filled[b].amin((1, 2)) >= seen.amin(1) - 1e-5).all()
        assert (filled[b].amax((1, 2)) <= seen.amax(1) + 1e-5).all()


def test_a_hole_takes_more_from_what_is_near() -> None:
    feature, hidden = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    feature[..., 4:] = 1.0
    hidden[..., 2:4, 1:3] = hidden[..., 2:4, 5:7] = True
    filled = fill_from_neighbours(feature, hidden)[0, 0]
    assert filled[2:4, 1:3].max() < 0.35
    assert filled[2:4, 5:7].min() > 0.65


def test_an_image_without_anything_visible_takes_the_others_mean_or_nothing() -> None:
    feature = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    hidden[0] = True
    filled = fill_from_neighbours(feature, hidden)
    torch.testing.assert_close(filled[0], feature[1].mean((1, 2))[:, None, None].expand(3, 4, 4))
    hidden[1] = True
    assert not fill_from_neighbours(feature, hidden).any()


@pytest.mark.parametrize("loss_on", ["all", "hidden"])
def test_the_gradients_of_visible_and_hidden_pixels_add_up_to_that_of_training(
    batches: list[UDABatch], loss_on: str
) -> None:
    module = module_with(f"mfm.loss_on={loss_on}")
    student, rebuilder = module.student, module.rebuilder
    assert rebuilder is not None
    with as_in_training_without_dropout(student):
        look = look_at(module, batches[0])
        found = gradients_of(module, look)
        features = student.encode(look.image)
        loss = masked_features_loss(
            rebuilder, features, student.decode, look.mask, look.clean.label, look.clean.weight, loss_on=loss_on
        )  # type: ignore[arg-type]  # the decoder of this network reads all maps
        if loss_on == "hidden":  # training divides by the hidden share
            loss = loss * look.hidden.float().mean()
        loss.backward()
        visible, hidden = split_loss(student.decode(rebuild(student, rebuilder, features, look.mask)), look)
    encoder = [p.grad for p in student.backbone.parameters() if p.grad is not None]
    last = [p.grad for p in student.backbone.net.parameters() if p.ndim > 1][-1]
    counted = found.visible + found.hidden if loss_on == "all" else found.hidden
    assert last is not None
    assert torch.allclose(counted, last.flatten(), rtol=1e-3, atol=1e-7)
    assert found.whole == pytest.approx(float(sum(g.double().square().sum() for g in encoder)), rel=1e-4)
    parts = visible + hidden if loss_on == "all" else hidden
    assert loss.item() == pytest.approx(parts.item(), rel=1e-5)
    assert found.through_rebuilder > 0


def test_the_share_of_the_gradient_through_the_rebuilder_at_both_ends(batches: list[UDABatch]) -> None:
    module = module_with()
    with as_in_training_without_dropout(module.student):
        looks = looks_of(module, batches)
        between = gradients(module, looks)
        module.rebuilder = CopiesNeighbours()  # type: ignore[assignment]  # which does not read the last map
        none = gradients(module, looks)
        module.rebuilder = ReadsTheLastMapAlone()  # type: ignore[assignment]
        all_of_it = gradients(module, looks)
    assert 0.01 < between["gradient_share"] < 0.9
    assert none["gradient_share"] == 0
    assert all_of_it["gradient_share"] == pytest.approx(1.0, abs=1e-6)
    for place in none["alignment"].values():
        assert -1 <= place["low"] <= place["high"] <= 1


def test_a_gradient_against_itself_has_cosine_1_and_nothing_points_nowhere() -> None:
    vectors = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    same = cosine_with_interval(vectors, 2 * vectors, np.random.default_rng(0))
    assert list(same.values()) == pytest.approx([1.0, 1.0, 1.0])
    assert cosine_with_interval(vectors, -vectors, np.random.default_rng(0))["high"] == pytest.approx(-1.0)
    assert cosine_with_interval(0 * vectors, vectors, np.random.default_rng(0))["cosine"] is None


def test_the_interval_is_that_of_pairs_drawn_again_and_again() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(6, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    second += 0.3 * first
    found = cosine_with_interval(first, second, np.random.default_rng(2))

    def cosine(pairs: Sequence[int]) -> float:
        a, b = sum(first[i] for i in pairs), sum(second[i] for i in pairs)
        return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))  # type: ignore[union-attr, operator]

    assert found["cosine"] == pytest.approx(cosine(range(6)))
    times = np.random.default_rng(2).multinomial(6, [1 / 6] * 6, size=RESAMPLES)
    drawn = sorted(cosine([i for i, count in enumerate(row) for _ in range(count)]) for row in times)
    assert found["low"] == pytest.approx(float(np.quantile(drawn, 0.025)))
    assert found["high"] == pytest.approx(float(np.quantile(drawn, 0.975)))
    assert found["low"] < found["cosine"] < found["high"]  # type: ignore[operator]


def test_calibration_bin_by_bin(batches: list[UDABatch]) -> None:
    looks = looks_of(module_with("self_training.pseudo_threshold=0.3"), batches)
    sure_share = [float((look.pseudo.confidence >= 0.3).double().mean()) for look in looks]
    generator = torch.Generator().manual_seed(0)
    for number, look in enumerate(looks):  # sure without a reason: some bins are above their accuracy, others below
        label = torch.where(torch.rand(2, 64, 64, generator=generator) < 0.6, look.truth.label, look.pseudo.label)
        confidence = torch.rand(2, 64, 64, generator=generator)
        looks[number] = look._replace(pseudo=replace(look.pseudo, label=label, confidence=confidence))
    found = calibration(looks)
    pixels = [
        (float(look.pseudo.confidence[index]), bool(look.pseudo.label[index] == look.truth.label[index]))
        for look in looks
        for index in zip(*np.nonzero((look.truth.label != IGNORE_INDEX).numpy()), strict=True)
    ]
    error = 0.0
    for number in range(BINS):
        inside = [one for one in pixels if number / BINS <= one[0] < (number + 1) / BINS]
        if inside:
            sure, right = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            error += len(inside) / len(pixels) * abs(sure - right)
    assert found["expected_error"] == pytest.approx(error, abs=1e-6)
    assert found["accuracy"] == pytest.approx(sum(right for _, right in pixels) / len(pixels))
    assert found["pseudo_weight"] == pytest.approx(sum(sure_share) / len(sure_share))
    assert found["weight_minus_accuracy"] == pytest.approx(found["pseudo_weight"] - found["accuracy"])  # type: ignore


def test_output_change_is_that_of_a_step_of_its_own(batches: list[UDABatch]) -> None:
    module = module_with("optim.rebuilder_lr=1e-3", "optim.weight_decay=0", "mfm.mask_block_cells=2")
    with as_in_training_without_dropout(module.student):
        look = look_at(module, batches[0])
        found = output_change(module, look, None)
        other = deepcopy(module)
        student, rebuilder = other.student, other.rebuilder
        assert rebuilder is not None
        with torch.no_grad():
            features = student.encode(look.image)
        before = rebuilder(features[-1], features, look.mask)
        masked_features_loss(
            rebuilder, features, student.decode, look.mask, look.clean.label, look.clean.weight
        ).backward()
        optimizer = torch.optim.Adam(rebuilder.parameters(), lr=1e-3)
        optimizer.step()
        after = rebuilder(features[-1], features, look.mask)
    # Visible places are the same before and after, so they count below the line alone.
    changed = sum((a - b).double().square().sum().item() for a, b in zip(after, before, strict=True))
    size = 0.0
    for one in before:
        hidden = hidden_places(look.mask, one).unsqueeze(1)
        size += (one * hidden).double().square().sum().item()
    assert found == pytest.approx(math.sqrt(changed / size), rel=1e-4)
    assert found > 0.01
    module.config.optim.rebuilder_lr = 0.0
    assert output_change(module, look, None) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.name=hrda", "mfm.view=fused"],
        ["method.name=mic", "mic.base_method=hrda", "mfm.view=detail"],
        ["method.name=daformer", "optim.name=sgd", "mfm.trained_parts=decoder"],
        ["rebuilder.variant=stable", "rebuilder.heads=2"],
    ],
    ids=" ".join,
)
def test_every_method_is_probed_again_to_the_same_figures_and_left_as_it_was(
    overrides: list[str], batches: list[UDABatch]
) -> None:
    module = module_with(*EXTRA, *overrides)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [one.training for one in module.modules()]
    first, again = (probe(module, batches) for _ in range(2))
    assert first == again
    assert [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])] == []
    assert [one.training for one in module.modules()] == modes
    assert all(parameter.grad is None for parameter in module.parameters())
    assert [name for name, value in flat(first).items() if value is None] == ["agreement.all_hidden.visible"]
    assert first["images"] == 4


def flat(values: Any, prefix: str = "") -> dict[str, float | None]:
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    return {key: one for name, value in values.items() for key, one in flat(value, f"{prefix}{name}.").items()}


@pytest.mark.parametrize("setting", ["mfm.enabled=false", "mfm.use_rebuilder=false", "mfm.reconstruction=pixels"])
def test_a_run_without_a_rebuilder_that_classifies_is_refused(setting: str, batches: list[UDABatch]) -> None:
    with pytest.raises(ConfigError, match=f"nothing to probe: .*{setting}"):
        probe(module_with(setting), batches)


def test_what_cannot_be_read_is_left_out_and_named(shard_folder: ShardFolder) -> None:
    data = config_with("data.crop=32x32").data
    folder = shard_folder("validation", count=5)
    damage(folder, 1)
    batches, bad = read_batches(ShardReader(folder), data)
    assert [one.key for one in bad] == ["sample_0001"]
    assert [len(batch.source_image) for batch in batches] == [2, 2]
    assert len(read_batches(ShardReader(folder), data, images=3)[0]) == 1, "the odd one has no other image"
    damage(folder, 0, 2, 3)
    with pytest.raises(DataError, match="needs 2 usable images at least"):
        read_batches(ShardReader(folder), data)
