"""What a person sees: rich consoles, logging, progress bars; and the JSON lines that programs read."""

import contextlib
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from dinov2cli.files import write_text, writing

Item = TypeVar("Item")
Made = TypeVar("Made")

out = Console()
"""Standard output: results."""
err = Console(stderr=True)
"""Standard error: everything else, so that `--json` output can be piped."""
logger = logging.getLogger("dino2")
SPEAK_SECONDS = 15.0
"""Between lines about work that has no terminal to show a bar on."""


class Manner:
    """How much this process says, as `--quiet` and `--verbose` ask."""

    quiet = False
    verbose = False
    speaker = ""
    """Of several runs in this process, the one whose lines these are; they begin with its name."""


@contextlib.contextmanager
def speaking(name: str) -> Iterator[None]:
    """Around the work of a run of this name among several."""
    before, Manner.speaker = Manner.speaker, name
    try:
        yield
    finally:
        Manner.speaker = before


def _with_speaker(record: logging.LogRecord) -> bool:
    """A filter of the logger, which sees a record once, that lets all pass."""
    if Manner.speaker:
        record.msg, record.args = f"{Manner.speaker}: {record.getMessage()}", None
    return True


def set_up_logging(*log_files: Path, quiet: bool = False) -> None:
    """Send the `dino2` logger to standard error (`quiet`: warnings only) and append it to the files that are given."""
    logger.setLevel(logging.DEBUG if Manner.verbose else logging.INFO)
    logger.propagate = False
    logger.addFilter(_with_speaker)  # once, however often
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    to_terminal = RichHandler(console=err, show_path=False, log_time_format="[%H:%M:%S]", markup=False)
    to_terminal.setLevel(logging.WARNING if quiet or Manner.quiet else logging.NOTSET)
    logger.addHandler(to_terminal)
    for log_file in log_files:
        to_file = _LateFileHandler(log_file, encoding="utf-8", errors="backslashreplace", delay=True)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(to_file)


class _LateFileHandler(logging.FileHandler):
    """Creates the file and its folder with the first record: a command that fails at once leaves nothing behind."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        """A log that cannot be written (a full disk) must not cover what is on the terminal with tracebacks."""


class Rate(ProgressColumn):
    """Such as `12.3/s`, of the last half minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s", "progress.data.speed")


class Bars(Progress):
    """Bars that fit into 80 columns; without a terminal, a line in the log every `SPEAK_SECONDS`."""

    steps = 0
    """How often any bar of this process has moved: a sign of life in work of unknown length."""

    def __init__(self) -> None:
        name = TextColumn("{task.description}", table_column=Column(max_width=26, no_wrap=True, overflow="ellipsis"))
        left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
        shown = name, BarColumn(bar_width=14), MofNCompleteColumn(), Rate(), left
        live = shows_bars(err)
        super().__init__(*shown, console=err, disable=not live, auto_refresh=live)
        self._spoke = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        Bars.steps += 1
        if self.disable and time.monotonic() - self._spoke > SPEAK_SECONDS:
            self._spoke = time.monotonic()
            task = self._tasks[task_id]
            left = "" if task.time_remaining is None else f", {clock(task.time_remaining)} left"
            of = "" if task.total is None else f" of {task.total:.0f}"
            rate = "" if task.speed is None else f", {task.speed:.3g}/s"
            logger.info("%s: %.0f%s%s%s", task.description, task.completed, of, rate, left)


def shows_bars(console: Console) -> bool:
    """Whether a bar can move there: a terminal, or a notebook that has ipywidgets."""
    is_notebook = console.is_jupyter and find_spec("ipywidgets") is not None
    return not Manner.quiet and (console.is_terminal or is_notebook)


def clock(seconds: float) -> str:
    """`1 d 2:03:04`, or without the days."""
    days, rest = divmod(int(seconds), 86400)
    shown = f"{rest // 3600:d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {shown}" if days else shown


def progress() -> Progress:
    """A progress display on standard error with count, rate and remaining time."""
    return Bars()


def in_threads(work: Callable[[Item], Made], items: Collection[Item], name: str, threads: int) -> list[Made]:
    """What `work` makes of each item, in their order, under a bar of this name; several are in work at a time."""
    with progress() as bar, ThreadPoolExecutor(threads) as pool:
        return list(bar.track(pool.map(work, items), total=len(items), description=name))


