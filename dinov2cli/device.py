"""Device and arithmetic, decided in one way for training, evaluation and pictures; main memory."""

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.errors import EnvironmentProblem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(asked: str | torch.device | None = None, option: str = "--device") -> torch.device:
    """The device that an option names; this process's own CUDA device becomes PyTorch's current one.

    Args:
        asked: `auto` or None: a GPU if there is one, else the CPU; `cuda`: the GPU of this process, one of several on
            its machine or not; `cpu`, `cuda:N` or a device: just that.
        option: that says so, for messages.

    Raises:
        EnvironmentProblem: no such device, or the machine runs more processes than it has GPUs.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked in (None, "auto"):
        asked = "cuda" if there else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise EnvironmentProblem(f"{option} {asked}: unknown; give auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise EnvironmentProblem(f"{option} {asked}: dino2 runs on CPUs and CUDA GPUs; give auto, cpu, cuda or cuda:N")
    if there and device.index is None and (own := distributed.local_rank()) >= there:
        raise EnvironmentProblem(
            f"process {own} of this machine has no GPU: {there} can be seen.",
            "Start one process for each GPU (--gpus, torchrun --nproc-per-node), or use the CPU (--cpu, --device cpu).",
        )
    device = torch.device("cuda", distributed.local_rank() if device.index is None else device.index)
    if device.index >= there:
        has = f"{there} CUDA devices" if there else "no GPU that PyTorch can use; dino2 doctor looks at the driver"
        raise EnvironmentProblem(f"{option} {asked}: this machine has {has}")
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Precision:
    """Parameters, optimizer and losses are float32; `dtype` is that of the matrix products under autocast.

    Args:
        device: where the model runs.
        dtype: float32, bfloat16 or float16.
        scale_gradients: float16 gradients are scaled against underflow.
        reason: why this dtype, in words.
    """

    device: torch.device
    dtype: torch.dtype
    scale_gradients: bool
    reason: str

    @classmethod
    def resolve(
        cls, asked: str, device: torch.device, *, grad_scaler: bool = True, frozen: bool = False
    ) -> "Precision":
        """What is asked for, on this device.

        Args:
            asked: `fp32`, `bf16`, `fp16`, or `auto`: bf16 on CUDA that has it, else fp16; the CPU computes in float32
                always.
            grad_scaler: whether float16 gradients are scaled.
            frozen: the model is only looked at: one that was trained in bf16 runs in fp16 where there is no bf16.

        Raises:
            EnvironmentProblem: training in bf16 on a GPU without it.
        """
        if device.type != "cuda":
            instead = "" if asked in ("auto", "fp32") else f", not {asked}"
            return cls(device, torch.float32, False, f"the CPU trains in float32{instead}")
        if asked in ("auto", "bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(device)
            if asked == "bf16" and not frozen:
                raise EnvironmentProblem(
                    f"compute_precision.precision=bf16: {name} has no bfloat16 arithmetic; fp16 or fp32 would run"
                )
            return cls(device, torch.float16, grad_scaler, f"{name} has no bfloat16")
        dtype = torch.bfloat16 if asked == "auto" else DTYPES[asked]
        scale = dtype == torch.float16 and grad_scaler
        return cls(device, dtype, scale, "as configured" if asked != "auto" else "the device's bfloat16")

    @property
    def name(self) -> str:
        """`fp32`, `bf16` or `fp16`."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def autocast(self) -> AbstractContextManager[None]:
        """Context in which matrix products run in `dtype`."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def why_not_compile(device: torch.device) -> str | None:
    """What keeps torch.compile from writing kernels for a device, in words; None if it can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "triton needs a GPU of compute capability 7.0"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "triton finds no C compiler"
    return None


class Arriving:
    """Tensors on their way to main memory; from a GPU the copy runs behind the work that is queued already.

    Reading a tensor of one step only when the next one is queued would else wait for that one, too.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._tensors = {
                name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for name, t in self._tensors.items()
            }
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> dict[str, Tensor]:
        """The tensors in main memory; waits for their copy alone."""
        if self._event is None:
            return {name: tensor.cpu() for name, tensor in self._tensors.items()}
        self._event.synchronize()
        return self._tensors


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of matrix products under autocast on such a device, or None; the meta device knows no autocast."""
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def without_autocast(kind: str) -> AbstractContextManager[None]:
    """Context in which nothing is cast on such a device."""
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def main_memory() -> int:
    """Bytes of main memory that this process may use, by the machine and its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, int(limit))


def main_memory_of_a_process() -> float:
    """Bytes of main memory for each of the processes that share this machine."""
    return main_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
