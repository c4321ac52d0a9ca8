"""The Rebuilder and its masks against the paper: sizes, what is hidden and kept, and slow references."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mfm_dist.errors import ConfigError
from mfm_dist.models.rebuilder import Attention, Block, Projector, Rebuilder, sine_cosine_positions

MIT_B5 = {"channels": (64, 128, 320, 512), "strides": (4, 8, 16, 32), "embed_channels": 512}
SMALL = {"channels": (4, 6, 8, 10), "strides": (4, 8, 16, 32), "embed_channels": 10, "width": 16, "num_heads": 4}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def encoder_maps(rows: int, cols: int, batch: int = 2) -> list[Tensor]:
    """Maps of the SMALL encoder for a rows x cols image; odd sizes round up."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(batch, channels, math.ceil(rows / stride), math.ceil(cols / stride), generator=generator)
        for channels, stride in zip(SMALL["channels"], SMALL["strides"], strict=True)
    ]


def small_rebuilder(**changes: object) -> Rebuilder:
    torch.manual_seed(0)
    return Rebuilder(**{**SMALL, **changes})


def half_mask(batch: int, grid: tuple[int, int], ratio: float = 0.5) -> Tensor:
    return torch.rand(batch, *grid, generator=torch.Generator().manual_seed(7)) < ratio