class Interrupted(KeyboardInterrupt):
    """Work stopped by a signal after what it had done was saved.

    Args:
        signal: its number: SIGINT, SIGTERM, or SIGUSR2 for a scheduler that will start the work again.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal


REQUEUING = [signal.SIGUSR2] if hasattr(signal, "SIGUSR2") else []
"""The signal by which schedulers announce that time is up."""


@contextlib.contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give signals to a handler; off the main thread, which alone gets them, nothing."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in (numbers if on_main_thread else [])}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def interruption(message: str, *, requeue: bool = False) -> Iterator[list[int]]:
    """A list that holds the signal after Ctrl-C or SIGTERM, for a loop to stop between two steps.

    Unlike a KeyboardInterrupt, it is not lost where Python ignores exceptions (in a finaliser). A second Ctrl-C raises
    at once; SIGTERM after another signal does not, as it would cut the saving short that the first asked for. Off the
    main thread, which alone gets signals, the list stays empty.

    Args:
        message: logged at the first signal.
        requeue: take those of `REQUEUING`, too.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not received:
            logger.info(message)
        received.append(number)

    with handling([signal.SIGINT, signal.SIGTERM, *(REQUEUING if requeue else [])], note):
        yield received


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Raise `Interrupted` at SIGTERM and SIGUSR2, as Python does at Ctrl-C: what is held is released, such as locks.

    For the time before and after work that handles signals itself. Off the main thread, nothing.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with handling([signal.SIGTERM, *REQUEUING], stop):
        yield


@contextlib.contextmanager
def stoppable(message: str = "stopping") -> Iterator[Callable[[], None]]:
    """A function that a loop calls between its steps; it raises `Interrupted` after Ctrl-C or SIGTERM.

    What is inside runs undisturbed between these calls, and to its end if there are none: a file is written whole or
    not begun. A second Ctrl-C raises at once. Inside of other work that handles signals, a training above all, they
    are left to that.
    """
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler) and handler is not signal.default_int_handler:
        yield lambda: None
        return
    with interruption(message) as signals:

        def stop_if_asked() -> None:
            if signals:
                raise Interrupted(signals[0])

        yield stop_if_asked
        stop_if_asked()


Advance = Callable[[float], None]
"""Takes how much more is done; what it raises ends the work."""


@contextlib.contextmanager
def counting(name: str, total: float | None = None, done: float = 0) -> Iterator[Advance]:
    """What moves a bar and, as what `stoppable` gives, raises `Interrupted`."""
    with progress() as bar, stoppable() as stop_if_asked:
        task = bar.add_task(name, total=total, completed=done)  # type: ignore[arg-type]

        def advance(more: float) -> None:
            bar.advance(task, more)
            stop_if_asked()

        yield advance


def counted(number: int, noun: str) -> str:
    """`1 frame`, `2 frames`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def few(words: Sequence[str], most: int = 5) -> str:
    """The first of some words, and dots where there are more: `a, b, ...`."""
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "")


def plain_table(*columns: str | Column) -> Table:
    """A table with a rule below its heads, and nothing else drawn."""
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def print_json(value: Any) -> None:
    """Print exactly one JSON object on standard output, unwrapped and uncoloured."""
    print(json.dumps(value, allow_nan=False, default=str), flush=True)


class MetricLogger:
    """Appends one JSON object a line to a metrics file (`training_metrics.json`).

    On resuming at iteration `k`, lines of iterations `>= k` are dropped first: they belong to work that was lost and
    is done again, so each iteration stands in the file once. The rewritten file replaces the old one atomically.
    """

    def __init__(self, path: Path, *, resume_at: int = 0) -> None:
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _iteration_of(line) < resume_at]
                write_text(path, "".join(line + "\n" for line in kept))
            self._file = path.open("a", buffering=1)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line; non-finite numbers become null, which every JSON reader takes.

        Raises:
            EnvironmentProblem: the disk is full.
        """
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in metrics.items()}
        with writing(self.path):
            self._file.write(json.dumps(clean) + "\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is still in its buffer
            self._file.close()


def _iteration_of(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a kill: drop it
