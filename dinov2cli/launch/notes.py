"""How each worker ended, in a folder that the supervisor reads.

A worker that ends on purpose (the user's error, an interruption) exits with 0 and leaves a note; one that fails
unexpectedly leaves its traceback and exits with 1. A worker without a note was killed.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from dinov2cli.errors import Dino2Error, ProcessKilled, machine_problems
from dinov2cli.files import write_text
from dinov2cli.launch.environment import NOTES_FOLDER, SUPERVISOR_PID, is_supervised, worker_rank


@dataclass(frozen=True)
class Note:
    """The end of one worker.

    Attributes:
        rank: which worker.
        kind: "error" (the user can put it right), "interrupted", "crash" (an unexpected exception) or "death" (the
            process, or a loader of its, was killed; of itself, its supervisor says so).
        message: what to print; for a crash the last line of the traceback.
        exit_code: what the whole command should exit with.
        hint: the error's hint, or a crash's traceback.
        signal: number of the signal that interrupted or killed the worker, 0 for none.
        time: when, in seconds since 1970.
    """

    rank: int
    kind: Literal["error", "interrupted", "crash", "death"]
    message: str
    exit_code: int = 1
    hint: str | None = None
    signal: int = 0
    time: float = field(default_factory=time.time)


@contextmanager
def reported() -> Iterator[None]:
    """In a supervised worker, turn what ends the code inside into a note and an exit code.

    What ends it for the machine's sake becomes an EnvironmentProblem first, in every process.
    """
    try:
        with machine_problems():
            yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch has some that are no `Exception`
        if not is_supervised():
            raise
        note = note_of(error, worker_rank())
        write_note(Path(os.environ[NOTES_FOLDER]), note)
        raise SystemExit(1 if note.kind in ("crash", "death") else 0) from error


def note_of(error: BaseException, rank: int) -> Note:
    """The note of a worker that ends with `error`."""
    from dinov2cli.console import Interrupted

    if isinstance(error, ProcessKilled):
        return Note(rank, "death", error.message, error.exit_code, error.hint, signal.SIGKILL)
    if isinstance(error, Dino2Error):
        return Note(rank, "error", error.message, error.exit_code, error.hint)
    if isinstance(error, KeyboardInterrupt):
        number = error.signal if isinstance(error, Interrupted) else signal.SIGINT
        return Note(rank, "interrupted", f"stopped by {signal.Signals(number).name}", 130, signal=int(number))
    trace = "".join(traceback.format_exception(error)).rstrip()
    return Note(rank, "crash", trace.splitlines()[-1], 1, trace)


def mark(stage: Literal["joining", "joined"]) -> None:
    """In a supervised worker, tell the supervisor that this process is about to join the others, or has joined them."""
    if is_supervised():
        write_text(Path(os.environ[NOTES_FOLDER]) / f"{worker_rank():05d}.{stage}", "")


def is_marked(folder: Path, rank: int, stage: Literal["joining", "joined"]) -> bool:
    """Whether a worker has made the mark."""
    return (folder / f"{rank:05d}.{stage}").exists()


def write_note(folder: Path, note: Note) -> None:
    """Put a note into the folder; the first of a worker stays."""
    path = folder / f"{note.rank:05d}.json"
    if not path.exists():
        write_text(path, json.dumps(asdict(note)))


def read_notes(folder: Path) -> list[Note]:
    """All notes in the folder, by rank."""
    return [Note(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def cause(notes: list[Note]) -> Note | None:
    """The note that explains the others.

    A worker that died without a word is never a consequence; otherwise the first to fail is the cause, as the others
    then fail for want of it.
    """
    failed = [note for note in notes if note.kind != "interrupted"]
    deaths = [note for note in failed if note.kind == "death"]
    return min(deaths or failed or notes, key=lambda note: note.time, default=None)


def end_with_supervisor() -> None:
    """In a supervised worker, watch the supervisor from a thread, and end with it however it ends.

    The whole process group is killed, which holds the loader processes, too.
    """
    if not is_supervised():
        return
    supervisor = int(os.environ[SUPERVISOR_PID])

    def watch() -> None:
        while os.getppid() == supervisor:
            time.sleep(1)
        print(f"process {worker_rank()}: its launcher is gone; stopping", file=sys.stderr, flush=True)
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="supervisor watch", daemon=True).start()