def is_hidden(mask: Tensor, rows: int, cols: int) -> Tensor:
    """Slow nearest enlargement: place (i, j) of a rows x cols map lies in cell (i * grid rows // rows, ...)."""
    out = torch.empty(mask.shape[0], rows, cols, dtype=torch.bool)
    for i in range(rows):
        for j in range(cols):
            out[:, i, j] = mask[:, i * mask.shape[1] // rows, j * mask.shape[2] // cols]
    return out


# Size


def test_parameter_counts_of_the_paper_for_mit_b5() -> None:
    with torch.device("meta"):
        rebuilder = Rebuilder(**MIT_B5)
    assert count(rebuilder.embed) == 262_656
    assert rebuilder.mask_token.numel() + count(rebuilder.blocks) + count(rebuilder.norm) == 6_306_304
    assert [count(projector) for projector in rebuilder.projectors] == [2_893_248, 2_639_104, 2_180_288, 263_680]
    assert count(rebuilder) == 14_545_280


def test_parameter_count_of_the_paper_for_a_single_scale() -> None:
    with torch.device("meta"):
        assert count(Rebuilder(channels=(2048,), strides=(8,), embed_channels=2048)) == 10_246_016


@pytest.mark.parametrize("grid", [8, 16, 32, 64])
@pytest.mark.parametrize("size", [(128, 256), (512, 512), (1024, 1024), (513, 1025)])
def test_shapes_of_the_full_size_rebuilder(size: tuple[int, int], grid: int) -> None:
    with torch.device("meta"):
        rebuilder = Rebuilder(**MIT_B5, grid=grid)
        maps = [
            torch.empty(2, channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
            for channels, stride in zip(MIT_B5["channels"], MIT_B5["strides"], strict=True)
        ]
        fused = rebuilder(maps[-1], maps, torch.empty(2, grid, grid, dtype=torch.bool))
    assert [out.shape for out in fused] == [feature.shape for feature in maps]


@pytest.mark.parametrize(
    ("grid", "doublings"),
    [
        (8, [4, 3, 2, 1]),
        (16, [3, 2, 1, 0]),
        (32, [2, 1, 0, 0]),
        (64, [1, 0, 0, 0]),
        (24, [2, 1, 0, 0]),
        ((8, 16), [3, 2, 1, 0]),
    ],
)
def test_transposed_convolutions_per_scale(grid: int | tuple[int, int], doublings: list[int]) -> None:
    rebuilder = small_rebuilder(grid=grid)
    found = [sum(isinstance(layer, nn.ConvTranspose2d) for layer in projector) for projector in rebuilder.projectors]
    assert found == doublings


# Masking and fusing


@pytest.mark.parametrize("grid", [8, 16, 32, 64, (8, 16), (5, 9)])
@pytest.mark.parametrize("size", [(128, 256), (512, 512), (1024, 1024), (513, 1025)])
def test_visible_places_keep_their_bits_and_hidden_ones_change(
    size: tuple[int, int], grid: int | tuple[int, int]
) -> None:
    rebuilder = small_rebuilder(grid=grid)
    maps = encoder_maps(*size, batch=1)
    mask = half_mask(1, rebuilder.grid)
    with torch.no_grad():
        fused = rebuilder(maps[-1], maps, mask)
    for feature, out in zip(maps, fused, strict=True):
        hidden = nn.functional.interpolate(mask[:, None].float(), feature.shape[-2:], mode="nearest").bool()
        hidden = hidden.expand_as(feature)
        assert out.shape == feature.shape
        assert out.isfinite().all()
        assert torch.equal(out[~hidden], feature[~hidden])
        assert (out[hidden] != feature[hidden]).float().mean() > 0.99


@pytest.mark.parametrize("size", [(128, 256), (160, 96), (129, 257)])
@pytest.mark.parametrize("grid", [4, (3, 5), 16])
def test_the_mask_is_enlarged_to_the_nearest_cell(size: tuple[int, int], grid: int | tuple[int, int]) -> None:
    rebuilder = small_rebuilder(grid=grid)
    maps = encoder_maps(*size)
    mask = half_mask(2, rebuilder.grid)
    for feature, out in zip(maps, rebuilder(maps[-1], maps, mask), strict=True):
        changed = (out != feature).any(1)
        assert torch.equal(changed, is_hidden(mask, *feature.shape[-2:]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_hidden_returns_the_features_bit_for_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    rebuilder = small_rebuilder()
    maps = [feature.to(dtype).contiguous(memory_format=layout) for feature in encoder_maps(128, 256)]
    mask = torch.zeros(2, *rebuilder.grid, dtype=torch.bool)
    fused = rebuilder(maps[-1].float(), maps, mask)
    for feature, out in zip(maps, fused, strict=True):
        assert torch.equal(out, feature)
        assert out.dtype == feature.dtype
        assert out.stride() == feature.stride()


def test_autocast_keeps_the_type_and_bits_of_visible_features() -> None:
    rebuilder = small_rebuilder()
    maps = encoder_maps(128, 128)
    mask = half_mask(2, rebuilder.grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = rebuilder(maps[-1], maps, mask)
    for feature, out in zip(maps, fused, strict=True):
        visible = ~is_hidden(mask, *feature.shape[-2:])[:, None].expand_as(feature)
        assert out.dtype == torch.float32
        assert torch.equal(out[visible], feature[visible])


def test_what_is_hidden_cannot_be_seen() -> None:
    # On a grid as fine as the last map, the features of hidden cells must not matter; those of visible cells must.
    rebuilder = small_rebuilder(grid=4)
    maps = encoder_maps(128, 128)
    mask = half_mask(2, rebuilder.grid)
    rebuilt = rebuilder(maps[-1], maps, mask)
    other = torch.randn_like(maps[-1])
    hidden_changed = torch.where(mask[:, None], other, maps[-1])
    visible_changed = torch.where(mask[:, None], maps[-1], other)
    for before, same, different in zip(
        rebuilt, rebuilder(hidden_changed, maps, mask), rebuilder(visible_changed, maps, mask), strict=True
    ):
        assert torch.equal(before, same)
        assert not torch.equal(before, different)


def test_the_rebuilder_adds_no_randomness_of_its_own() -> None:
    rebuilder = small_rebuilder().train()
    maps = encoder_maps(128, 128)
    mask = half_mask(2, rebuilder.grid)
    first, second = rebuilder(maps[-1], maps, mask), rebuilder(maps[-1], maps, mask)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_images_of_a_batch_do_not_mix() -> None:
    rebuilder = small_rebuilder()
    maps = encoder_maps(128, 128)
    mask = half_mask(2, rebuilder.grid)
    together = rebuilder(maps[-1], maps, mask)
    alone = rebuilder(maps[-1][1:], [feature[1:] for feature in maps], mask[1:])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:], b)


# Gradients


def test_gradients_reach_features_mask_token_and_every_parameter() -> None:
    rebuilder = small_rebuilder()
    maps = [feature.requires_grad_() for feature in encoder_maps(128, 128)]
    last = torch.randn_like(maps[-1]).requires_grad_()
    mask = half_mask(2, rebuilder.grid)
    weights = [torch.randn_like(feature) for feature in maps]
    fused = rebuilder(last, maps, mask)
    sum((out * weight).sum() for out, weight in zip(fused, weights, strict=True)).backward()
    for name, parameter in rebuilder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert last.grad is not None
    assert last.grad.any()
    for feature, weight in zip(maps, weights, strict=True):
        hidden = is_hidden(mask, *feature.shape[-2:])[:, None].expand_as(feature)
        assert feature.grad is not None
        assert torch.equal(feature.grad, torch.where(hidden, 0.0, weight))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_every_parameter_gets_a_gradient_tensor_at_the_extremes(ratio: float) -> None:
    # Zero is fine, None is not: a distributed engine waits for every parameter in every step.
    rebuilder = small_rebuilder()
    maps = encoder_maps(128, 128)
    fused = rebuilder(maps[-1], maps, half_mask(2, rebuilder.grid, ratio))
    sum(out.square().sum() for out in fused).backward()
    for name, parameter in rebuilder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


# The transformer


def test_positions_against_a_slow_loop() -> None:
    rows, cols, width = 3, 5, 16
    expected = torch.empty(rows * cols, width)
    for row in range(rows):
        for col in range(cols):
            values = []
            for coordinate in (row, col):
                angles = [coordinate / 10000 ** (i / (width // 4)) for i in range(width // 4)]
                values += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            expected[row * cols + col] = torch.tensor(values)
    torch.testing.assert_close(sine_cosine_positions(rows, cols, width), expected)


def test_positions_differ_between_all_cells_of_a_fine_grid() -> None:
    table = sine_cosine_positions(64, 64, 32)
    assert torch.unique(table, dim=0).shape[0] == 64 * 64


def test_positions_are_fixed_and_not_saved() -> None:
    rebuilder = small_rebuilder()
    assert "positions" in dict(rebuilder.named_buffers())
    assert "positions" not in rebuilder.state_dict()
    assert torch.equal(rebuilder.positions, sine_cosine_positions(16, 16, 16))


def _slow_attention(attention: Attention, x: Tensor) -> Tensor:
    """One head, one query at a time."""
    batch, cells, width = x.shape
    size = width // attention.attend.num_heads
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=2)
    out = torch.empty_like(x)
    for b in range(batch):
        for head in range(attention.attend.num_heads):
            part = slice(head * size, (head + 1) * size)
            for i in range(cells):
                scores = torch.stack([q[b, i, part] @ k[b, j, part] / math.sqrt(size) for j in range(cells)])
                share = scores.exp() / scores.exp().sum()
                out[b, i, part] = sum(share[j] * v[b, j, part] for j in range(cells))
    return out @ attention.proj.weight.T + attention.proj.bias


@torch.no_grad()
def test_attention_against_a_slow_reference() -> None:
    torch.manual_seed(0)
    attention = Attention(12, 3)
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(attention(x), _slow_attention(attention, x))


@torch.no_grad()
def test_block_against_a_slow_reference() -> None:
    torch.manual_seed(0)
    block = Block(12, 3, 4.0)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

    def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    x = torch.randn(2, 7, 12)
    after_attention = x + _slow_attention(block.attention, layer_norm(x, block.norm1))
    first, _, second = block.mlp
    hidden = layer_norm(after_attention, block.norm2) @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    assert hidden.shape == (2, 7, 48)
    expected = after_attention + hidden @ second.weight.T + second.bias
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_forward_against_the_paper_written_out() -> None:
    rebuilder = small_rebuilder(grid=4)
    maps = encoder_maps(128, 128)
    mask = half_mask(2, rebuilder.grid)
    last = maps[-1]
    cells = torch.empty(2, 16, 16)
    for b in range(2):
        for row in range(4):
            for col in range(4):
                token = rebuilder.embed(last[b, :, row, col])
                cells[b, row * 4 + col] = rebuilder.mask_token if mask[b, row, col] else token
    cells = cells + sine_cosine_positions(4, 4, 16)
    for block in rebuilder.blocks:
        cells = block(cells)
    grid = rebuilder.norm(cells).reshape(2, 4, 4, 16).permute(0, 3, 1, 2)
    # 512 / (32 x 4) = 4: two doublings for the coarsest map, which a 128-pixel image has at 4 x 4.
    first, norm, _, second, narrow, last_norm = rebuilder.projectors[3]
    x = nn.functional.conv_transpose2d(grid, first.weight, first.bias, stride=2, padding=1)
    normed = nn.functional.layer_norm(x.movedim(1, 3), (8,), norm.weight, norm.bias, eps=1e-6).movedim(3, 1)
    x = nn.functional.gelu(normed)
    x = nn.functional.conv_transpose2d(x, second.weight, second.bias, stride=2, padding=1)
    x = torch.einsum("oc,bchw->bohw", narrow.weight[:, :, 0, 0], x) + narrow.bias[None, :, None, None]
    x = nn.functional.layer_norm(x.movedim(1, 3), (10,), last_norm.weight, last_norm.bias, eps=1e-6).movedim(3, 1)
    x = nn.functional.interpolate(x, size=(4, 4), mode="bilinear", align_corners=False)
    expected = torch.where(mask[:, None], x, last)
    torch.testing.assert_close(rebuilder(last, maps, mask)[3], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("doublings", [0, 1, 2, 3])
def test_a_projector_is_the_one_built_of_timms_layer_norm_bit_for_bit(doublings: int) -> None:
    torch.manual_seed(0)
    projector = Projector(16, 6, doublings)
    widths = [16, 8, 4, 4]
    layers: list[nn.Module] = []
    for index in range(doublings):
        layers += [LayerNorm2d(widths[index]), nn.GELU()] if index else []
        layers.append(nn.ConvTranspose2d(widths[index], widths[index + 1], kernel_size=4, stride=2, padding=1))
    reference = nn.Sequential(*layers, nn.Conv2d(widths[doublings], 6, kernel_size=1), LayerNorm2d(6))
    for norm in projector:
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    reference.load_state_dict(projector.state_dict())
    # Small values, so that the epsilon shows in every bit that it touches.
    cells = torch.randn(2, 16, 4, 5) * 1e-2
    assert torch.equal(projector(cells), reference(cells))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    rebuilder = Rebuilder(**{**MIT_B5, "width": 256})
    assert abs(rebuilder.mask_token.std().item() / 0.02 - 1) < 0.2
    for name, module in rebuilder.named_modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert not module.bias.any(), name
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-6 if "projectors" in name else 1e-5), name


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18, "num_heads": 3}, r"rebuilder\.width=18 is not divisible by 4"),
        ({"width": 16, "num_heads": 3}, r"rebuilder\.width=16 is not divisible by rebuilder\.heads=3"),
        ({"width": 0}, r"rebuilder\.width must be at least 1"),
        ({"depth": 0}, r"rebuilder\.depth must be at least 1"),
        ({"num_heads": 0}, r"rebuilder\.heads must be at least 1"),
        ({"mlp_ratio": 0.0}, r"rebuilder\.mlp_ratio=0\.0 leaves no hidden units"),
        ({"grid": 0}, r"rebuilder\.grid must be a positive integer"),
        ({"grid": (4, -1)}, r"rebuilder\.grid must be a positive integer"),
        ({"grid": (4, 4, 4)}, r"rebuilder\.grid must be a positive integer"),
    ],
)
def test_bad_numbers_are_config_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_rebuilder(**changes)


def test_all_bad_numbers_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        small_rebuilder(width=18, num_heads=4, depth=0, grid=0)
    assert len(caught.value.problems) == 4


def test_a_mask_of_another_grid_is_refused() -> None:
    maps = encoder_maps(128, 128)
    with pytest.raises(AssertionError, match="grid"):
        small_rebuilder(grid=8)(maps[-1], maps, torch.zeros(2, 16, 16, dtype=torch.bool))
