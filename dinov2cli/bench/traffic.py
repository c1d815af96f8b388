"""Bytes that an operator of PyTorch reads and writes, if it does each once."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

OVERWRITING = {"copy_", "fill_", "zero_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "arange"}
GATHERING = {"index_select", "gather", "index", "embedding"}
SCATTERING = {"scatter_", "scatter_add_", "index_add_", "index_copy_", "index_put_", "_index_put_impl_"}


def traffic(func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> int:
    """Of an operator with these arguments, the tensors among what it was given, and what it made."""
    indices = sum(size_of(tensor) for tensor in given if tensor.dtype == torch.int64)
    if name in GATHERING:
        return indices + 2 * sum(map(size_of, made))
    if name in SCATTERING:
        return indices + 3 * size_of(given[-1])
    changed, overwritten = [], []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            changed += (leaves := [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)])
            overwritten += leaves if argument.is_out else []
    there = {storage_of(tensor) for tensor in given}
    new = [tensor for tensor in made if storage_of(tensor) not in there]
    read = sum(map(size_of, given)) - sum(map(size_of, overwritten))
    if name in OVERWRITING:
        read -= sum(map(size_of, changed)) if changed else read
    return read + sum(map(size_of, changed)) + sum(map(size_of, new))


def size_of(tensor: Tensor) -> int:
    """Bytes of the elements that are there: a tensor that is expanded has fewer than its shape says."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def storage_of(tensor: Tensor) -> int:
    """What tensors with the same memory have in common."""
    return int(tensor.untyped_storage()._cdata)
