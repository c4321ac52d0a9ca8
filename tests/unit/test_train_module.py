"""The training step: what gets gradients, what is keyed, what MFM may and may not touch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_dist.build import build_student, build_train_module
from mfm_dist.config.schema import MFMSection
from mfm_dist.distributed.running_statistics import running_statistics
from mfm_dist.methods.mfm import keyed_masks, rebuild
from mfm_dist.models.layers import batch_norm_untracked
from mfm_dist.models.preprocessing import normalise
from tests.helpers.classes import CLASSES
from tests.helpers.modules import block, config_with


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    module = build_train_module(config_with(), CLASSES)
    output = module(block(), 0.25)
    losses = output.losses
    assert set(losses) == {"source", "mixed", "mfm", "pseudo_weight"}
    expected = losses["source"] + losses["mixed"] + 0.25 * losses["mfm"]
    assert torch.allclose(output.total, expected)


def test_pseudo_target_has_the_runs_threshold_and_margins() -> None:
    """Pixel by pixel from the teacher's logits: each of the batch's one share, but none in margins and on padding."""
    top, bottom, batch = 5, 7, block()
    padding = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.1
    batch = replace(batch, target_valid=~padding)
    margins = [f"self_training.pseudo_weight_ignore_top={top}", f"self_training.pseudo_weight_ignore_bottom={bottom}"]
    teacher = build_train_module(config_with(), CLASSES).teacher
    assert teacher is not None
    with torch.no_grad():
        confidence, label = teacher(normalise(batch.target_image)).double().softmax(1).max(1)
    threshold = float(confidence.quantile(0.4))
    module = build_train_module(config_with(*margins, f"self_training.pseudo_threshold={threshold!r}"), CLASSES)
    pseudo = module.step_inputs(batch).pseudo
    assert pseudo is not None
    share = sum(value >= threshold for value in confidence.flatten().tolist()) / confidence.numel()
    assert share == pytest.approx(0.6, abs=0.001)
    assert torch.equal(pseudo.label, label)
    for b in range(2):
        for y in range(64):
            for x in range(64):
                counts = top <= y < 64 - bottom and not padding[b, y, x]
                assert float(pseudo.weight[b, y, x]) == pytest.approx(share if counts else 0.0, abs=1e-3)


def test_every_trainable_parameter_gets_a_gradient_even_at_lambda_zero() -> None:
    for weight in (0.0, 1.0):
        module = build_train_module(config_with(), CLASSES)
        module(block(), weight).total.backward()
        missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        assert all(p.grad is None for p in module.teacher.parameters())  # type: ignore[union-attr]


def test_the_mfm_term_trains_encoder_decoder_and_rebuilder() -> None:
    # The pseudo-weight of a random teacher is 0 at the published threshold, and so would be every gradient.
    module = build_train_module(config_with("method.name=source_only", "self_training.pseudo_threshold=0.01"), CLASSES)
    with_term = module(block(), 1.0).total
    without = module(block(), 0.0).total
    (with_term - without).backward()
    for part in (module.student.backbone, module.student.decoder, module.rebuilder):
        norms = [p.grad.norm().item() for p in part.parameters() if p.grad is not None]  # type: ignore[union-attr]
        assert max(norms) > 1e-6


def test_a_frozen_encoder_gets_no_gradient_and_its_teacher_computes_as_it_does() -> None:
    """Its BatchNorm keeps the statistics that it came with, in the student's passes and in the teacher's."""
    module = build_train_module(config_with("model.freeze=true", "self_training.pseudo_threshold=0.01"), CLASSES)
    before = {name: tensor.clone() for name, tensor in module.student.backbone.state_dict().items()}
    with torch.no_grad():
        for name, buffer in module.student.backbone.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.5  # no longer what any batch has
    assert module.teacher is not None
    module.teacher.segmentor.load_state_dict(module.student.state_dict())
    image = normalise(block().target_image)
    for ours, teachers in zip(module.student.encode(image), module.teacher_features(image), strict=True):
        assert torch.equal(ours, teachers)
    module(block(), 1.0).total.backward()
    assert all(p.grad is None for p in module.student.backbone.parameters())
    for part in (module.student.decoder, module.rebuilder):
        assert max(p.grad.norm().item() for p in part.parameters() if p.grad is not None) > 1e-6  # type: ignore[union-attr]
    after = module.student.backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.endswith("running_mean"))
    paired = {student for student, _ in module.teacher_pairs()}
    assert paired == set(module.student.decoder.parameters())


def test_with_nothing_hidden_the_features_pass_unchanged_bit_for_bit() -> None:
    module = build_train_module(config_with("mfm.mask_ratio=0"), CLASSES)
    inputs = module.step_inputs(block())
    assert module.rebuilder is not None
    features = module.student.encode(inputs.target_image)
    mask = keyed_masks(inputs, module.rebuilder.grid, MFMSection(mask_ratio=0.0))
    rebuilt = rebuild(module.student, module.rebuilder, features, mask)
    for before, after in zip(features, rebuilt, strict=True):
        assert torch.equal(before, after)
    module.student.eval()
    assert torch.equal(module.student.decode(features), module.student.decode(rebuilt))


def test_the_same_block_gives_the_same_bits_whatever_ran_before() -> None:
    """Dropout, drop-path, mixing, jitter and masks are keyed; BatchNorm's running statistics do not enter a loss."""
    module = build_train_module(config_with(), CLASSES)
    first = module(block(5), 1.0)
    module(block(6), 1.0)
    torch.rand(1000)
    again = module(block(5), 1.0)
    other = module(block(6), 1.0)
    assert {k: v.item() for k, v in first.losses.items()} == {k: v.item() for k, v in again.losses.items()}
    assert first.total.item() != other.total.item()


