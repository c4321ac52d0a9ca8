"""What lets the Rebuilder grow: bounded logits, scaled branches, a trunk of visible cells, filled holes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mfm_dist.config.variants import VARIANTS
from mfm_dist.errors import ConfigError
from mfm_dist.methods.mfm import draw_mask
from mfm_dist.models.rebuilder import (
    Attend,
    Attention,
    Block,
    CrossAttention,
    Rebuilder,
    correct_filled,
    fill_from_neighbours,
    largest_logit,
    token_variation,
)

STABLE = {**VARIANTS["stable"]["rebuilder"], "qk_norm": True, "fill": True}
"""The variant, and what can be added to it."""


def rebuilder_with(**changes: object) -> Rebuilder:
    torch.manual_seed(0)
    settings = {
        "channels": (5, 6),
        "strides": (8, 16),
        "embed_channels": 6,
        "width": 16,
        "num_heads": 2,
        "grid": (4, 8),
    }
    return Rebuilder(**{**settings, **changes})  # type: ignore[arg-type]


def maps_of(batch: int = 2, seed: int = 1) -> list[Tensor]:
    """Maps of a 64 x 128 image."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 5, 8, 16), (batch, 6, 4, 8)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def exact_mask(batch: int = 2, ratio: float = 0.5) -> Tensor:
    return draw_mask(batch, (4, 8), ratio, torch.Generator().manual_seed(3), exact=True)


# Queries and keys


@torch.no_grad()
def test_normalised_queries_and_keys_bound_the_logits_however_large_the_input() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, qk_norm=True)
    attention.attend.largest = torch.tensor(-math.inf)
    for size in (1.0, 1e3):
        attention(size * torch.randn(1, 9, 16))
    # Both vectors have norm sqrt(8) at most, and the scale is 1 / sqrt(8).
    assert 0 < float(attention.attend.largest) <= math.sqrt(8) + 1e-4
    plain = Attention(16, 2)
    plain.attend.largest = torch.tensor(-math.inf)
    plain(1e3 * torch.randn(1, 9, 16))
    assert float(plain.attend.largest) > 1e3


def test_the_largest_logit_is_that_of_all_of_them() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1100, 4), torch.randn(2, 30, 4)
    assert float(largest_logit(q, k)) == pytest.approx(float((q @ k.mT / 2).max()))


def test_forwards_are_measured_in_the_context_alone() -> None:
    rebuilder, maps = rebuilder_with(depth=3, readout=2), maps_of()

    def measured(*sizes: float) -> dict[str, float]:
        with rebuilder.measuring() as found:
            for size in sizes:
                rebuilder(size * maps[-1], maps, exact_mask())
        assert not rebuilder.norm._forward_hooks
        return {name: float(value) for name, value in found.items()}

    once, large, both = measured(1.0), measured(1e3), measured(1.0, 1e3)
    assert sorted(once) == ["max_logit", "token_variation"]
    assert both["max_logit"] == max(once["max_logit"], large["max_logit"])
    assert both["token_variation"] == pytest.approx((once["token_variation"] + large["token_variation"]) / 2)
    assert all(module.largest is None for module in rebuilder.modules() if isinstance(module, Attend))


def test_tokens_that_are_all_alike_have_no_variation() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 2.0], [0.0, -2.0]]])
    assert float(token_variation(tokens)) == 1.0
    assert float(token_variation(tokens + torch.tensor([3.0, 0.0]))) == pytest.approx(2.5 / 11.5)
    assert float(token_variation(torch.ones(2, 3, 4))) == pytest.approx(0.0, abs=1e-6)


@torch.no_grad()
def test_cross_attention_against_a_slow_reference() -> None:
    torch.manual_seed(0)
    attention, x, context = CrossAttention(12, 3), torch.randn(1, 4, 12), torch.randn(1, 5, 12)
    q, k, v = attention.q(x)[0], *attention.kv(context)[0].chunk(2, dim=1)
    out = torch.empty(4, 12)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        for i in range(4):
            share = torch.stack([(q[i, part] @ k[j, part] / 2).exp() for j in range(5)])
            out[i, part] = sum(share[j] / share.sum() * v[j, part] for j in range(5))
    torch.testing.assert_close(attention(x, context)[0], attention.proj(out))


# Depth


@torch.no_grad()
def test_depth_scaling_divides_the_branches_of_more_blocks_than_the_papers() -> None:
    for depth, scale in ((1, 1.0), (2, 1.0), (8, 0.25)):
        assert {block.scale for block in rebuilder_with(depth=depth, depth_scaling=True).blocks} == {scale}
    torch.manual_seed(0)
    block = Block(16, 2, 4.0, scale=0.25)
    x = torch.randn(1, 5, 16)
    after = x + block.attention(block.norm1(x)) / 4
    torch.testing.assert_close(block(x), after + block.mlp(block.norm2(after)) / 4)


