"""Attention over packed token streams: one layout, one signature, one table of backends.

Shape legend: T tokens of all sequences together, H heads, C channels a head; b sequences of L tokens.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Rotation = tuple[Tensor, Tensor]
"""Sines and cosines by which the tokens of a sequence turn, for all heads alike: [L, 1, C] each."""


@dataclass(frozen=True)
class TokenLayout:
    """How a packed stream `[tokens, dim]` falls into sequences.

    Args:
        groups: `(number of sequences, tokens a sequence)` for each run of equally long sequences, in stream order;
            for example `((2 * B, 257), (8 * B, 50))` for the global and local crops of B images.
        grids: patches (h, w) of an image of each group, for what depends on places in the image; empty if unknown.
    """

    groups: tuple[tuple[int, int], ...]
    grids: tuple[tuple[int, int], ...] = ()
    aid: Any = field(default=None, compare=False, repr=False)
    """What a backend needs of the layout on its device: offsets or a mask; see `prepared`."""
    rotation: tuple[Rotation, ...] | None = field(default=None, compare=False, repr=False)
    """Of the sequences of each group, in one block of a model with rotary positions; see `models.positions`."""

    def prepared(self, backend: str, device: torch.device) -> "TokenLayout":
        """The layout with its aid for a backend, made once for all blocks and steps.

        Made within a block it would be copied to the GPU, and waited for, by every one that is compiled.
        """
        make = _AIDS.get(backend)
        return self if make is None or device.type != "cuda" else replace(self, aid=make(self, device))

    @property
    def tokens(self) -> int:
        """Length of the stream."""
        return sum(count * length for count, length in self.groups)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence, in stream order."""
        return [length for count, length in self.groups for _ in range(count)]

    def sequence_starts(self, device: torch.device) -> Tensor:
        """Place in the stream of every sequence's first token, int64 [sequences]."""
        starts, place = [], 0
        for count, length in self.groups:
            starts.append(torch.arange(place, place + count * length, length, device=device))
            place += count * length
        return torch.cat(starts)

    def split(self, stream: Tensor) -> Iterator[Tensor]:
        """Views `[sequences, length, ...]` of the stream `[tokens, ...]`, one for each group."""
        # One split: its gradient is one concatenation, where that of slices would be a sum of arrays full of zeros.
        parts = stream.split([count * length for count, length in self.groups])
        for (count, length), part in zip(self.groups, parts, strict=True):
            yield part.view(count, length, *stream.shape[1:])


AttentionBackend = Callable[[Tensor, TokenLayout], Tensor]
"""Queries, keys and values of all tokens [T, 3, H, C] -> what their sequences answer [T, H, C]."""


def sdpa_attention(qkv: Tensor, layout: TokenLayout) -> Tensor:
    """PyTorch's scaled dot-product attention, one batched call for each group of equal lengths."""
    outputs = [
        F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1) for q, k, v in _split_heads(qkv, layout)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _split_heads(qkv: Tensor, layout: TokenLayout) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each group as views [b, H, L, C]."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    split = _head_views if traced else _HeadViews.apply
    views = split(qkv, layout)
    return zip(views[::3], views[1::3], views[2::3], strict=True)


def _head_views(qkv: Tensor, layout: TokenLayout) -> tuple[Tensor, ...]:
    return tuple(part.transpose(1, 2) for group in layout.split(qkv) for part in group.unbind(2))


class _HeadViews(torch.autograd.Function):
    """`_head_views` with a gradient that is written once, into its place.

    Autograd's own would put together each group's, then each of q, k and v, then all.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: TokenLayout) -> tuple[Tensor, ...]:
        ctx.layout = layout
        return _head_views(qkv, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        _, heads, _, channels = gradients[0].shape
        of_qkv = gradients[0].new_empty(ctx.layout.tokens, 3, heads, channels)
        for view, gradient in zip(_head_views(of_qkv, ctx.layout), gradients, strict=True):
            view.copy_(gradient)
        return of_qkv, None


def xformers_attention(qkv: Tensor, layout: TokenLayout) -> Tensor:
    """xFormers' memory-efficient attention with a block-diagonal mask."""
    from xformers.ops import memory_efficient_attention

    mask = _block_diagonal_mask(layout, qkv.device) if layout.aid is None else layout.aid
    q, k, v = qkv[None].unbind(2)
    answers: Tensor = memory_efficient_attention(q, k, v, attn_bias=mask)[0]
    return answers


