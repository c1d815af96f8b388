"""Several processes on this machine."""

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from dinov2cli.errors import EnvironmentProblem
from dinov2cli.launch.environment import RUN_TOKEN
from dinov2cli.requests.base import Request, words_of


class Elsewhere(NamedTuple):
    """A command that other processes do.

    Attributes:
        result: what the command that was typed prints of it: the job; None where the processes print for themselves.
    """

    result: Any


def launch_local(request: Request, processes: int, run: Path | None) -> None:
    """Do a request in several processes of this machine and wait for their end.

    Args:
        request: what each process does.
        processes: how many; on GPUs one each.
        run: the run folder, for restarts from its checkpoints; None if the request is not to be restarted.

    Raises:
        Dino2Error, Interrupted: as `launch.supervisor.supervise`.
    """
    from dinov2cli.launch.supervisor import Group, supervise

    share_cores(processes)
    with tempfile.TemporaryDirectory(prefix="dino2-") as notes:
        group = Group(["-m", "dinov2cli", *words_of(request)], processes, Path(notes), run)
        os.environ[RUN_TOKEN] = group.session
        supervise(group)


def launch_here(request: Any) -> Elsewhere | None:
    """Start a request that has `gpus`, `device` and `dry_run` in several processes here, or (None) in this process.

    Raises:
        Dino2Error: as `processes_here` and `launch_local`.
    """
    gpus, cpu = request.gpus or 1, request.device == "cpu"
    if gpus == 1 or request.dry_run:
        return None
    launch_local(request, processes_here(gpus, cpu=cpu, instead="--device cpu"), None)
    return Elsewhere(None)


def share_cores(processes: int) -> None:
    """Give each process its part of the cores, where the user has not said otherwise (OMP_NUM_THREADS)."""
    from dinov2cli.data.workers import available_cores

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))


def processes_here(gpus: int | None, *, cpu: bool, instead: str = "--cpu") -> int:
    """How many processes `--gpus` and `--cpu` ask for on this machine: one on each GPU, or as many as said on the CPU.

    Raises:
        EnvironmentProblem: there are fewer GPUs.
    """
    if cpu:
        return gpus or 1
    import torch

    there = torch.cuda.device_count()
    if gpus is not None and gpus > there:
        has = f"{there} GPU{'s' if there > 1 else ''}" if there else "no GPU that PyTorch can use"
        raise EnvironmentProblem(
            f"--gpus {gpus}: this machine has {has}",
            f"Lower it, or add {instead} for {gpus} processes on the CPU; dino2 doctor looks at the driver.",
        )
    return gpus or max(1, there)
