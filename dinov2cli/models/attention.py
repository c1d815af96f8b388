"""Attention over packed token streams: one layout, one signature, one table of backends.

Shape legend: T tokens of all sequences together, H heads, C channels a head; b sequences of L tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TokenLayout:
    """How a packed stream `[tokens, dim]` falls into sequences.

    Args:
        groups: `(number of sequences, tokens a sequence)` for each run of equally long sequences, in stream order;
            for example `((2 * B, 257), (8 * B, 50))` for the global and local crops of B images.
    """

    groups: tuple[tuple[int, int], ...]

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
    split = _head_views if torch.compiler.is_compiling() else _HeadViews.apply
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
    from xformers.ops import memory_efficient_attention, unbind

    mask = _block_diagonal_mask(layout, qkv.device)
    q, k, v = unbind(qkv[None], 2)  # many of its kernels write the gradients side by side, which this sees
    answers: Tensor = memory_efficient_attention(q, k, v, attn_bias=mask)[0]
    return answers


def varlen_attention(qkv: Tensor, layout: TokenLayout) -> Tensor:
    """PyTorch's variable-length flash attention, half precision, CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    cumulative = _cumulative_lengths(layout, qkv.device)
    longest = max(length for _, length in layout.groups)
    attended = varlen_attn(q, k, v, cumulative, cumulative, longest, longest)
    assert isinstance(attended, Tensor)  # a tuple only where auxiliary outputs are asked for
    return attended


ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "xformers": xformers_attention,
    "varlen": varlen_attention,
    "sdpa": sdpa_attention,
}


def choose_attention_backend(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend to build the model with, and the reason in words. Decided once; never changed during a run.

    Args:
        requested: `auto` or a key of `ATTENTION_BACKENDS`.
        device: where the model will run.
        dtype: dtype of the attention inputs (under autocast, the autocast dtype).

    Raises:
        ValueError: the requested backend cannot run there.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    refusal = {
        "xformers": _why_not_xformers(device, half),
        "varlen": _why_not_varlen(device, half),
        "sdpa": None,
    }
    if requested != "auto":
        if requested not in refusal:
            raise ValueError(f"attention backend {requested!r} is unknown; known: auto, {', '.join(refusal)}")
        if refusal[requested]:
            raise ValueError(f"attention backend {requested!r} cannot be used: {refusal[requested]}")
        return requested, "as configured"
    if device.type == "cpu":
        return "sdpa", "the CPU's backend: equal lengths batched"
    for name in ("xformers", "varlen"):
        if refusal[name] is None:
            return name, f"{device.type} has a kernel for packed {dtype}".replace("torch.", "")
    return "sdpa", f"xformers: {refusal['xformers']}; varlen: {refusal['varlen']}"


def _why_not_xformers(device: torch.device, half: bool) -> str | None:
    # xFormers is imported only once a CUDA device is asked for: on a CPU-only machine its import warns.
    if device.type != "cuda":
        return f"xFormers has CUDA kernels only, and the device is {device.type}"
    if not half:
        return "its kernels need float16 or bfloat16"
    try:
        import xformers.ops  # noqa: F401
    except (ImportError, OSError) as error:
        return f"xFormers does not import ({error})"
    return None


def _why_not_varlen(device: torch.device, half: bool) -> str | None:
    if device.type != "cuda":
        return f"varlen attention needs CUDA, and the device is {device.type}"
    if not half:
        return "its kernels need float16 or bfloat16"
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError as error:
        return f"this PyTorch has no varlen attention ({error})"
    return None


# A run meets a handful of layouts (full batch, kept subset, evaluation); building masks anew would copy to the device.
@lru_cache(maxsize=64)
def _cumulative_lengths(layout: TokenLayout, device: torch.device) -> Tensor:
    lengths = torch.tensor([0, *layout.lengths], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device)


@lru_cache(maxsize=64)
def _block_diagonal_mask(layout: TokenLayout, device: torch.device) -> object:
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(layout.lengths, device=device)
