"""The Rebuilder of Masked Feature Modeling (arXiv 2509.13801): hide part of an encoder's features, rebuild it.

It exists during training only. The last encoder map, brought to a fixed grid of cells, loses the hidden cells; a small
transformer fills them in from the visible ones; one projector for each map that the decoder reads carries the result
back to that map, where it replaces the hidden places and only those.

Without options this is the paper's. Each option is absent when off: ``peri_norm``, ``depth_scaling`` and ``readout``,
of which the stable variant consists, and ``qk_norm``, without which it did as well (docs/stability.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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

BRANCH_GAIN = 0.1
"""Of the norms under ``peri_norm`` before they are trained: what LayerScale begins with up to 18 blocks (CaiT,
2103.17239). With 1 the branches drown the tokens before they have learned anything: on the stride-8 bed of the lab,
8 x 128, after 400 steps, 6 % of the encoder's gradient came through the Rebuilder at 5e-4 and 28 % at 2e-3; with 0.1
it was 30 % and 44 % (one seed)."""

BASE_DEPTH = 2
"""Blocks of the paper's Rebuilder, whose branches count in full under ``depth_scaling``."""

LOGIT_CHUNK = 512
"""Queries whose attention logits are held at a time when the largest is looked for."""

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
    """Multi-head self-attention over all tokens; memory grows linearly with their number."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.attend = Attend(width, num_heads, qk_norm=qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Let every token attend to all: [B, N, width] -> [B, N, width]."""
        return self.proj(self.attend(*self.qkv(x).chunk(3, dim=2)))


class CrossAttention(nn.Module):
    """Multi-head attention of some tokens to others."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.attend = Attend(width, num_heads, qk_norm=qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Let ``x`` [B, N, width] attend to ``context`` [B, M, width]: [B, N, width]."""
        return self.proj(self.attend(self.q(x), *self.kv(context).chunk(2, dim=2)))


class Attend(nn.Module):
    """Scaled dot products by head; with ``qk_norm`` queries and keys are normalised first (ViT-22B, 2302.05442).

    Attributes:
        largest: where a number stands here, each forward raises it to the largest logit of its first image.
    """

    largest: Tensor | None = None

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_norm = nn.LayerNorm(width // num_heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads, eps=1e-5) if qk_norm else nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from [B, N, width] to keys and values [B, M, width]: [B, N, width]."""
        # [B, N, width] -> [B, N, heads, width / heads] -> [B, heads, N, width / heads]
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.largest is not None:
            self.largest = torch.maximum(self.largest, largest_logit(q[0].detach(), k[0].detach()))
        attended = F.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2).flatten(2)


def token_variation(x: Tensor) -> Tensor:
    """Tell how much tokens [B, N, width] differ: their variance over their mean square, 1 if their mean is 0.

    It falls to 0 where a Rebuilder says the same of every cell of every image, which its loss does not show.
    """
    tokens = x.float().flatten(0, 1)
    return 1.0 - tokens.mean(dim=0).square().sum() / tokens.square().sum(dim=1).mean()


