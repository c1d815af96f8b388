"""Process group, rank and reductions, all of which are no-ops in a single process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_initialized() -> bool:
    """Whether a process group exists in this process."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun (or a launcher with its environment variables) started; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's index among all, 0 in a single process."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if is_initialized() else 1


def local_rank() -> int:
    """This process's index on its machine, as torchrun and Slurm launchers export it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this process writes the files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes, in place; the same tensor is returned."""
    if is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Elementwise maximum of `tensor` over all processes, in place; the same tensor is returned."""
    if is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean of `tensor` over all processes, in place; the same tensor is returned."""
    return all_reduce_sum(tensor).div_(world_size())


def all_gather_objects(value: T) -> list[T]:
    """Every process's `value`, in rank order. Values are pickled: for small things only."""
    if not is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T) -> T:
    """Rank 0's `value` on every process."""
    if not is_initialized():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Rows of every process, concatenated in rank order. [N_r, ...] -> [sum N_r, ...]; N_r may differ."""
    if not is_initialized():
        return tensor
    sizes = all_gather_objects(tensor.shape[0])
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