@torch.no_grad()
def test_a_norm_of_what_branches_add_bounds_the_stream_whatever_their_weights() -> None:
    def largest(**norms: bool) -> float:
        """Norm of tokens after the trunk over that of its input, biases of the branches a thousand times too large."""
        rebuilder, maps, sizes = rebuilder_with(depth=4, readout=2, **norms), maps_of(), []
        for block in [*rebuilder.blocks, *rebuilder.readout]:
            block.attention.proj.bias.fill_(1e3)
            block.mlp[-1].bias.fill_(1e3)
            block.register_forward_hook(lambda _module, _inputs, out: sizes.append(float(out.square().mean().sqrt())))
        rebuilder(maps[-1], maps, exact_mask())
        return max(sizes)

    assert largest() > 1e3
    # Each of 12 branches adds a vector of root mean square 0.1, to tokens and positions of about 1.
    assert largest(peri_norm=True) < 3
    scaled = Block(16, 2, 4.0, peri_norm=True, scale=0.25)
    torch.nn.init.normal_(scaled.out_norm1.weight)
    x = torch.randn(1, 5, 16)
    after = x + scaled.out_norm1(scaled.attention(scaled.norm1(x))) / 4
    torch.testing.assert_close(scaled(x), after + scaled.out_norm2(scaled.mlp(scaled.norm2(after))) / 4)


# The trunk of visible cells


@torch.no_grad()
def test_what_is_hidden_reaches_no_cell_and_each_hidden_cell_reads_by_itself() -> None:
    rebuilder, maps, mask = rebuilder_with(readout=2), maps_of(), exact_mask()
    cells = rebuilder._rebuild(maps[-1], mask, None)
    otherwise = torch.where(mask[:, None], 100.0, maps[-1])
    assert torch.equal(rebuilder._rebuild(otherwise, mask, None), cells)
    # Slow: one image and one hidden cell at a time, all others in their places.
    tokens = rebuilder.embed(maps[-1].permute(0, 2, 3, 1)).flatten(1, 2)
    for b in range(2):
        places = [i for i in range(32) if not mask[b].flatten()[i]]
        x = torch.stack([rebuilder.always_visible, *(tokens[b, i] + rebuilder.positions[i] for i in places)])[None]
        for block in rebuilder.blocks:
            x = block(x)
        visible = rebuilder.norm(x)
        for i in range(32):
            if i in places:
                expected = visible[0, 1 + places.index(i)]
            else:
                query = (rebuilder.mask_token + rebuilder.positions[i])[None, None]
                for block in rebuilder.readout:
                    query = block(query, visible)
                expected = query[0, 0]
            torch.testing.assert_close(cells[b].flatten(1)[:, i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_any_share_can_be_hidden_and_trains_every_parameter(ratio: float) -> None:
    rebuilder, maps, mask = rebuilder_with(**STABLE), maps_of(), exact_mask(ratio=ratio)
    rebuilt = rebuilder(maps[-1], maps, mask)
    assert all(out.isfinite().all() for out in rebuilt)
    sum(out.square().sum() for out in rebuilt).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in rebuilder.parameters())
    if ratio == 0.5:
        assert [name for name, p in rebuilder.named_parameters() if not p.grad.any()] == []  # type: ignore[union-attr]


def test_images_that_hide_different_numbers_of_cells_are_refused() -> None:
    mask = torch.zeros(2, 4, 8, dtype=torch.bool)
    mask[0, 0, 0] = True
    maps = maps_of()
    with pytest.raises(ConfigError, match=r"mfm\.mask=exact"):
        rebuilder_with(readout=1)(maps[-1], maps, mask)


# Filling


def test_a_new_rebuilder_that_fills_stays_near_what_the_neighbours_say() -> None:
    maps, mask = maps_of(), exact_mask(ratio=0.25)
    rebuilt = rebuilder_with(**STABLE)(maps[-1], maps, mask)
    for out, feature in zip(rebuilt, maps, strict=True):
        hidden = nn.functional.interpolate(mask[:, None].float(), feature.shape[-2:]) > 0.5
        difference = (out - fill_from_neighbours(feature, hidden))[hidden.expand_as(out)]
        assert 0.3 < difference.square().mean().sqrt() < 0.6  # the maps have a deviation of 1
        assert torch.equal(out[~hidden.expand_as(out)], feature[~hidden.expand_as(out)])


def test_a_correction_is_in_units_of_the_channel_and_stays_within_it() -> None:
    feature = (
        torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    )
    feature[:, 0].clamp_(min=0.0)  # as after a ReLU
    mask = draw_mask(2, (4, 4), 0.5, torch.Generator().manual_seed(1))
    hidden = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    filled = fill_from_neighbours(feature, hidden)
    correction = torch.full((2, 3, 4, 4), 0.1)
    out = correct_filled(correction, feature, mask)
    for c in range(3):
        seen = feature[:, c][~hidden[:, 0]]
        expected = (filled[:, c] + 0.1 * seen.std(unbiased=False)).clamp(seen.min(), seen.max())[hidden[:, 0]]
        torch.testing.assert_close(out[:, c][hidden[:, 0]], expected)
    far = correct_filled(-1e3 * torch.ones(2, 3, 4, 4), feature, mask)
    assert far[:, 0].min() == 0.0, "a map that ends in a ReLU stays one"


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
    out = correct_filled(torch.full((2, 3, 4, 4), 0.5), feature, torch.ones(2, 4, 4, dtype=torch.bool))
    torch.testing.assert_close(out, torch.full_like(out, 0.5))


# Rates


def test_wide_matrices_are_all_whose_inputs_grow_with_the_width() -> None:
    with torch.device("meta"):
        narrow, wide = rebuilder_with(**STABLE, width=16), rebuilder_with(**STABLE, width=32)
    found = {id(p) for p in narrow.wide_matrices()}
    for (name, parameter), larger in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        inputs = 0 if isinstance(narrow.get_submodule(name.rpartition(".")[0]), nn.ConvTranspose2d) else 1
        grows = parameter.ndim > 1 and larger.shape[inputs] > parameter.shape[inputs]
        assert (id(parameter) in found) == grows, name
