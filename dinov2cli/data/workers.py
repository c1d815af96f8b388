"""Loader processes: how many, how they are set up, and what to say when one dies."""

import mmap
import os
import signal
import sys
import tempfile
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from types import TracebackType
from typing import NamedTuple

from dinov2cli.console import logger
from dinov2cli.errors import OF_A_LOADER, Dino2Error, EnvironmentProblem, ProcessKilled

MAX_WORKERS = 16
"""Beyond this, one process's loaders no longer speed up: its own collation and copies are the limit."""


SOCKET_PATH = 103
"""Bytes that the path of a Unix socket may have: 107 on Linux, 103 on macOS."""
SOCKET_NAME = len("/pymp-12345678/listener-12345678")


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


def make_folder_for_sockets() -> None:
    """Where loader processes listen, whose batches are handed over as file descriptors; made before they are started.

    multiprocessing makes it where temporary files go. Below a long TMPDIR there is no room for the names of sockets;
    a loader would find that out when nobody hears it any more, and the training would wait for its batches for ever.

    Raises:
        EnvironmentProblem: no folder with a short name can be written.
    """
    from multiprocessing.util import get_temp_dir

    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) + SOCKET_NAME <= SOCKET_PATH:
        get_temp_dir()
        return
    for folder in SHORT_FOLDERS:
        if os.access(folder, os.W_OK | os.X_OK):
            try:
                tempfile.tempdir = folder
                get_temp_dir()  # the same from now on, for the processes that this one starts, too
            finally:
                tempfile.tempdir = usual
            return
    raise EnvironmentProblem(
        f"TMPDIR={usual} is too long: the sockets of the data loaders there have room for "
        f"{SOCKET_PATH - SOCKET_NAME} bytes, and {', '.join(SHORT_FOLDERS)} cannot be written",
        "Set TMPDIR to a folder with a short name, or train.num_workers=0 (--num-workers 0).",
    )


SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


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
    Queue._on_queue_feeder_error = staticmethod(_end_as_a_batch_is_lost)  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _report_unless_reader_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # A tensor offered to a main process that has stopped reading is no error worth a traceback on the terminal.
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_as_a_batch_is_lost(error: BaseException, batch: object) -> None:
    # Where there is no memory or no file descriptor to hand a batch over, the main process would wait for it for ever.
    if not isinstance(error, (OSError, MemoryError, RuntimeError)):  # torch raises RuntimeError for want of memory
        traceback.print_exception(error)
    os.kill(os.getpid(), signal.SIGKILL)


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
    except (RuntimeError, MemoryError, ConnectionError, EOFError) as error:
        text = "\n".join(str(e) for e in (error, error.__cause__, error.__context__) if e is not None)
        has_gone = "exited unexpectedly" in text or _was_taking_a_batch(error)
        if OF_A_LOADER not in text and not has_gone:
            raise
        kind = EnvironmentProblem
        raised_inside, no_memory = "Caught " in text, "allocate memory" in text or "MemoryError" in text
        if raised_inside and not no_memory:  # a mistake of ours: its own words and place are in the message
            raise
        if raised_inside:
            kind, problem = ProcessKilled, f"a data loader process found no memory: {text.strip().splitlines()[-1]}"
        elif "Bus error" in text or "shared memory" in text or "shm" in text:
            problem = "a data loader process died because shared memory (/dev/shm) is full"
        elif "Killed" in text or has_gone:
            kind = ProcessKilled  # as little a verdict on the run as the death of the training process itself
            problem = "a data loader process was killed by the system, most likely because memory ran out"
        else:
            problem = f"a data loader process died: {text.splitlines()[0]}"
        raise kind(
            problem,
            "Lower train.num_workers or train.batch_size_per_gpu; in Docker, give the container more shared memory "
            "(--shm-size=8g or --ipc=host).",
        ) from error


def _was_taking_a_batch(error: Exception) -> bool:
    """Whether the other side of a connection has gone, which torch may see before it sees that the process died."""
    passed = traceback.extract_tb(error.__traceback__)
    return isinstance(error, (ConnectionError, EOFError)) and any("multiprocessing" in each.filename for each in passed)


_SAID = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("I")
"""Checksums of the warnings that were logged, then zeros; shared with the loader processes, which are forked."""


def warn_once(text: str, *arguments: object) -> None:
    """Log a warning unless one with this `text` was logged before, by whichever loader process."""
    matter = zlib.crc32(text.encode())
    place = next(i for i, said in enumerate(_SAID) if said in (0, matter))
    if not _SAID[place]:
        _SAID[place] = matter
        logger.warning(text, *arguments)
