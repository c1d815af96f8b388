"""What the measurements share: a clock that knows GPUs, the hardware's own rate, and how results are shown."""

import multiprocessing
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

Result = TypeVar("Result")


@dataclass(frozen=True)
class Measured:
    """What a measurement found.

    Attributes:
        figures: for programs (`--json`).
        shown: lines and tables for people.
    """

    figures: Mapping[str, Any]
    shown: Sequence[str | Table]

    def as_dict(self) -> Mapping[str, Any]:
        return self.figures

    def __rich__(self) -> Group:
        return Group(*(Text(each) if isinstance(each, str) else each for each in self.shown))


def table(*columns: str, rows: Sequence[Sequence[str]], numbers_right: bool = False) -> Table:
    """A table for `Measured.shown`."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if numbers_right and index else "left")
    for row in rows:
        made.add_row(*row)
    return made


class Clock:
    """Seconds by part. On a GPU they are read from events, so that timing makes nobody wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        self.marks = [("", self._now())]

    def mark(self, part: str) -> None:
        """What has passed since the last mark belongs to this part."""
        self.marks.append((part, self._now()))

    @property
    def only_started(self) -> bool:
        """Whether there is no mark yet."""
        return len(self.marks) == 1

    def read(self) -> dict[str, float]:
        """Seconds of every part; waits for the GPU."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
        parts: dict[str, float] = defaultdict(float)
        for (_, before), (part, now) in pairwise(self.marks):
            parts[part] += before.elapsed_time(now) / 1e3 if on_gpu else now - before
        return parts

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long `work` takes."""
        self.start()
        work()
        self.mark("work")
        return self.read()["work"]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@torch.no_grad()
def matrix_rate(rows: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Median GFLOP/s of one linear layer [rows, inputs] -> [rows, outputs]."""
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    clock = Clock(device)
    seconds = [clock.seconds(lambda: F.linear(x, weight)) for _ in range(repeats + 1)]
    return 2 * rows * inputs * outputs / 1e9 / statistics.median(seconds[1:])


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function gives in a new process; raises what it raises, and BrokenProcessPool if the process died."""
    # Ctrl-C reaches the process that waits for this one, too.
    ending = signal.signal, (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), *ending) as process:
        return process.submit(function, *arguments).result()


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
