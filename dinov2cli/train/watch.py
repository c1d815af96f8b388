"""Signs of life of every process in the run folder, and the stacks of all of them when nothing moves any more."""

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from dinov2cli import distributed
from dinov2cli.console import Bars, logger
from dinov2cli.files import write_text
from dinov2cli.train.run_folder import RunFolder

WRITE_EVERY_S = 5.0
GRACE_S = 5.0  # between a process's stacks and its end: the others reach their time-out about now
STARTING = 4  # times `train.hang_timeout`, for listing the data, making the networks and loading a checkpoint
EVALUATING = 4  # times it, for what an evaluation does between two steps of its progress bars


@contextlib.contextmanager
def watched_start(folder: RunFolder, hang_timeout: float) -> Iterator[None]:
    """Around what a process does before it trains: as `Watch`, where it takes `STARTING` times `hang_timeout` seconds.

    The stacks go to standard error where the run has no folder yet.
    """
    begun, limit, ended = time.monotonic(), STARTING * hang_timeout, threading.Event()

    def watch() -> None:
        if ended.wait(limit):
            return
        path = folder.stacks(distributed.rank()) if (folder.path / "logs").is_dir() else None
        nothing = f"no iteration {time.monotonic() - begun:.0f} s after the start"
        write_stacks(path, nothing)
        allowed = f"{STARTING} times train.hang_timeout={hang_timeout:g}"
        stacks = f"in {path.parent}" if path else "above"
        end_hanging(ended, f"{nothing} ({allowed}): the run hangs. The stacks of all processes are {stacks}")

    thread = threading.Thread(target=watch, name="start watch", daemon=True)
    if hang_timeout:
        thread.start()
    try:
        yield
    finally:
        ended.set()


def write_stacks(path: Path | None, headline: str) -> None:
    """The stacks of all threads of this process, into a file, or on standard error."""
    who = f"rank {distributed.rank()} on {socket.gethostname()}, pid {os.getpid()}"
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(path.open("w")) if path is not None else sys.stderr
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {who}: {headline}", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)


def end_hanging(ended: threading.Event, text: str) -> NoReturn:
    """End this process, once the others have written their stacks; the first says why."""
    ended.wait(GRACE_S)
    if distributed.is_main():
        logger.error("%s", text)
    os._exit(1)  # nothing gentler ends a process that is stuck in a collective or in a driver


class Watch:
    """Around a training loop: `beat` at each iteration.

    A thread writes `logs/heartbeat/rank_<r>.json` every few seconds. If no beat comes for `hang_timeout` seconds, it
    writes the stacks of all threads to `logs/stacks/rank_<r>.txt` and ends the process with exit code 1. The processes
    of a run wait for each other in every iteration, so that all of them do this when one hangs. In an evaluation they
    do it if for `EVALUATING` times as long no bar moves, neither of their own nor of the first process, for which the
    others may wait for long.

    Of several runs in a process each has its own, and what any of them is told is a sign of life of all.

    Args:
        iteration: done so far, of `total`.
        hang_timeout: seconds; 0: never.
    """

    _last_beat = 0.0  # of the process, as is what it does
    _evaluates = False

    def __init__(self, folder: RunFolder, *, total: int, iteration: int, hang_timeout: float) -> None:
        rank = distributed.rank()
        self.heartbeat, self.first = folder.heartbeat(rank), folder.heartbeat(0)
        self.stacks = folder.stacks(rank)
        self.hang_timeout = hang_timeout
        self.facts = {
            "rank": rank,
            "world_size": distributed.world_size(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "iteration": iteration,
            "total": total,
        }
        self.state = "training"
        self._iter_times: deque[float] = deque(maxlen=50)
        self._data_times: deque[float] = deque(maxlen=50)
        Watch._last_beat = time.monotonic()
        self._steps: tuple[int, ...] = ()  # of the bars, when last looked at
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        if distributed.is_main():  # of an earlier session with more processes, whose clock may have been ahead
            for path in self.heartbeat.parent.glob("rank_*.json"):
                if int(path.stem[len("rank_") :]) >= distributed.world_size():
                    path.unlink(missing_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self.state = "finished"
        else:
            self.state = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        self._write()

    def beat(self, iteration: int, iter_time: float, data_time: float) -> None:
        """`iteration` iterations are done; the last took `iter_time` seconds, `data_time` of them waiting for data."""
        self.facts["iteration"] = iteration
        self._iter_times.append(iter_time)
        self._data_times.append(data_time)
        Watch._last_beat = time.monotonic()

    @contextlib.contextmanager
    def doing(self, state: str) -> Iterator[None]:
        """Around work between two iterations: "saving", or "evaluating", which takes as long as it goes on."""
        self.state, Watch._last_beat = state, time.monotonic()
        Watch._evaluates = state == "evaluating"
        try:
            yield
        finally:
            Watch._last_beat = time.monotonic()
            self.state, Watch._evaluates = "training", False

    def _run(self) -> None:
        while not self._ended.wait(min(WRITE_EVERY_S, self.hang_timeout / 4 or WRITE_EVERY_S)):
            self._write()
            what, limit, words = "iteration", self.hang_timeout, f"train.hang_timeout={self.hang_timeout:g}"
            if self._evaluates:
                what, limit, words = "progress of the evaluation", EVALUATING * limit, f"{EVALUATING} times {words}"
                if (steps := (Bars.steps, self._steps_of_first())) != self._steps:
                    self._steps, Watch._last_beat = steps, time.monotonic()
            silence = time.monotonic() - self._last_beat
            if self.hang_timeout and silence > limit:
                self._report_hang(f"no {what} for {silence:.0f} s", words)

    def _steps_of_first(self) -> int:
        """As the first process has written them."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return int(json.loads(self.first.read_text())["steps"])
        return 0

    def _report_hang(self, nothing: str, limit: str) -> None:
        self.state = "hanging"
        self._write()
        done = self.facts["iteration"]
        write_stacks(self.stacks, f"{nothing}, after {done} iterations")
        end_hanging(
            self._ended, f"{nothing} ({limit}): the run hangs after {done} iterations. The stacks of all processes are "
            f"in {self.stacks.parent}",
        )  # fmt: skip

    def _write(self) -> None:
        """Replace the heartbeat file; a disk that is full or away for a moment must not end a run."""
        content = {
            **self.facts,
            "iter_time": statistics.median(self._iter_times) if self._iter_times else None,
            "data_time": statistics.median(self._data_times) if self._data_times else None,
            "steps": Bars.steps,
            "time": time.time(),
            "state": self.state,
        }
        with contextlib.suppress(OSError):
            write_text(self.heartbeat, json.dumps(content))
