"""Several real processes with a gloo process group, for tests."""

import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import ready
import torch
import torch.distributed as dist

MEMBER = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    sys.path[:] = pickle.load(file)
    pickle.load(file)(int(sys.argv[2]))
"""


def run_in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in every process of a group of `count`; what it returned, by rank.

    What one of them said of its failure is raised here, and the others are ended.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "member").open("wb") as file:
            pickle.dump(sys.path, file)
            pickle.dump(partial(_member, count, name, function, arguments), file)
        said = [(folder / f"{rank}.txt").open("w+") for rank in range(count)]
        members = [
            ready.server().start(folder / "member", str(rank), code=MEMBER, stdout=said[rank], stderr=said[rank])
            for rank in range(count)
        ]
        try:
            codes = [member.poll() for member in members]
            while None in codes and not any(codes):
                time.sleep(0.01)
                codes = [member.poll() for member in members]
        finally:
            for member in members:
                member.kill()
        for file, code in zip(said, codes, strict=True):
            with file:
                file.seek(0)
                if code:
                    raise RuntimeError(f"{code}: {file.read()}")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _member(count: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...], rank: int) -> None:
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
