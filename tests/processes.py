"""Several real processes with a gloo process group, for tests."""

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in every process of a group of `count`; what it returned, by rank.

    An exception in one of them is raised here, and the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_member, args=(count, folder, function, arguments), nprocs=count)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(count)]


def _member(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count, timeout=timedelta(seconds=120)
    )
    torch.save(function(*arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # Threads of PyTorch's that are still about have been seen to abort an interpreter that takes itself down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
