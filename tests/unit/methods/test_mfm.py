"""The mask of MFM, and its ablations: what each one computes, and what it trains."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_dist.build import build_train_module
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import MFMSection
from mfm_dist.errors import ConfigError
from mfm_dist.methods.base import ForwardKind
from mfm_dist.methods.gradients import frozen, zero_gradient, zero_loss_through
from mfm_dist.methods.hrda import drawn_box
from mfm_dist.methods.losses import cross_entropy
from mfm_dist.methods.mfm import (
    draw_mask,
    hidden_error,
    hide,
    keyed_masks,
    masked_features_loss,
    rebuild,
)
from mfm_dist.models.hrda import HRDASegmentor
from mfm_dist.models.preprocessing import normalise
from mfm_dist.models.rebuilder import hidden_places
from mfm_dist.train_module import TrainModule
from tests.helpers.classes import CLASSES
from tests.helpers.modules import block, config_with

EVERY_PIXEL = "self_training.pseudo_threshold=0"


def module_with(*overrides: str) -> TrainModule:
    return build_train_module(config_with(EVERY_PIXEL, *overrides), CLASSES)


def value_of(module: TrainModule, term: str = "mfm") -> float:
    module.student.eval()  # without dropout a forward can be repeated
    return module(block(), 1.0, term).total.item()


def test_mask_share_and_independence_of_cells() -> None:
    mask = draw_mask(2000, (16, 16), 0.4, torch.Generator().manual_seed(0))
    assert mask.dtype == torch.bool
    assert mask.shape == (2000, 16, 16)
    share = mask.float()
    assert abs(share.mean().item() - 0.4) < 0.005
    assert share.mean(0).sub(0.4).abs().max() < 0.06  # five standard deviations of one cell
    # Independent cells: the count of an image varies as a binomial does, unlike an exact count.
    assert abs(share.sum((1, 2)).var().item() / (256 * 0.4 * 0.6) - 1) < 0.15


def test_mask_depends_on_its_generator_only() -> None:
    torch.manual_seed(1)
    first = draw_mask(3, (8, 12), 0.4, torch.Generator().manual_seed(9))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = draw_mask(3, (8, 12), 0.4, torch.Generator().manual_seed(9))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw_mask(3, (8, 12), 0.4, torch.Generator().manual_seed(10)))
    torch.set_rng_state(state)
    draw_mask(3, (8, 12), 0.4, torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, False), (1.0, True)])
def test_mask_extremes(ratio: float, expected: bool) -> None:
    assert draw_mask(4, (32, 32), ratio, torch.Generator()).eq(expected).all()


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_mask_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"mfm\.mask_ratio must lie between 0 and 1"):
        draw_mask(1, (2, 2), ratio, torch.Generator())


def test_blocks_are_hidden_together_and_independently_of_one_another() -> None:
    mask = draw_mask(2000, (8, 16), 0.4, torch.Generator().manual_seed(0), block=4)
    blocks = mask[:, ::4, ::4]
    assert torch.equal(mask, blocks.repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert blocks.float().mean((0,)).sub(0.4).abs().max() < 0.06
    with pytest.raises(ConfigError, match=r"mfm\.mask_block_cells=3 does not divide rebuilder\.grid=8x16"):
        draw_mask(1, (8, 16), 0.4, torch.Generator(), block=3)


def test_an_exact_mask_hides_the_same_share_of_every_image_and_every_block_as_often() -> None:
    mask = draw_mask(2000, (8, 16), 0.4, torch.Generator().manual_seed(0), block=4, exact=True)
    blocks = mask[:, ::4, ::4]
    assert torch.equal(mask, blocks.repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert (blocks.sum((1, 2)) == 3).all()  # of 8: 3.2 blocks
    assert blocks.float().mean(0).sub(3 / 8).abs().max() < 0.06


def test_the_term_can_count_hidden_pixels_alone() -> None:
    module = module_with("mfm.loss_on=hidden", "method.name=source_only")
    value = value_of(module)
    inputs = module.step_inputs(block())
    assert inputs.pseudo is not None
    features = module.student.encode(inputs.target_image)
    mask = keyed_masks(inputs, (4, 4), MFMSection())
    logits = module.student.decode(rebuild(module.student, module.rebuilder, features, mask))
    label, weight = inputs.pseudo.label, inputs.pseudo.weight
    errors = F.cross_entropy(F.interpolate(logits, label.shape[1:], mode="bilinear"), label, reduction="none")
    assert value == pytest.approx((errors * weight)[hidden_places(mask, label)].mean().item(), rel=1e-5)


def test_the_training_step_and_a_loop_of_ones_own_have_one_loss_and_one_gradient() -> None:
    plain = ["method.name=source_only", "model.decoder_options={width: 16, dropout: 0}"]
    theirs, ours = module_with(*plain), module_with(*plain)
    theirs(block(), 1.0, "mfm").total.backward()
    inputs = ours.step_inputs(block())
    assert inputs.pseudo is not None
    assert ours.rebuilder is not None
    masked_features_loss(
        ours.rebuilder,
        ours.student.encode(inputs.target_image),
        ours.student.decode,
        keyed_masks(inputs, (4, 4), MFMSection()),
        inputs.pseudo.label,
        inputs.pseudo.weight,
    ).backward()
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, own[name].grad), name


def test_without_rebuilding_hidden_features_are_zero_and_there_is_no_rebuilder() -> None:
    module = module_with("mfm.use_rebuilder=false", "method.name=source_only")
    assert module.rebuilder is None
    value = value_of(module)
    inputs = module.step_inputs(block())
    mask = keyed_masks(inputs, (4, 4), MFMSection())
    features = module.student.encode(inputs.target_image)
    for before, after in zip(features, rebuild(module.student, hide, features, mask), strict=True):
        hidden = hidden_places(mask, before)[:, None]
        assert torch.equal(after, before * ~hidden)
    assert inputs.pseudo is not None
    logits = module.student.decode(rebuild(module.student, hide, features, mask))
    assert value == pytest.approx(cross_entropy(logits, inputs.pseudo.label).item())


def test_the_source_is_classified_by_its_labels_without_a_pseudo_weight() -> None:
    module = build_train_module(config_with("mfm.domain=source", "method.name=source_only"), CLASSES)
    value = value_of(module, "mfm_source")
    inputs = module.step_inputs(block())
    features = module.student.encode(inputs.source_image)
    mask = keyed_masks(inputs, (4, 4), MFMSection(), ForwardKind.MFM_SOURCE)
    assert not torch.equal(mask, keyed_masks(inputs, (4, 4), MFMSection()))
    logits = module.student.decode(rebuild(module.student, module.rebuilder, features, mask))
    assert value == pytest.approx(cross_entropy(logits, inputs.source_label).item())


def test_both_domains_are_the_two_terms_of_each() -> None:
    both = module_with("mfm.domain=both")
    assert both.term_names == ("source", "mixed", "mfm_source", "mfm")
    assert value_of(both, "mfm") == value_of(module_with("mfm.domain=target"), "mfm")
    assert value_of(both, "mfm_source") == value_of(module_with("mfm.domain=source"), "mfm_source")


def slow_error(rebuilt: Tensor, target: Tensor, hidden: Tensor) -> float:
    """Position by position; the target is normalised over its channels."""
    errors = []
    for b, y, x in hidden.nonzero().tolist():
        values = target[b, :, y, x].double()
        normal = (values - values.mean()) / (values.var(unbiased=False) + 1e-5).sqrt()
        errors += ((rebuilt[b, :, y, x].double() - normal) ** 2).tolist()
    return sum(errors) / len(errors)


def test_regression_counts_hidden_places_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    rebuilt, target = torch.randn(2, 2, 6, 8, 8, generator=generator)
    mask = torch.rand(2, 4, 4, generator=generator) < 0.4
    hidden = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert hidden_error(rebuilt, target, mask).item() == pytest.approx(slow_error(rebuilt, target, hidden), rel=1e-5)
    assert hidden_error(rebuilt, target, torch.zeros_like(mask)).item() == 0.0


@pytest.mark.parametrize("reconstruction", ["teacher_features", "student_features", "pixels"])
def test_what_is_regressed_is_what_was_hidden(reconstruction: str) -> None:
    module = module_with(f"mfm.reconstruction={reconstruction}", "method.name=source_only")
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.mul_(1.05)  # or the teacher's features would be the student's
    value = value_of(module)
    image = normalise(block().target_image)
    inputs = module.step_inputs(block())
    assert module.teacher is not None
    assert module.rebuilder is not None
    mask = keyed_masks(inputs, (4, 4), MFMSection())
    features = module.student.encode(image)
    targets = {
        "student_features": features,
        "teacher_features": module.teacher.segmentor.encode(image),
        "pixels": [F.pixel_unshuffle(image, 4)],
    }[reconstruction]
    maps = targets if reconstruction == "pixels" else features
    rebuilt = module.rebuilder(features[-1], maps, mask)
    errors = [hidden_error(ours, theirs, mask) for ours, theirs in zip(rebuilt, targets, strict=True)]
    assert value == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_pixels_are_rebuilt_in_patches_of_the_images_own_order() -> None:
    module = module_with("mfm.reconstruction=pixels")
    assert module.rebuilder is not None
    [projector] = module.rebuilder.projectors
    patches = F.pixel_unshuffle(normalise(block().target_image), 4)
    assert projector(torch.zeros(2, 32, 4, 4)).shape[1] == patches.shape[1] == 48


def gradients(*overrides: str) -> dict[str, Tensor]:
    module = module_with("method.name=source_only", *overrides)
    module(block(), 1.0, "mfm").total.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_what_the_term_trains_is_a_matter_of_gradients_alone() -> None:
    """Each part learns exactly what it would learn in the whole, or exactly nothing."""
    both, encoder, decoder = (gradients(f"mfm.trained_parts={part}") for part in ("both", "encoder", "decoder"))
    assert both.keys() == encoder.keys() == decoder.keys()
    for name, gradient in both.items():
        part = name.removeprefix("student.").partition(".")[0]
        for found, trained in ((encoder, "backbone"), (decoder, "decoder")):
            if part in (trained, "rebuilder"):
                assert torch.equal(found[name], gradient), name
            else:
                assert not found[name].any(), name
    assert both["student.decoder.classifier.weight"].any()
    assert any(gradient.any() for name, gradient in both.items() if name.startswith("student.backbone."))


def test_the_loss_is_the_same_whatever_it_trains() -> None:
    values = {value_of(module_with(f"mfm.trained_parts={part}")) for part in ("both", "encoder", "decoder")}
    assert len(values) == 1


@pytest.mark.parametrize(
    "overrides", [["mfm.trained_parts=encoder"], ["mfm.reconstruction=pixels"], ["method.name=hrda"]]
)
def test_reaching_every_parameter_counts_nothing_twice_in_batch_norm(overrides: list[str]) -> None:
    options = ["hrda.attention_options={width: 8}", "data.crop=64"]
    module = module_with(*overrides, *options)
    decoder, before = module.student.decoder, []
    for name, buffer in decoder.named_buffers():
        before.append((name, buffer, buffer.clone()))
    module(block(), 1.0, "mfm")
    expected = 0 if "mfm.reconstruction=pixels" in overrides else 1
    counted = {int(b - a) for name, b, a in before if name.endswith("num_batches_tracked")}
    assert counted == {expected}


def test_stopped_gradients_are_zero_and_values_stay() -> None:
    x = torch.randn(3, requires_grad=True)
    y = zero_gradient(x)
    assert torch.equal(x, y)
    (y * 2).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_fixed_module_passes_gradients_on() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    with frozen(layer):
        layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    assert layer.weight.grad is None
    assert layer.weight.requires_grad


def test_touching_gives_zero_gradients_and_leaves_statistics_alone() -> None:
    module = build_train_module(config_with(), CLASSES)
    features = [feature.detach() for feature in module.student.encode(normalise(block().target_image))]
    before = [b.clone() for b in module.student.decoder.buffers()]
    total = zero_loss_through([module.student.decoder], features)
    total.backward()
    assert total.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in module.student.decoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, module.student.decoder.buffers(), strict=True))


def test_the_detail_view_classifies_the_window_at_full_resolution() -> None:
    module = module_with(
        "method.name=hrda", "hrda.attention_options={width: 8}", "data.crop=64", "mfm.view=detail", "mfm.mask_ratio=0"
    )
    value = value_of(module)
    inputs = module.step_inputs(block())
    assert isinstance(module.student, HRDASegmentor)
    assert inputs.pseudo is not None
    box = drawn_box(inputs, ForwardKind.MFM)
    logits = module.student.decode(module.student.encode(box.crop(inputs.target_image)))
    assert value == pytest.approx(cross_entropy(logits, box.crop(inputs.pseudo.label)).item(), rel=1e-5)


def test_the_fused_view_is_hrdas_loss_of_two_rebuilt_resolutions() -> None:
    """One window for the micro-batch, and a mask for it that is not the context's."""
    crops = ["method.name=hrda", "hrda.attention_options={width: 8}", "data.crop=64", "hrda.detail_loss_weight=0.3"]
    module = module_with(*crops, "mfm.view=fused", "mfm.domain=both")
    assert module.term_names[-2:] == ("mfm_source", "mfm")
    student, inputs = module.student, module.step_inputs(block())
    assert isinstance(student, HRDASegmentor)
    assert inputs.pseudo is not None
    images = {
        ForwardKind.MFM_SOURCE: (inputs.source_image, inputs.source_label.long()),
        ForwardKind.MFM: (inputs.target_image, inputs.pseudo.label),
    }
    masks = {kind: keyed_masks(inputs, (4, 4), MFMSection(), kind) for kind in ForwardKind if "MFM" in kind.name}
    assert len({tuple(mask.flatten().tolist()) for mask in masks.values()}) == 4
    details = {ForwardKind.MFM_SOURCE: ForwardKind.MFM_SOURCE_DETAIL, ForwardKind.MFM: ForwardKind.MFM_DETAIL}
    student.eval()
    for kind, (image, label) in images.items():
        box = drawn_box(inputs, kind)
        context = rebuild(student, module.rebuilder, student.encode(student.context(image)), masks[kind])
        window = rebuild(student, module.rebuilder, student.encode(box.crop(image)), masks[details[kind]])
        detail = student.decode(window)
        fused = student.fuse_window(student.decode(context), student.attend(context), detail, box)
        expected = 0.7 * cross_entropy(fused, label) + 0.3 * cross_entropy(detail, box.crop(label))
        assert value_of(module, kind.label) == pytest.approx(expected.item(), rel=1e-5)


