"""The reference's own layout: flat, as released, and in chunks of blocks, as its training code writes it; DINOv3's."""

import re

import torch

from dinov2cli.models.layers import key_bias_mask
from dinov2cli.models.load.layouts.layout import State, StateView


def matches(names: set[str]) -> bool:
    """Flat: what our models have."""
    return "patch_embed.proj.weight" in names and "mask_token" in names and not is_chunked(names)


def is_chunked(names: set[str]) -> bool:
    """Whether blocks are named by chunk and number."""
    return "mask_token" in names and any(re.match(r"blocks\.\d+\.\d+\.", name) for name in names)


def from_chunked(state: StateView) -> State:
    """`blocks.<chunk>.<i>.*` (block_chunks > 0; i counts over the whole model) -> `blocks.<i>.*`."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): tensor for name, tensor in state.items()}


def is_dinov3(names: set[str]) -> bool:
    """Whether positions are rotations, whose periods are saved, instead of embeddings."""
    return "rope_embed.periods" in names and "mask_token" in names


def from_dinov3(state: StateView) -> State:
    """DINOv3 in its own names -> canonical: the key biases that its masks leave out become zeros.

    What the released files have for a mask is not read: the reference writes it when it builds a model.
    """
    canonical = from_chunked(state) if is_chunked(set(state)) else dict(state)
    for mask in [name for name in canonical if name.endswith(".qkv.bias_mask")]:
        bias = canonical.get(mask.removesuffix("_mask"))
        if bias is not None:
            canonical[mask] = key_bias_mask(len(bias))
            canonical[mask.removesuffix("_mask")] = torch.where(canonical[mask] > 0, bias, 0)
    return canonical
