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


def rotate(x: Tensor, layout: TokenLayout) -> Tensor:
    """Queries and keys of a stream [T, 2, H, C] turned by their tokens' places, in the rotation's arithmetic."""
    assert layout.rotation is not None
    parts = [
        _turned(part, sin[:, None], cos[:, None])
        for part, (sin, cos) in zip(layout.split(x), layout.rotation, strict=True)
    ]
    return torch.cat([part.flatten(0, 1) for part in parts]) if len(parts) > 1 else parts[0].flatten(0, 1)


def _turned(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """[b, L, 2, H, C] with its halves of channels as the two sides of planes."""
    exact = x.to(sin.dtype)
    first, second = exact.chunk(2, dim=-1)
    return (exact * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
