"""Whether the memory is enough for a run, and with which batches it would be."""

import bisect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dinov2cli.config import Config
from dinov2cli.device import Precision, main_memory
from dinov2cli.errors import EnvironmentProblem
from dinov2cli.train.cost import GB, MemoryEstimate, describe, estimate
from dinov2cli.train.sharding import choose_sharding

TOLERANCE = 1.1
"""Estimates were up to a tenth above what was measured: what is further above the memory than that is refused."""
BESIDE = 1.0
"""GB that interpreter and loader take of main memory; a GPU's own part is not in its total."""


@dataclass(frozen=True)
class Need:
    """What each process of a run is expected to need at its peak, what there is, and what a step may take of it, GB."""

    config: Config
    expected: MemoryEstimate
    there: float
    room: float
    run: dict[str, Any]

    @classmethod
    def of(cls, config: Config, device: torch.device, world_size: int, processes_here: int) -> "Need":
        """Of a run of `world_size` processes, so many of which share this machine."""
        asked = config.compute_precision
        precision = Precision.resolve(asked.precision, device, grad_scaler=asked.grad_scaler)
        sharding, _ = choose_sharding(config, precision, world_size)
        run: dict[str, Any] = {"world_size": world_size, "sharding": sharding, "precision": precision.name}
        if device.type == "cuda":
            there = torch.cuda.get_device_properties(device).total_memory / GB
        else:
            there = main_memory() / processes_here / GB
        return cls(config, estimate(config, **run), there, there - BESIDE * (device.type == "cpu"), run)

    def __str__(self) -> str:
        return f"{describe(self.expected)}; {self.there:,.1f} GB are there"

    @property
    def is_tight(self) -> bool:
        return self.expected.total > self.room

    @property
    def is_too_much(self) -> bool:
        return self.expected.total > TOLERANCE * self.room

    def remedy(self) -> str:
        """What fits, with as many images in a step; in words where nothing does.

        First what changes no number, then the largest batches (KoLeo looks at one batch), and what costs most last.
        """
        train = self.config.train
        whole = train.batch_size_per_gpu
        sizes = [size for size in range(1, whole) if whole % size == 0]
        ways: list[tuple[Any, list[int]]] = [(train.activation_checkpointing, sizes)]
        if not self.config.student.library():
            ways = [("selective", [whole]), *ways, ("selective", sizes), (True, [*sizes, whole])]
        for again, of_these in ways:
            fitting = bisect.bisect_right(of_these, self.room, key=partial(self._total, again=again))
            if fitting:
                size = of_these[fitting - 1]
                steps = train.gradient_accumulation * whole // size
                words = [f"train.batch_size_per_gpu={size} train.gradient_accumulation={steps}"] * (size < whole)
                words += [f"train.activation_checkpointing={again}".lower()] * (again != train.activation_checkpointing)
                return f"This would fit: {' '.join(words)}"
        return "Choose a smaller student.arch or smaller heads, or more processes with train.sharding=fsdp."

    def _total(self, batch: int, again: Any) -> float:
        changes = {"batch_size_per_gpu": batch, "activation_checkpointing": again}
        train = self.config.train.model_copy(update=changes)
        return estimate(self.config.model_copy(update={"train": train}), **self.run).total


def check_memory(config: Config, processes: int, *, cpu: bool) -> None:
    """Refuse a run whose processes, all on this machine, would need clearly more memory than there is.

    Raises:
        EnvironmentProblem: they do; the message says what would fit.
    """
    on_gpu = torch.cuda.is_available() and not cpu
    need = Need.of(config, torch.device("cuda", 0) if on_gpu else torch.device("cpu"), processes, processes)
    if need.is_too_much:
        raise EnvironmentProblem(f"memory: {need}", need.remedy())
