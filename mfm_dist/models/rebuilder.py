"""The Rebuilder of Masked Feature Modeling (arXiv 2509.13801): hide part of an encoder's features, rebuild it.

It exists during training only. The last encoder map, brought to a fixed grid of cells, loses the hidden cells; a small
transformer fills them in from the visible ones; one projector for each map that the decoder reads carries the result
back to that map, where it replaces the hidden places and only those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_dist.errors import ConfigError
from mfm_dist.models.layers import ChannelLayerNorm, resize

NOMINAL_INPUT = 512
"""Side, in pixels, of the published training crop; the projectors are sized for it and resize for any other."""

PROJECTOR_EPS = 1e-6
"""Of the projectors' norms: the authors' code (arXiv 2509.13801) has timm's ``LayerNorm2d`` with its default there, and
1e-5 in the transformer's."""

TEMPERATURE = 10_000
"""Slowest wavelength of the position table, in units of 2 pi cells (paper)."""


def sine_cosine_positions(rows: int, cols: int, width: int) -> Tensor:
    """Return the fixed 2-D position table, float32 [rows x cols, width], cells in row-major order.

    The first half of the channels encodes the row, the second half the column; within a half, sines come before
    cosines, from the fastest frequency (1 radian a cell) to the slowest (1 / ``TEMPERATURE``).
    """
    quarter = width // 4
    frequencies = TEMPERATURE ** -(torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [count, width / 2]

    by_row = encode(rows)[:, None].expand(rows, cols, width // 2)
    by_col = encode(cols)[None].expand(rows, cols, width // 2)
    return torch.cat([by_row, by_col], dim=2).flatten(0, 1).float()


class Attention(nn.Module):
    """Multi-head self-attention over all cells of the grid; memory grows linearly with their number."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Let every cell attend to all: [B, N, width] -> [B, N, width]."""
        # [B, N, 3 x width] -> [B, N, 3, heads, width / heads] -> [3, B, heads, N, width / heads]
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and perceptron to the input: [B, N, width] -> [B, N, width]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Projector(nn.Sequential):
    """From the grid to one encoder map: ``doublings`` transposed convolutions, a 1x1 convolution, a channel norm.

    The first transposed convolution halves the width, the second halves it again, further ones keep it (paper).
    """

    def __init__(self, width: int, out_channels: int, doublings: int) -> None:
        layers: list[nn.Module] = []
        channels = width
        for index in range(doublings):
            if index > 0:
                layers += [ChannelLayerNorm(channels, eps=PROJECTOR_EPS), nn.GELU()]
            narrowed = width // 2 if index == 0 else width // 4
            layers.append(nn.ConvTranspose2d(channels, narrowed, kernel_size=4, stride=2, padding=1))
            channels = narrowed
        layers += [nn.Conv2d(channels, out_channels, 1), ChannelLayerNorm(out_channels, eps=PROJECTOR_EPS)]
        super().__init__(*layers)


class Rebuilder(nn.Module):
    """Rebuilds the hidden part of encoder maps from the visible part.

    Args:
        channels: channels of the maps to rebuild, fine to coarse.
        strides: image pixels for each position of these maps.
        embed_channels: channels of the last encoder map, the only one that is embedded.
        width: channels of the transformer (512 in the paper); divisible by ``num_heads`` and by 4.
        depth: number of transformer blocks (2 in the paper).
        num_heads: attention heads (16 in the paper).
        mlp_ratio: hidden width of a block's perceptron over ``width`` (4 in the paper).
        grid: cells in each direction, or (rows, cols) (16 in the paper).

    Attributes:
        grid: (rows, cols), the shape of an image's mask.

    Raises:
        ConfigError: a number that cannot be used; all of them are listed.
    """

    positions: Tensor

    def __init__(
        self,
        *,
        channels: Sequence[int],
        strides: Sequence[int],
        embed_channels: int,
        width: int = 512,
        depth: int = 2,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        grid: int | Sequence[int] = 16,
    ) -> None:
        super().__init__()
        rows, cols = _check(width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, grid=grid)
        self.grid = (rows, cols)
        self.embed = nn.Linear(embed_channels, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer("positions", sine_cosine_positions(rows, cols, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.projectors = nn.ModuleList(
            Projector(width, channel, _doublings(stride, self.grid))
            for channel, stride in zip(channels, strides, strict=True)
        )
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(_init_linear)

    def forward(self, last_feature: Tensor, features: list[Tensor], mask: Tensor) -> list[Tensor]:
        """Replace the hidden part of ``features`` by what the visible part of ``last_feature`` suggests.

        Args:
            last_feature: last encoder map [B, embed_channels, h, w].
            features: the maps to rebuild, the i-th [B, channels[i], h_i, w_i].
            mask: bool [B, rows, cols] over the grid; True means hidden.

        Returns:
            Maps of the shapes and types of ``features``; a visible place holds the very bits of its feature.
        """
        cells = self._rebuild(last_feature, mask)
        return [
            _fuse(projector(cells), feature, mask) for projector, feature in zip(self.projectors, features, strict=True)
        ]

    def _rebuild(self, last_feature: Tensor, mask: Tensor) -> Tensor:
        """Rebuild the grid [B, width, rows, cols] of last maps [B, embed_channels, h, w] masked by [B, rows, cols]."""
        assert mask.shape[1:] == self.grid, f"mask of shape {tuple(mask.shape)} for a grid of {self.grid}"
        embedded = self.embed(last_feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, width, h, w]
        tokens = resize(embedded, self.grid).flatten(2).transpose(1, 2)  # [B, rows x cols, width]
        # Positions come after masking: a hidden cell says where it is, and nothing else.
        tokens = torch.where(mask.flatten(1)[..., None], self.mask_token, tokens) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens).transpose(1, 2).unflatten(2, self.grid)


def _fuse(rebuilt: Tensor, feature: Tensor, mask: Tensor) -> Tensor:
    """Take rebuilt values [B, C, h', w'] where the mask hides, those of ``feature`` [B, C, h, w] elsewhere."""
    size = feature.shape[-2:]
    hidden = F.interpolate(mask[:, None].float(), size=size, mode="nearest") > 0.5  # [B, 1, h, w]
    # The feature's own type and memory layout: with nothing hidden, the decoder must compute the same bits as without
    # a Rebuilder, and a convolution may round differently in another layout.
    channels_last = feature.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    rebuilt = resize(rebuilt, size).to(feature.dtype)
    return torch.where(hidden, rebuilt, feature).contiguous(memory_format=layout)


def _doublings(stride: int, grid: tuple[int, int]) -> int:
    """Return how often the grid doubles on its way to a map of this stride, for an input of ``NOMINAL_INPUT`` pixels.

    The longer side of the grid counts, as an input that is wider than high has a grid of that shape too. Rounded down:
    the rest is left to a bilinear step, which costs no parameters.
    """
    return max(0, math.floor(math.log2(NOMINAL_INPUT / (stride * max(grid)))))


def _init_linear(module: nn.Module) -> None:
    """Set Xavier-uniform weights and zero biases (paper)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _check(*, width: int, depth: int, num_heads: int, mlp_ratio: float, grid: int | Sequence[int]) -> tuple[int, int]:
    """Return the grid as (rows, cols), once every number is known to be usable."""
    problems = []
    for name, value in (("width", width), ("depth", depth), ("heads", num_heads)):
        if value < 1:
            problems.append(f"rebuilder.{name} must be at least 1, got {value}")
    if num_heads >= 1 and width % num_heads:
        problems.append(f"rebuilder.width={width} is not divisible by rebuilder.heads={num_heads}")
    if width % 4:
        problems.append(f"rebuilder.width={width} is not divisible by 4 (sine and cosine of row and column)")
    if int(width * mlp_ratio) < 1:
        problems.append(f"rebuilder.mlp_ratio={mlp_ratio} leaves no hidden units at rebuilder.width={width}")
    sides = [grid, grid] if isinstance(grid, int) else list(grid)
    if len(sides) != 2 or min(sides) < 1:
        problems.append(f"rebuilder.grid must be a positive integer or two of them (rows, cols), got {grid}")
    if problems:
        raise ConfigError(problems)
    rows, cols = sides
    return rows, cols