def test_with_nothing_hidden_the_fused_view_is_hrdas_own_loss_of_the_clean_image() -> None:
    crops = ["method.name=hrda", "hrda.attention_options={width: 8}", "data.crop=64", "mfm.mask_ratio=0"]
    module = module_with(*crops, "mfm.view=fused")
    value, inputs = value_of(module), module.step_inputs(block())
    assert isinstance(module.student, HRDASegmentor)
    assert inputs.pseudo is not None
    box = drawn_box(inputs, ForwardKind.MFM)
    context, detail = module.student.context(inputs.target_image), box.crop(inputs.target_image)
    seen = module.student.decode_crops(map(module.student.encode, (context, detail)), box)
    label = inputs.pseudo.label
    expected = 0.9 * cross_entropy(seen.fused, label) + 0.1 * cross_entropy(seen.detail, box.crop(label))
    assert value == pytest.approx(expected.item(), rel=1e-5)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mfm\.use_rebuilder=false leaves nothing"):
        load_config(None, ["mfm.use_rebuilder=false", "mfm.reconstruction=pixels"])
    with pytest.raises(ConfigError, match=r"mfm\.trained_parts=encoder is about the decoder"):
        load_config(None, ["mfm.trained_parts=encoder", "mfm.reconstruction=student_features"])
    with pytest.raises(ConfigError, match="leave some"):
        load_config(
            None, ["self_training.pseudo_weight_ignore_top=300", "self_training.pseudo_weight_ignore_bottom=212"]
        )
