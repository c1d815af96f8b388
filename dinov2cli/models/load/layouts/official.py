"""The reference's own layout: flat, as released, and in chunks of blocks, as its training code writes it."""

import re

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
