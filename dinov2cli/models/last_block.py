"""The last block, computed for the tokens that are used afterwards alone: the same results for less work.

Training looks at the class tokens and the masked patches only, k-NN at the class tokens: of the last block, attention's
output, the projection and the feed-forward layer of all other tokens would be thrown away. That is 8 % of a training
step on the CPU. `tests/test_last_block.py` holds it against the whole block.

Shape legend: T tokens of the stream, U used tokens, T' and U' kept by stochastic depth, D dim, H heads, C channels a
head; b sequences of L tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2cli.models.attention import ATTENTION_BACKENDS, TokenLayout
from dinov2cli.models.layers import Attention, Block, is_plain, linear_and_scale
from dinov2cli.models.recomputation import checkpointed
from dinov2cli.models.stochastic_depth import KeptSequences, shapes_may_depend_on_data


class LastBlock(Block):
    """A block that gives, where asked to, some tokens alone."""

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout | None = None,
        kept: tuple[KeptSequences, KeptSequences] | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """[T, D] -> [T, D], or [T, D] -> [U, D] for the tokens of a stream at the places `used` (int64 [U])."""
        if used is None or layout is None:
            return super().forward(x, layout, kept)
        parts = checkpointed(self.activation_checkpointing, self.up_to_last_sum, x, layout, kept, used)
        y, residual, rows, scale = parts
        return add_rows(y, rows, residual if scale is None else (residual * scale).to(y.dtype))

    def up_to_last_sum(
        self,
        x: Tensor,
        layout: TokenLayout | None,
        kept: tuple[KeptSequences, KeptSequences] | None,
        used: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Likewise; of the tokens `used` with the rows that have a second residual (None: all), and its scale."""
        if used is None or layout is None:
            return super().up_to_last_sum(x, layout, kept)
        if kept is None:
            y: Tensor = x.index_select(0, used)
            y = y + attention_at(self.attn, self.norm1(x), layout, used, self.ls1)
            return y, self.mlp_branch(y), None, None
        attending, transformed = kept
        rows, places, scale = find(attending, used)
        x, chosen = attending.select(x)
        y, normed = x.index_select(0, used), self.norm1(chosen)
        residual = attention_at(self.attn, normed, attending.layout, places, self.ls1) * scale
        y = add_rows(y, rows, residual.to(y.dtype))
        rows, _, scale = find(transformed, used)
        return y, self.mlp_branch(y if rows is None else y.index_select(0, rows)), rows, scale


def attention_at(attn: Attention, x: Tensor, layout: TokenLayout, places: Tensor, scale: nn.Module) -> Tensor:
    """`attn` where only the tokens at `places` (int64 [U]) ask, while all answer. [T, D] -> [U, D]."""
    alone = type(attn) is Attention and attn.backend == "sdpa" and shapes_may_depend_on_data(x)
    if alone and is_plain(attn.qkv) and not attn.is_rotary:
        sizes = [x.shape[1], 2 * x.shape[1]]
        weight_q, weight_kv = attn.qkv.weight.split(sizes)
        bias_q, bias_kv = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split(sizes)
        q = F.linear(x.index_select(0, places), weight_q, bias_q).unflatten(1, (attn.num_heads, -1))
        k, v = F.linear(x, weight_kv, bias_kv).view(x.shape[0], 2, attn.num_heads, -1).unbind(1)
        attended = sdpa_attention_at(q, k, v, layout, places)
    elif alone:
        q, k, v = attn.queries_keys_values(x, layout).unbind(1)
        attended = sdpa_attention_at(q.index_select(0, places), k, v, layout, places)
    else:
        attended = ATTENTION_BACKENDS[attn.backend](attn.queries_keys_values(x, layout), layout).index_select(0, places)
    return linear_and_scale(attended.flatten(1), attn.proj, scale)


def sdpa_attention_at(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, places: Tensor) -> Tensor:
    """Attention of single tokens: queries [U, H, C] of the tokens at `places`, keys and values [T, H, C] of all.

    How many tokens of a sequence ask is read from `places`, so on a GPU this would wait for the device.
    """
    outputs, asked = [], []
    start = 0
    for (count, length), k_g, v_g in zip(layout.groups, layout.split(k), layout.split(v), strict=True):
        sequence = torch.div(places - start, length, rounding_mode="floor")
        rows = ((sequence >= 0) & (sequence < count)).nonzero().flatten()
        rows = rows[sequence[rows].argsort(stable=True)]
        asking = sequence[rows].bincount(minlength=count).tolist()
        q_g = q.index_select(0, rows)
        if set(asking) == {1}:
            single = F.scaled_dot_product_attention(q_g[:, :, None], k_g.transpose(1, 2), v_g.transpose(1, 2))
            attended = single[:, :, 0]
        else:
            parts = zip(q_g.split(asking), k_g.unbind(), v_g.unbind(), strict=True)
            attended = torch.cat([_attend(*part) for part in parts if len(part[0])]) if len(rows) else q_g
        outputs.append(attended)
        asked.append(rows)
        start += count * length
    back = torch.cat(asked).argsort()
    return torch.cat(outputs).index_select(0, back)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence: queries [n, H, C], keys and values [L, H, C] -> [n, H, C]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def add_rows(y: Tensor, rows: Tensor | None, residual: Tensor) -> Tensor:
    """`y` [U, D] with a residual added to some rows, or to all."""
    return y + residual if rows is None else y.index_add(0, rows, residual)


def find(kept: KeptSequences, places: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Which of some tokens of the whole stream are kept, where in the kept stream they lie, and their scale.

    Where shapes may not depend on the data, dropped tokens are given too, at place 0 with scale 0.

    Args:
        kept: the sequences on which a branch runs.
        places: int64 [U], in the whole stream.

    Returns:
        int64 [U'], which of `places`, or None for all; int64 [U'], places in the kept stream; float32 [U', 1].
    """
    found, scale = kept.place[places], kept.scale[places]
    if not shapes_may_depend_on_data(kept.index):
        return None, found, scale
    rows = scale.flatten().nonzero().flatten()
    return rows, found[rows], scale[rows]