def test_masks_are_keyed_by_position() -> None:
    module = build_train_module(config_with(), CLASSES)
    masks = keyed_masks(module.step_inputs(block(3)), (16, 16), MFMSection())
    assert torch.equal(masks, keyed_masks(module.step_inputs(block(3)), (16, 16), MFMSection()))
    assert not torch.equal(masks[0], masks[1])
    many = torch.cat([keyed_masks(module.step_inputs(block(n)), (16, 16), MFMSection()) for n in range(40)])
    assert many.float().mean().item() == pytest.approx(0.4, abs=0.01)


def test_hidden_loss_counts_hidden_pixels_alone_and_weighs_them_alike_at_any_ratio() -> None:
    module = build_train_module(config_with("self_training.pseudo_threshold=0", "mfm.mask_ratio=1"), CLASSES)
    hidden = build_train_module(
        config_with("self_training.pseudo_threshold=0", "mfm.mask_ratio=1", "mfm.loss_on=hidden"), CLASSES
    )
    # With everything hidden, "hidden" and "all" are the same loss.
    assert module(block(), 1.0).losses["mfm"].item() == pytest.approx(hidden(block(), 1.0).losses["mfm"].item())
    nothing = build_train_module(
        config_with("self_training.pseudo_threshold=0", "mfm.mask_ratio=0", "mfm.loss_on=hidden"), CLASSES
    )
    assert nothing(block(), 1.0).losses["mfm"].item() == 0.0


@pytest.mark.parametrize(("weight", "update_bn"), [(0.0, "true"), (1.0, "false"), (1.0, "true")])
def test_the_mfm_pass_touches_batch_norm_statistics_only_when_asked(weight: float, update_bn: str) -> None:
    def statistics(*overrides: str, lam: float = weight) -> list[Tensor]:
        module = build_train_module(config_with("method.name=source_only", *overrides), CLASSES)
        module(block(), lam)
        return running_statistics(module.student)

    touched = statistics(f"mfm.update_bn={update_bn}")
    plain = statistics("mfm.enabled=false")
    same = all(torch.equal(a, b) for a, b in zip(touched, plain, strict=True))
    assert same == (weight == 0.0 or update_bn == "false")


