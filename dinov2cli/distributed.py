"""Process group, rank and reductions, all of which are no-ops in a single process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2cli.errors import Dino2Error, EnvironmentProblem

T = TypeVar("T")


def is_initialized() -> bool:
    """Whether a process group exists in this process."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def process_group(*, alone: bool = False) -> Iterator[None]:
    """Join the processes that torchrun, srun or a launcher with torchrun's variables started.

    A process that nobody launched as one of several does nothing; with `alone`, it forms a group of one, which sharded
    training needs.

    Raises:
        EnvironmentProblem: the other processes do not answer.
    """
    _adopt_srun_variables()
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if is_initialized() or not (together or alone):
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        if together:
            store, rank, world_size = next(dist.rendezvous("env://"))
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    except (RuntimeError, ValueError) as error:
        if {"TORCHELASTIC_RUN_ID", "DINO2_NOTES"} & os.environ.keys():
            raise  # whoever started this process will start it again
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise EnvironmentProblem(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not join the others at {where}: "
            f"{str(error).strip().splitlines()[0]}",
            "Start all processes with torchrun, srun, or dino2 train --gpus N [--nodes N].",
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def same_error_everywhere() -> Iterator[None]:
    """Let no process wait for one that failed: a `Dino2Error` of any process inside is raised by all of them.

    Every process must enter it, and the code inside must not be collective. With errors in several processes, that of
    the first rank is raised.
    """
    problem: Dino2Error | None = None
    try:
        yield
    except Dino2Error as error:
        problem = error
    if first := next((each for each in all_gather_objects(problem) if each is not None), None):
        raise first


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


def broadcast_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's `value` on every process, told over `group` where given."""
    if not is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
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


def _adopt_srun_variables() -> None:
    """Let `srun -n 8 dino2 ...` do what torchrun does: submitit reads Slurm's variables and sets torchrun's."""
    # Only a job step has several tasks of its own; in a batch script or salloc's shell, this process is alone.
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    from submitit.helpers import TorchDistributedEnvironment

    os.environ.setdefault("SUBMITIT_EXECUTOR", "slurm")  # by which submitit knows where it is
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
