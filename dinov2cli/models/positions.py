"""Where patches are in the image: DINOv2's learned embeddings, and DINOv3's rotation of queries and keys (RoPE).

Shape legend: N = h*w patches at the native size, D embedding dimension; P patches of an image, L tokens of a sequence,
H heads, C channels a head, K draws (one a block).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2cli.config.vit import ViTConfig
from dinov2cli.models.attention import Rotation, TokenLayout


def resize_positions(pos_embed: Tensor, grid: tuple[int, int], config: ViTConfig) -> Tensor:
    """Position embeddings [1, 1+N, D] of the native size for `grid` = (h, w) patches: float32 [1, 1+h*w, D]."""
    (h, w), side = grid, config.grid
    native = pos_embed.float()
    if grid == (side, side):
        return native
    patches = native[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    target: dict[str, Any] = {"size": grid}
    if offset := config.interpolate_offset:
        # The small offset is historical; with it, scale factors rather than sizes set the sampling positions.
        target = {"scale_factor": ((h + offset) / side, (w + offset) / side)}
    patches = F.interpolate(patches, mode="bicubic", antialias=config.interpolate_antialias, **target)
    assert patches.shape[-2:] == (h, w), (patches.shape, h, w)
    return torch.cat([native[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RopeAugmentation(NamedTuple):
    """How far coordinates are changed in training, by one draw for a block and crop size; None: not at all.

    Args:
        shift: each axis moves by a number from -shift to shift.
        jitter: then each axis is stretched by a factor from 1/jitter to jitter, uniform in its logarithm.
        rescale: then both alike, from 1/rescale to rescale.
    """

    shift: float | None = None
    jitter: float | None = None
    rescale: float | None = None


def rope_periods(config: ViTConfig) -> Tensor:
    """Periods of a head's C/4 frequencies, float32: base^(4k/C), or from the shortest to the longest geometrically."""
    number = config.embed_dim // config.num_heads // 4
    shortest, longest = config.pos_embed_rope_min_period, config.pos_embed_rope_max_period
    if shortest is None or longest is None:
        periods: Tensor = config.pos_embed_rope_base ** (torch.arange(number, dtype=torch.float32) / number)
        return periods
    return shortest * (longest / shortest) ** torch.linspace(0, 1, number)


