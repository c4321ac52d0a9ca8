"""What lets the Rebuilder grow: bounded logits and branches, a trunk of visible cells."""

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
    largest_logit,
    token_variation,
)

STABLE = {**VARIANTS["stable"]["rebuilder"], "qk_norm": True}
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


# What branches add


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


# Rates


def test_wide_matrices_are_all_whose_inputs_grow_with_the_width() -> None:
    with torch.device("meta"):
        narrow, wide = rebuilder_with(**STABLE, width=16), rebuilder_with(**STABLE, width=32)
    found = {id(p) for p in narrow.wide_matrices()}
    for (name, parameter), larger in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        inputs = 0 if isinstance(narrow.get_submodule(name.rpartition(".")[0]), nn.ConvTranspose2d) else 1
        grows = parameter.ndim > 1 and larger.shape[inputs] > parameter.shape[inputs]
        assert (id(parameter) in found) == grows, name