def test_untracked_batch_norm_still_normalises_with_the_batch() -> None:
    layer = nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5) * 3 + 1
    with batch_norm_untracked(layer):
        inside = layer(x)
    assert layer.running_mean is not None
    assert not layer.running_mean.any()
    assert torch.equal(inside, layer(x))
    assert layer.running_mean.any()


def test_teacher_is_frozen_without_dropout_on_batch_statistics() -> None:
    module = build_train_module(config_with(), CLASSES)
    teacher = module.teacher
    assert teacher is not None
    before = [b.clone() for b in running_statistics(teacher.segmentor)]
    image = normalise(block().target_image)
    for mode in (True, False, True):
        module.train(mode)
        first = teacher(image)
        assert torch.equal(first, teacher(image))  # no dropout in any mode
        # Batch statistics: the answer to an image depends on its neighbour in the batch.
        assert not torch.allclose(first[:1], teacher(image[:1]), atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, running_statistics(teacher.segmentor), strict=True))


def test_mfm_changes_neither_the_students_start_nor_its_inference() -> None:
    """The Rebuilder costs nothing at inference: parameters and logits are those of the plain segmentor."""
    plain = build_train_module(config_with("mfm.enabled=false"), CLASSES).student
    with_mfm = build_train_module(config_with(), CLASSES).student
    alone = build_student(config_with(), CLASSES)
    image = normalise(block().target_image)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in with_mfm.named_parameters()]
    assert sum(p.numel() for p in with_mfm.parameters()) == sum(p.numel() for p in alone.parameters())
    assert torch.equal(plain.eval()(image), with_mfm.eval()(image))


def test_inference_costs_the_flops_of_the_plain_segmentor() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(student: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            student.eval()(torch.zeros(1, 3, 64, 64))
        return counter.get_total_flops()

    assert flops(build_train_module(config_with(), CLASSES).student) == flops(build_student(config_with(), CLASSES)) > 0


def test_source_only_needs_no_teacher_unless_mfm_asks_for_one() -> None:
    assert build_train_module(config_with("method.name=source_only", "mfm.enabled=false"), CLASSES).teacher is None
    assert build_train_module(config_with("method.name=source_only"), CLASSES).teacher is not None


@pytest.mark.parametrize("method", ["dacs", "hrda"])
def test_labelled_target_images_are_one_more_supervised_term_of_a_weight_of_its_own(method: str) -> None:
    """As the source's of the same method: the same images and labels give the same loss, but for what is drawn."""
    plain = ["model.decoder_options={width: 16, dropout: 0}", f"method.name={method}", "data.crop=128x128"]
    module = build_train_module(
        config_with(*plain, "data.target_labelled=few", "method.target_labelled_weight=3"), CLASSES
    )
    batch, few = block(3, 128), block(4, 128)
    batch = replace(batch, labelled_target_image=few.source_image, labelled_target_label=few.source_label)
    assert module.term_names[-2:] == ("target_labelled", "mfm")
    output = module(batch, 1.0, only="target_labelled")
    details = {"target_labelled": 0.9, "target_labelled_detail": 0.1} if method == "hrda" else {"target_labelled": 1.0}
    assert set(output.losses) == {*details, "pseudo_weight"}
    expected = sum(3 * weight * output.losses[name] for name, weight in details.items())
    assert float(output.total.detach()) == pytest.approx(float(expected))
    if method == "dacs":
        logits = F.interpolate(module.student(normalise(few.source_image)), size=(128, 128), mode="bilinear")
        assert float(F.cross_entropy(logits, few.source_label.long())) == pytest.approx(
            float(output.losses["target_labelled"])
        )
    output.total.backward()
    assert all(p.grad is not None for p in module.student.parameters())
    assert all(p.grad is None for p in module.rebuilder.parameters())  # type: ignore[union-attr]
    without = build_train_module(config_with(*plain), CLASSES)
    assert "target_labelled" not in without.term_names
