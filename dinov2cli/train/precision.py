"""Device and arithmetic of a run, decided once."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from dinov2cli.config import Config
from dinov2cli.errors import EnvironmentProblem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(*, cpu: bool = False, local_rank: int = 0) -> torch.device:
    """This process's CUDA device, or the CPU if asked for or if there is no other.

    Raises:
        EnvironmentProblem: the machine runs more processes than it has GPUs.
    """
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (there := torch.cuda.device_count()):
        raise EnvironmentProblem(
            f"process {local_rank} of this machine has no GPU: {there} can be seen.",
            "Start one process for each GPU (--gpus, torchrun --nproc-per-node), or train on the CPU (--cpu).",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Precision:
    """Parameters, optimizer and losses are float32; `dtype` is that of the matrix products under autocast.

    Args:
        device: where training runs.
        dtype: float32, bfloat16 or float16.
        scale_gradients: float16 gradients are scaled against underflow.
        reason: why this dtype, in words.
    """

    device: torch.device
    dtype: torch.dtype
    scale_gradients: bool
    reason: str

    @classmethod
    def resolve(cls, config: Config, device: torch.device) -> "Precision":
        """The configured precision on this device.

        Raises:
            EnvironmentProblem: bf16 on a GPU without it.
        """
        asked = config.compute_precision.precision
        if device.type == "cpu":
            instead = "" if asked in ("auto", "fp32") else f", not {asked}"
            return cls(device, torch.float32, False, f"the CPU trains in float32{instead}")
        if asked in ("auto", "bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(device)
            if asked == "bf16":
                raise EnvironmentProblem(
                    f"compute_precision.precision=bf16: {name} has no bfloat16 arithmetic; fp16 or fp32 would run"
                )
            return cls(device, torch.float16, config.compute_precision.grad_scaler, f"{name} has no bfloat16")
        dtype = torch.bfloat16 if asked == "auto" else DTYPES[asked]
        scale = dtype == torch.float16 and config.compute_precision.grad_scaler
        return cls(device, dtype, scale, "as configured" if asked != "auto" else "the device's bfloat16")

    @property
    def name(self) -> str:
        """`fp32`, `bf16` or `fp16`."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def autocast(self) -> AbstractContextManager[None]:
        """Context in which matrix products run in `dtype`."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
