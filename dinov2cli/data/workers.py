"""Loader processes: how many, how they are set up, and what to say when one dies."""

import mmap
import os
import signal
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

from dinov2cli.console import logger
from dinov2cli.errors import Dino2Error, EnvironmentProblem, ProcessKilled

MAX_WORKERS = 16
"""Beyond this, one process's loaders no longer speed up: its own collation and copies are the limit."""


class WorkerError(NamedTuple):
    """An error that a worker hands to the main process as an item, so that it is raised there without traceback."""

    error: Dino2Error


def choose_workers(wanted: int | None) -> int:
    """Number of loader processes: `wanted`, or from the cores that this process may use.

    Cores are shared between the training processes of a machine, and each keeps one core for itself.
    """
    if wanted is not None:
        return wanted
    return max(1, min(MAX_WORKERS, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def start_method(num_workers: int) -> str | None:
    """How loader processes start: forked on Linux, so that they share the dataset's listing instead of copying it."""
    return "fork" if num_workers > 0 and sys.platform == "linux" else None


def available_cores() -> int:
    """Cores that this process may run on, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def set_up_worker(worker: int) -> None:
    """One thread a worker: parallelism comes from their number. Signals are for the main process to handle."""
    import cv2
    import torch

    # A terminal sends Ctrl-C, and Slurm its signals, to all processes; without its loaders a training cannot save. The
    # second SIGTERM is from the main process, which wants this one to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if hasattr(signal, "SIGUSR2"):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    sys.excepthook = _report_unless_reader_left
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _report_unless_reader_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # A tensor offered to a main process that has stopped reading is no error worth a traceback on the terminal.
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


@contextmanager
def opencv_on_one_thread(wanted: bool) -> Iterator[None]:
    """Where the main process loads images itself: on crops, OpenCV's threads cost more than they give."""
    import cv2

    before = cv2.getNumThreads()
    if wanted:
        cv2.setNumThreads(0)
    try:
        yield
    finally:
        if wanted:
            cv2.setNumThreads(before)


@contextmanager
def loader_errors() -> Iterator[None]:
    """Turn torch's message about a dead worker into one that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = "\n".join(str(e) for e in (error, error.__cause__, error.__context__) if e is not None)
        if "DataLoader worker" not in text:
            raise
        kind = EnvironmentProblem
        raised_inside, no_memory = "Caught " in text, "allocate memory" in text or "MemoryError" in text
        if raised_inside and not no_memory:  # a mistake of ours: its own words and place are in the message
            raise
        if raised_inside:
            kind, problem = ProcessKilled, f"a data loader process found no memory: {text.strip().splitlines()[-1]}"
        elif "Bus error" in text or "shared memory" in text or "shm" in text:
            problem = "a data loader process died because shared memory (/dev/shm) is full"
        elif "Killed" in text:
            kind = ProcessKilled  # as little a verdict on the run as the death of the training process itself
            problem = "a data loader process was killed by the system, most likely because memory ran out"
        else:
            problem = f"a data loader process died: {text.splitlines()[0]}"
        raise kind(
            problem,
            "Lower train.num_workers or train.batch_size_per_gpu; in Docker, give the container more shared memory "
            "(--shm-size=8g or --ipc=host).",
        ) from error


_SAID = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("I")
"""Checksums of the warnings that were logged, then zeros; shared with the loader processes, which are forked."""


def warn_once(text: str, *arguments: object) -> None:
    """Log a warning unless one with this `text` was logged before, by whichever loader process."""
    matter = zlib.crc32(text.encode())
    place = next(i for i, said in enumerate(_SAID) if said in (0, matter))
    if not _SAID[place]:
        _SAID[place] = matter
        logger.warning(text, *arguments)