class RopePositionEmbedding(nn.Module):
    """Angles of the patches, and the augmentation of their coordinates. `periods` are saved with the weights."""

    periods: Tensor

    def __init__(self, config: ViTConfig, augmentation: RopeAugmentation) -> None:
        super().__init__()
        self.register_buffer("periods", rope_periods(config))
        self.prefix_tokens, self.augmentation = config.prefix_tokens, augmentation
        self.normalize_coords = config.pos_embed_rope_normalize_coords
        self.dtype = DTYPES[config.pos_embed_rope_dtype]

    def forward(self, grid: tuple[int, int], draws: Tensor | None = None) -> Rotation:
        """Sines and cosines of a grid of (h, w) patches, [P, C] each; with `draws` of `draw`, [K, P, C]."""
        angles = 2 * math.pi * self.coordinates(grid, draws)[..., None] / self.periods.to(self.dtype)
        angles = angles.flatten(-2)  # C/4 of y, C/4 of x
        angles = torch.cat([angles, angles], dim=-1)
        return angles.sin(), angles.cos()

    def coordinates(self, grid: tuple[int, int], draws: Tensor | None = None) -> Tensor:
        """(y, x) of the centres of patches, [P, 2] or [K, P, 2]: -1 to 1 over the sides that `normalize_coords` says.

        Args:
            grid: patches (h, w).
            draws: uniform numbers from -1 to 1, [K, 5].
        """
        (h, w), where = grid, self.periods.to(self.dtype)
        over = {"separate": (h, w), "max": (max(h, w),) * 2, "min": (min(h, w),) * 2}[self.normalize_coords]
        y, x = (
            (torch.arange(n, dtype=where.dtype, device=where.device) + 0.5) / side
            for n, side in zip((h, w), over, strict=True)
        )
        places = 2 * torch.stack([y[:, None].expand(h, w), x[None, :].expand(h, w)], dim=-1).flatten(0, 1) - 1
        if draws is None:
            return places
        shift, jitter, rescale = self.augmentation
        draws = draws.to(self.dtype)[:, None]
        places = places + (shift or 0.0) * draws[..., :2]
        places = places * (math.log(jitter or 1.0) * draws[..., 2:4]).exp()
        return places * (math.log(rescale or 1.0) * draws[..., 4:]).exp()

    def draw(self, blocks: int, sizes: int, generator: torch.Generator | None) -> Tensor | None:
        """Numbers for so many blocks and crop sizes [sizes, blocks, 5], from a CPU generator; None in evaluation."""
        if not self.training or not any(self.augmentation):
            return None
        generator = torch.default_generator if generator is None else generator
        draws = 2 * torch.rand(sizes, blocks, 5, generator=generator, device="cpu") - 1
        on_gpu = self.periods.device.type == "cuda"
        return (draws.pin_memory() if on_gpu else draws).to(self.periods.device, non_blocking=on_gpu)

    def rotations(
        self, grids: Sequence[tuple[int, int]], blocks: int, generator: torch.Generator | None
    ) -> list[tuple[Rotation, ...]]:
        """For each block, the sines and cosines of each crop size, for whole sequences: tokens before patches stay."""
        draws = self.draw(blocks, len(grids), generator)
        if draws is None:
            return [tuple(self._of_sequence(*self(grid)) for grid in grids)] * blocks
        tables = [self._of_sequence(*self(grid, drawn)) for grid, drawn in zip(grids, draws, strict=True)]
        return [tuple((sin[i], cos[i]) for sin, cos in tables) for i in range(blocks)]

    def _of_sequence(self, sin: Tensor, cos: Tensor) -> Rotation:
        """Of a sequence [.., L, 1, C], whose first tokens turn by 0."""
        shape = (*sin.shape[:-2], self.prefix_tokens, sin.shape[-1])
        sin, cos = torch.cat([sin.new_zeros(shape), sin], dim=-2), torch.cat([cos.new_ones(shape), cos], dim=-2)
        return sin[..., None, :], cos[..., None, :]


def rotate(qkv: Tensor, layout: TokenLayout) -> Tensor:
    """Queries, keys and values [T, 3, H, C], the first two turned by their tokens' places."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    turned: Tensor = _rotate(qkv, layout) if traced else _Rotate.apply(qkv, layout)  # type: ignore[no-untyped-call]
    return turned


def _rotate(qkv: Tensor, layout: TokenLayout) -> Tensor:
    assert layout.rotation is not None
    parts = []
    for part, (sin, cos) in zip(layout.split(qkv[:, :2]), layout.rotation, strict=True):
        exact = part.to(sin.dtype)
        first, second = exact.chunk(2, dim=-1)
        turned = exact * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
        parts.append(turned.to(qkv.dtype).flatten(0, 1))
    return torch.cat([torch.cat(parts) if len(parts) > 1 else parts[0], qkv[:, 2:]], dim=1)


class _Rotate(torch.autograd.Function):
    """`_rotate` that writes once, into its place, and whose gradient turns back likewise.

    The plain way holds four times the queries and keys on the way, which a CPU's allocator does not give back.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: TokenLayout) -> Tensor:
        ctx.layout = layout
        return _turned(qkv, layout, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _turned(gradient, ctx.layout, -1), None


def _turned(qkv: Tensor, layout: TokenLayout, sign: int) -> Tensor:
    assert layout.rotation is not None
    found = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for part, to, (sin, cos) in zip(layout.split(qkv), layout.split(found), layout.rotation, strict=True):
        sin, cos = (sign * sin[:, None]).chunk(2, dim=-1)[0], cos[:, None].chunk(2, dim=-1)[0]
        first, second = part[:, :, :2].to(sin.dtype).chunk(2, dim=-1)
        to_first, to_second = to[:, :, :2].chunk(2, dim=-1)
        to[:, :, 2] = part[:, :, 2]
        if qkv.dtype == sin.dtype:
            torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
            torch.mul(second, cos, out=to_second).addcmul_(first, sin)
        else:
            to_first.copy_(first * cos - second * sin)
            to_second.copy_(second * cos + first * sin)
    return found
