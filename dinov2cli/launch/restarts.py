"""The restarts of a run, in `logs/restarts.jsonl`, and when there have been enough."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

FILE = Path("logs", "restarts.jsonl")  # in the run folder
# Restarts in a row without a newer checkpoint
MAX_CRASHES = 3  # after errors of the program: the next would only repeat them
MAX_DEATHS = 10  # where processes were killed from outside (by a person, or for want of memory), which may pass


@dataclass(frozen=True)
class Restart:
    """One new start of a run's processes.

    Attributes:
        kind: "crash" (an exception), "death" (a process was killed) or "requeue" (by Slurm, in the same job).
        reason: what happened, in words.
        rank: the process it began with, -1 where there is none.
        iteration: of the checkpoint that is resumed, 0 for none.
        session: which command or Slurm job; restarts are counted within one.
        time: when, in seconds since 1970.
    """

    kind: Literal["crash", "death", "requeue"]
    reason: str
    rank: int
    iteration: int
    session: str
    time: float = field(default_factory=time.time)


def record_restart(run: Path, restart: Restart) -> None:
    """Append a restart to the run's list."""
    path = run / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(restart)) + "\n")


def read_restarts(run: Path) -> list[Restart]:
    """The run's restarts so far, the newest last; a line cut short by a failure is left out."""
    path = run / FILE
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError):
            found.append(Restart(**json.loads(line)))
    return found


def newest_checkpoint(run: Path) -> int:
    """Iteration of the newest whole checkpoint, 0 where there is none. Reads only names."""
    names = [path.name.removeprefix("iteration_") for path in (run / "checkpoints").glob("iteration_*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def enough(restarts: Sequence[Restart], session: str, iteration: int) -> bool:
    """Whether another restart at `iteration` would make no sense: too many in a row got no further."""
    in_a_row = []
    for restart in reversed([each for each in restarts if each.session == session and each.kind != "requeue"]):
        if restart.iteration != iteration:
            break
        in_a_row.append(restart.kind)
    return in_a_row.count("crash") >= MAX_CRASHES or len(in_a_row) >= MAX_DEATHS