def largest_logit(q: Tensor, k: Tensor) -> Tensor:
    """Return the largest attention logit of queries [heads, N, d] and keys [heads, M, d], never holding all of them."""
    scale = q.shape[-1] ** -0.5
    return torch.stack([(part @ k.mT).amax() * scale for part in q.split(LOGIT_CHUNK, dim=1)]).amax().float()


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron, each times ``scale`` added to its input.

    With ``peri_norm`` what each of them adds is normalised too (Peri-LN, 2502.02732), and small at first.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: bool = False,
        peri_norm: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attention = Attention(width, num_heads, qk_norm=qk_norm)
        self.out_norm1 = _out_norm(width, peri_norm)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = _perceptron(width, mlp_ratio)
        self.out_norm2 = _out_norm(width, peri_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and perceptron to the input: [B, N, width] -> [B, N, width]."""
        x = torch.add(x, self.out_norm1(self.attention(self.norm1(x))), alpha=self.scale)
        return torch.add(x, self.out_norm2(self.mlp(self.norm2(x))), alpha=self.scale)


class ReadoutBlock(nn.Module):
    """A pre-norm block in which hidden cells read the visible ones, and not one another (CrossMAE, 2401.14391)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool, peri_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attention = CrossAttention(width, num_heads, qk_norm=qk_norm)
        self.out_norm1 = _out_norm(width, peri_norm)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = _perceptron(width, mlp_ratio)
        self.out_norm2 = _out_norm(width, peri_norm)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Add attention to ``context`` [B, M, width], and a perceptron: [B, N, width] -> [B, N, width]."""
        x = x + self.out_norm1(self.attention(self.norm1(x), context))
        return x + self.out_norm2(self.mlp(self.norm2(x)))


def _out_norm(width: int, there: bool) -> nn.Module:
    """Make the norm of what a branch adds. It has no bias: one that all tokens share is what it is to bound."""
    if not there:
        return nn.Identity()
    norm = nn.LayerNorm(width, eps=1e-5, bias=False)
    nn.init.constant_(norm.weight, BRANCH_GAIN)
    return norm


def _perceptron(width: int, mlp_ratio: float) -> nn.Sequential:
    hidden = int(width * mlp_ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


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
        out_norm = ChannelLayerNorm(out_channels, eps=PROJECTOR_EPS)
        super().__init__(*layers, nn.Conv2d(channels, out_channels, 1), out_norm)


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
        qk_norm: normalise queries and keys, so that no attention logit can grow without bound.
        peri_norm: normalise what attention and perceptron add, so that no rate lets the residual stream outgrow what
            the cells say. Without it, on the stride-8 bed of the lab at 8e-3, the stream grew to 60 times its size
            within 400 steps, the same for all tokens, and the Rebuilder no longer saw the image; with it, to twice.
        depth_scaling: multiply the branches of the blocks by ``BASE_DEPTH / depth``, so that a step changes the output
            of a deep trunk as much as that of a shallow one (CompleteP, 2505.01618).
        readout: where above 0, the trunk runs over visible cells alone, and so many further blocks of cross-attention
            let the hidden ones read them. Every image of a batch must then hide the same number of cells.

    Attributes:
        grid: (rows, cols), the shape of an image's mask.
        width: channels of the transformer.

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
        qk_norm: bool = False,
        peri_norm: bool = False,
        depth_scaling: bool = False,
        readout: int = 0,
    ) -> None:
        super().__init__()
        rows, cols = _check(width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, grid=grid)
        self.grid = (rows, cols)
        self.width = width
        self.embed = nn.Linear(embed_channels, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer("positions", sine_cosine_positions(rows, cols, width), persistent=False)
        norms = {"qk_norm": qk_norm, "peri_norm": peri_norm}
        scale = min(1.0, BASE_DEPTH / depth) if depth_scaling else 1.0
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, **norms, scale=scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.projectors = nn.ModuleList(
            Projector(width, channel, _doublings(stride, self.grid))
            for channel, stride in zip(channels, strides, strict=True)
        )
        nn.init.normal_(self.mask_token, std=0.02)
        if readout:
            self.always_visible = nn.Parameter(torch.empty(width))
            """A token that is always there to be read, also where all cells are hidden."""
            nn.init.normal_(self.always_visible, std=0.02)
        self.readout = nn.ModuleList(ReadoutBlock(width, num_heads, mlp_ratio, **norms) for _ in range(readout))
        self.apply(_init_linear)

    def forward(
        self, last_feature: Tensor, features: list[Tensor], mask: Tensor, num_hidden: int | None = None
    ) -> list[Tensor]:
        """Replace the hidden part of ``features`` by what the visible part of ``last_feature`` suggests.

        Args:
            last_feature: last encoder map [B, embed_channels, h, w].
            features: the maps to rebuild, the i-th [B, channels[i], h_i, w_i].
            mask: bool [B, rows, cols] over the grid; True means hidden.
            num_hidden: cells that it hides in every image, where that is known. With ``readout`` they are counted
                otherwise, which waits for the device where the mask is.

        Returns:
            Maps of the shapes and types of ``features``; a visible place holds the very bits of its feature.
        """
        assert mask.shape[1:] == self.grid, f"mask of shape {tuple(mask.shape)} for a grid of {self.grid}"
        cells = self._rebuild(last_feature, mask, num_hidden)
        mask = mask.to(last_feature.device)
        return [
            _fuse(projector(cells), feature, mask) for projector, feature in zip(self.projectors, features, strict=True)
        ]

    def wide_matrices(self) -> list[nn.Parameter]:
        """List the matrices that sum over numbers in proportion to ``width``: all but the embedding's."""
        wide = (*self.blocks.parameters(), *self.readout.parameters(), *self.projectors.parameters())
        return [parameter for parameter in wide if parameter.ndim > 1]

    @contextmanager
    def measuring(self) -> Iterator[dict[str, Tensor]]:
        """Measure the forwards in here; the dictionary is filled at the end.

        Not from within the blocks: of a list that grows each length would be compiled.

        Yields:
            ``max_logit``: largest attention logit of any block over the first images of all forwards;
            ``token_variation``: mean over the forwards of what ``token_variation`` says of the trunk's last norm.
        """
        found: dict[str, Tensor] = {}
        variations: list[Tensor] = []
        layers = [module for module in self.modules() if isinstance(module, Attend)]
        for layer in layers:
            layer.largest = torch.full((), -math.inf, device=self.mask_token.device)
        hook = self.norm.register_forward_hook(lambda *said: variations.append(token_variation(said[-1].detach())))
        try:
            yield found
            largest = [layer.largest for layer in layers if layer.largest is not None]
            found |= {"max_logit": torch.stack(largest).amax(), "token_variation": torch.stack(variations).mean()}
        finally:
            hook.remove()
            for layer in layers:
                layer.largest = None

    def _rebuild(self, last_feature: Tensor, mask: Tensor, num_hidden: int | None) -> Tensor:
        """Rebuild the grid [B, width, rows, cols] of last maps [B, embed_channels, h, w] masked by [B, rows, cols]."""
        embedded = self.embed(last_feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, width, h, w]
        tokens = resize(embedded, self.grid).flatten(2).transpose(1, 2)  # [B, rows x cols, width]
        if len(self.readout) > 0:
            cells = self._read_visible(tokens, mask.flatten(1), num_hidden)
        else:
            # Positions come after masking: a hidden cell says where it is, and nothing else.
            hidden = mask.flatten(1)[..., None].to(tokens.device)
            tokens = torch.where(hidden, self.mask_token, tokens) + self.positions.to(self.mask_token.dtype)
            for block in self.blocks:
                tokens = block(tokens)
            cells = self.norm(tokens)
        return cells.transpose(1, 2).unflatten(2, self.grid)

    def _read_visible(self, tokens: Tensor, hidden: Tensor, num_hidden: int | None) -> Tensor:
        """Run the trunk over visible tokens alone and let hidden ones read them: [B, N, width], ``hidden`` [B, N]."""
        if num_hidden is None:
            count = hidden.sum(dim=1)
            num_hidden = int(count.max())
            if num_hidden != int(count.min()):
                raise ConfigError(
                    "a Rebuilder with readout blocks needs as many hidden cells in every image: set mfm.mask=exact, or "
                    "draw_mask(..., exact=True)"
                )
        # Visible cells first, each in the order of the grid.
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True).to(tokens.device)
        num_visible = hidden.shape[1] - num_hidden
        positions = self.positions.to(self.mask_token.dtype)  # of the weights' type: norms take no other
        visible = (tokens + positions).gather(1, order[:, :num_visible, None].expand(-1, -1, tokens.shape[2]))
        visible = torch.cat([self.always_visible.to(tokens.dtype).expand(len(tokens), 1, -1), visible], dim=1)
        for block in self.blocks:
            visible = block(visible)
        visible = self.norm(visible)
        x = self.mask_token + positions[order[:, num_visible:]]  # [B, hidden, width]
        for block in self.readout:
            x = block(x, visible)
        both = torch.cat([visible[:, 1:], x.to(visible.dtype)], dim=1)
        return both.gather(1, order.argsort(dim=1)[..., None].expand_as(both))


def hidden_places(mask: Tensor, map_: Tensor) -> Tensor:
    """Tell which places of [..., H, W] a mask [B, rows, cols] hides, by nearest cell: bool [B, H, W] on its device."""
    cells = mask.to(map_.device).unsqueeze(1).float()
    return F.interpolate(cells, map_.shape[-2:], mode="nearest").squeeze(1).bool()


def _fuse(rebuilt: Tensor, feature: Tensor, mask: Tensor) -> Tensor:
    """Take rebuilt values [B, C, h', w'] where the mask hides, those of ``feature`` [B, C, h, w] elsewhere."""
    # The feature's own type and memory layout: with nothing hidden, the decoder must compute the same bits as without
    # a Rebuilder, and a convolution may round differently in another layout.
    channels_last = feature.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    rebuilt = resize(rebuilt, feature.shape[-2:]).to(feature.dtype)
    return torch.where(hidden_places(mask, feature).unsqueeze(1), rebuilt, feature).contiguous(memory_format=layout)


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