def varlen_attention(qkv: Tensor, layout: TokenLayout) -> Tensor:
    """PyTorch's variable-length flash attention, half precision, CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    cumulative = _cumulative_lengths(layout, qkv.device) if layout.aid is None else layout.aid
    longest = max(length for _, length in layout.groups)
    attended = varlen_attn(q, k, v, cumulative, cumulative, longest, longest)
    assert isinstance(attended, Tensor)  # a tuple only where auxiliary outputs are asked for
    return attended


# A run meets a handful of layouts (full batch, kept subset, evaluation); building masks anew would copy to the device.
@lru_cache(maxsize=64)
def _cumulative_lengths(layout: TokenLayout, device: torch.device) -> Tensor:
    lengths = torch.tensor([0, *layout.lengths], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device)


@lru_cache(maxsize=64)
def _block_diagonal_mask(layout: TokenLayout, device: torch.device) -> object:
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(layout.lengths, device=device)


_AIDS: dict[str, Callable[[TokenLayout, torch.device], object]] = {
    "xformers": _block_diagonal_mask,
    "varlen": _cumulative_lengths,
}

ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "xformers": xformers_attention,
    "sdpa": sdpa_attention,
    "varlen": varlen_attention,
}
"""In the order in which `auto` tries them; on an H100, sdpa was faster than varlen (docs/speed.md)."""


class AttentionUse(NamedTuple):
    """What a run asks of a backend: the device, the dtype of its inputs (under autocast, the autocast dtype), the
    number and width of the heads, and the lengths of its sequences."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    channels: int
    lengths: tuple[int, ...]


def choose_attention_backend(requested: str, use: AttentionUse) -> tuple[str, str]:
    """The backend to build the model with, and the reason in words. Decided once; never changed during a run.

    A backend is chosen only after it has run forward and backward at just the run's dtype, heads and lengths.

    Args:
        requested: `auto` or a key of `ATTENTION_BACKENDS`.
        use: what the run asks of it.

    Raises:
        ValueError: the requested backend cannot run there.
    """
    if requested != "auto" and requested not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend {requested!r} is unknown; known: auto, {', '.join(ATTENTION_BACKENDS)}")
    if requested == "auto" and use.device.type == "cpu":
        return "sdpa", "the CPU's backend: equal lengths batched"
    candidates = list(ATTENTION_BACKENDS) if requested == "auto" else [requested]
    problems: dict[str, str] = {}
    for name in candidates:
        if (problem := why_not(name, use)) is None:
            passed_over = "".join(f"; {other}: {why}" for other, why in problems.items())
            return name, f"as configured{passed_over}" if requested != "auto" else f"the first that runs{passed_over}"
        problems[name] = problem
    raise ValueError("; ".join(f"attention backend {name!r} cannot be used: {why}" for name, why in problems.items()))


@lru_cache
def why_not(backend: str, use: AttentionUse) -> str | None:
    """What keeps a backend from such a use, in words; None if it has run forward and backward and is right."""
    if backend != "sdpa" and use.device.type != "cuda":
        return f"it has CUDA kernels only, and the device is {use.device.type}"
    if backend != "sdpa" and use.dtype not in (torch.float16, torch.bfloat16):
        return "its kernels need float16 or bfloat16"
    # xFormers is imported only here: on a CPU-only machine, or beside a PyTorch it was not built for, its import warns.
    logging.getLogger("xformers").setLevel(logging.CRITICAL)
    layout = TokenLayout(tuple((count, length) for count, length in enumerate(use.lengths, start=2)))
    shape = (layout.tokens, 3, use.heads, use.channels)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(use.device)
    exact, found = values.clone().requires_grad_(), values.to(use.dtype, copy=True).requires_grad_()
    try:
        expected = sdpa_attention(exact, layout)
        computed = ATTENTION_BACKENDS[backend](found, layout.prepared(backend, use.device))
        expected.square().sum().backward()
        computed.float().square().sum().backward()
    except (RuntimeError, ValueError, NotImplementedError, ImportError, OSError) as error:
        return f"it does not run here: {str(error).strip().splitlines()[0][:120]}{_other_build(backend)}"
    assert exact.grad is not None and found.grad is not None
    tolerance = 1e-4 if use.dtype is torch.float32 else 0.05
    pairs = ("output", computed.detach(), expected.detach()), ("gradient", found.grad, exact.grad)
    for name, ours, theirs in pairs:
        distance = float((ours.float() - theirs).norm() / theirs.norm())
        if not distance <= tolerance:  # also where it is not a number
            return f"its {name} is off by {100 * distance:.2g} %"
    return None


def _other_build(backend: str) -> str:
    """The line that installs an xFormers for this PyTorch, which must be built for the same CUDA."""
    if backend != "xformers" or torch.version.cuda is None:
        return ""
    index = f"https://download.pytorch.org/whl/cu{torch.version.cuda.replace('.', '')}"
    return f" (one for this PyTorch: pip install xformers --index-url {index})"
