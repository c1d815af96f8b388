"""Activation checkpointing: what of a block's forward pass is kept for the backward pass, what is computed again."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# It warns of operators that work in place, of which blocks have none.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

Recomputation = bool | Literal["selective"]
"""Nothing is computed again, everything (True), or what takes no matrix product."""

PRODUCTS = {"aten.mm.default": 0, "aten.addmm.default": 1}
"""With the place of the factor that holds the tokens."""
ATTENTION = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "torch_attn._varlen_attn.default",
    "xformers.efficient_attention_forward_cutlass.default",
    "xformers_flash.flash_fwd.default",
    "xformers_flash3.flash_fwd.default",
}
"""By name: most of them are not there everywhere."""


def checkpointed(mode: Recomputation, part: Callable[..., Any], stream: Tensor, *inputs: Any) -> Any:
    """`part(stream, *inputs)` of a block, where `mode` is selective without what is cheap to compute again.

    It is bit for bit the same, and draws no random numbers. Called within what is compiled, so that the compiler knows.
    """
    if mode != "selective" or not torch.is_grad_enabled():
        return part(stream, *inputs)
    contexts = partial(create_selective_checkpoint_contexts, partial(policy, stream.shape[-1]))
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
    return checkpoint(part, stream, *inputs, **how)


def policy(width: int, _: object, op: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """Keep attention's answers, and products of tokens of the stream's width (queries, keys and values, the
    projection, the first of the feed-forward layer), so that no product is done twice: docs/speed.md has others.

    The last product's output is asked for again in float16 alone, where LayerScale comes after it (`linear_and_scale`);
    an adapter's second is not worth its bytes.
    """
    name = str(op)
    place = PRODUCTS.get(name)
    if place is None:
        kept = name in ATTENTION
    else:
        kept = inputs[place].shape[-1] == width or inputs[place].dtype == torch.float16
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
