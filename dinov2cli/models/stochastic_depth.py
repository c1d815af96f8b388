"""Stochastic depth on packed streams: a residual branch runs on random sequences alone, which saves the others' cost.

Shape legend: T tokens of the stream, K those of the kept sequences, D dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2cli.device import without_autocast
from dinov2cli.models.attention import Rotation, TokenLayout


@dataclass(frozen=True)
class KeptSequences:
    """The sequences on which one residual branch runs in this step.

    Args:
        layout: the kept tokens as a stream of their own.
        index: int64 [K], their places in the whole stream.
        factor: float32 [K, 1], batch size over kept sequences (crop sizes differ in it).
        place: int64 [T], where each token lies in the kept stream; 0 for those that are dropped.
        scale: float32 [T, 1], `factor` where a token is kept, 0 where it is dropped.
    """

    layout: TokenLayout
    index: Tensor
    factor: Tensor
    place: Tensor
    scale: Tensor

    def select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept tokens, [T, D] -> [K, D]; and before them `x` for what comes after the branch.

        Its gradient and that of the kept tokens then meet here, and are added as they are gathered.
        """
        if shapes_may_depend_on_data(x):
            return x, x.index_select(0, self.index)
        both: tuple[Tensor, Tensor] = _Select.apply(x, self.index, self.place, self.scale)  # type: ignore[no-untyped-call]
        return both

    def turned(self, rotation: tuple[Rotation, ...]) -> "KeptSequences":
        """The same with rotary positions in its layout."""
        return replace(self, layout=replace(self.layout, rotation=rotation))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`x` [T, D] with the branch's residual [K, D], times `factor`, added to the kept tokens."""
        if shapes_may_depend_on_data(x):
            return x.index_add(0, self.index, (residual * self.factor).to(x.dtype))
        tensors = x, residual, self.index, self.factor, self.place, self.scale
        total: Tensor = _Add.apply(*tensors)  # type: ignore[no-untyped-call]
        return total


class _Select(torch.autograd.Function):
    """A gather whose gradient is a gather, too.

    Autograd's own adds into zeros, atomically, as it cannot know that no place comes twice. On a GPU these additions,
    and those of `_Add`, took a tenth of a ViT-L's step; gathers also fuse with what surrounds them when compiled.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, place: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(place, scale)
        return x.view_as(x), x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_x: Tensor, of_kept: Tensor) -> tuple[Tensor, None, None, None]:
        place, scale = ctx.saved_tensors
        return torch.addcmul(of_x, of_kept.index_select(0, place), (scale > 0).to(of_x.dtype)), None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, index: Tensor, factor: Tensor, place: Tensor, scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(index, factor)
        ctx.dtype = residual.dtype
        with without_autocast(x.device.type):  # which would make a float32 copy of the residual first
            return torch.addcmul(x, residual.index_select(0, place), scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        index, factor = ctx.saved_tensors
        rows = gradient.index_select(0, index)
        if torch.compiler.is_compiling():
            return gradient, (rows * factor).to(ctx.dtype), None, None, None, None
        of_residual = torch.mul(rows, factor, out=rows.new_empty(rows.shape, dtype=ctx.dtype))
        return gradient, of_residual, None, None, None, None


def shapes_may_depend_on_data(x: Tensor) -> bool:
    """Whether sizes may be read from arrays: on the CPU. A GPU would be waited for, a compiled graph broken."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


KeptByBlock = list[tuple[KeptSequences, KeptSequences] | None]
"""For each block what its two branches keep; None where nothing is dropped."""


def draw_by_block(
    rates: Sequence[float],
    layout: TokenLayout,
    generator: torch.Generator | None,
    device: torch.device,
    backend: str = "sdpa",
) -> KeptByBlock:
    """What the two branches of each block keep at its rate, drawn from a CPU generator, by default the global one."""
    if not any(rates):
        return [None] * len(rates)
    where = (torch.default_generator if generator is None else generator, device, backend)
    if len(set(rates)) == 1:
        drawn = draw_for_branches(2 * len(rates), layout, rates[0], *where)
        return list(zip(drawn[::2], drawn[1::2], strict=True))
    pairs = [draw_for_branches(2, layout, rate, *where) if rate else None for rate in rates]
    return [(pair[0], pair[1]) if pair else None for pair in pairs]


def draw_for_branches(
    branches: int,
    layout: TokenLayout,
    drop_rate: float,
    generator: torch.Generator,
    device: torch.device,
    backend: str = "sdpa",
) -> list[KeptSequences]:
    """One draw after the other for so many residual branches, their layout prepared for an attention backend.

    Of each crop size's b sequences, max(int(b * (1 - rate)), 1) are kept. The draw is made on the CPU, so that it is
    the same on every device. Only the numbers of the sequences travel to a GPU, all at once and from page-locked
    memory, so that nobody waits.
    """
    groups = [(max(int(count * (1 - drop_rate)), 1), length) for count, length in layout.groups]
    counts = [(count, kept) for (count, _), (kept, _) in zip(layout.groups, groups, strict=True)]
    chosen = torch.stack(
        [torch.cat([torch.randperm(n, generator=generator)[:kept] for n, kept in counts]) for _ in range(branches)]
    )
    if device.type == "cuda":
        chosen = chosen.pin_memory().to(device, non_blocking=True)
    indices, factors, start = [], [], 0
    parts = chosen.split([kept for kept, _ in groups], dim=1)
    for (count, length), (kept, _), part in zip(layout.groups, groups, parts, strict=True):
        indices.append((start + part[:, :, None] * length + torch.arange(length, device=device)).flatten(1))
        factors.append(torch.full((kept * length,), count / kept, device=device))
        start += count * length
    index, factor = torch.cat(indices, dim=1), torch.cat(factors)
    place = torch.zeros(branches, start, dtype=torch.int64, device=device)
    place.scatter_(1, index, torch.arange(index.shape[1], device=device).expand_as(index))
    scale = torch.zeros(branches, start, device=device).scatter_(1, index, factor.expand_as(index))
    kept_layout = TokenLayout(tuple(groups), layout.grids).prepared(backend, device)
    return [KeptSequences(kept_layout, index[i], factor[:, None], place[i], scale[i, :, None]) for i in range(branches)]
