"""One training in a run folder at a time, whatever machine it runs on: the file `.dino2-owner` says who it is.

It is made by a hard link, which one of several makers gets, over NFS, too; the owner touches it every few seconds, and
ages are told by the file server's clock alone.
"""

import contextlib
import json
import os
import platform
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dinov2cli.console import logger
from dinov2cli.errors import ConfigError
from dinov2cli.files import writing
from dinov2cli.launch.environment import RUN_TOKEN
from dinov2cli.launch.status import read_jobs, slurm_state

NAME = ".dino2-owner"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
         "PREEMPTED")  # fmt: skip
"""States of jobs that are over; processes of those that wait in the queue (again) do not run either."""
BEAT_S = 10.0
STALE_S = 300.0
"""Seconds without a sign of life after which an owner on another machine is gone."""


@dataclass(frozen=True)
class Owner:
    """Who trains in a folder.

    Attributes:
        token: of this very start.
        session: the same in all starts of one command or job that dino2 started.
        machine: on which process numbers mean the same: host, boot and container.
        born: when the process began, in the machine's own count: numbers are used again.
        job: Slurm's number, if it is in a job.
        start: how often Slurm had started that job before.
    """

    token: str
    session: str
    host: str
    machine: str
    pid: int
    born: str
    job: str
    start: int

    @staticmethod
    def this() -> "Owner":
        token, job = secrets.token_hex(8), os.environ.get("SLURM_JOB_ID", "")
        elastic = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        session = os.environ.get(RUN_TOKEN) or (elastic if elastic != "none" else token)
        host, pid, start = socket.gethostname(), os.getpid(), int(os.environ.get("SLURM_RESTART_COUNT", 0))
        return Owner(token, session, host, _machine(host), pid, _born(pid), job, start)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")

    def is_gone(self, mine: "Owner", age: float) -> bool:
        """Whether it cannot be training any more."""
        if self.machine == mine.machine:
            return self.born != _born(self.pid)
        is_again = self.job and self.job == mine.job and self.start < mine.start
        if self.session == mine.session or is_again:  # whoever starts these again has ended them before
            return True
        return (bool(self.job) and slurm_state(self.job) in (*ENDED, "PENDING", "REQUEUED")) or age > STALE_S


def owner_of(run: Path) -> tuple[Owner, float] | None:
    """Who owns a folder, and seconds since the last sign of life; None if nobody does."""
    path = run / NAME
    try:
        age = _server_time(run) - path.stat().st_mtime
        return Owner(**json.loads(path.read_text())), age
    except (OSError, ValueError, TypeError):  # none, or written by another version
        return None


def check_free(run: Path) -> None:
    """Say who else trains in a folder, if somebody does.

    Raises:
        ConfigError: somebody does.
    """
    found = owner_of(run) if run.is_dir() else None
    if found is not None and not found[0].is_gone(Owner.this(), found[1]):
        raise _taken(run, *found)


@contextlib.contextmanager
def owning(run: Path, *, take_over: bool = False) -> Iterator[None]:
    """Own a folder. A process that has lost it, because it was stopped for minutes, ends at once without writing.

    Args:
        take_over: whoever owns it.

    Raises:
        ConfigError: another training does.
        EnvironmentProblem: the folder cannot be written.
    """
    mine, path, ended = Owner.this(), run / NAME, threading.Event()
    _take(path, mine, take_over=take_over)

    def beat() -> None:
        while not ended.wait(BEAT_S):
            if _is_ours(path, mine):
                with contextlib.suppress(OSError):
                    os.utime(path)
            elif not ended.wait(2) and not _is_ours(path, mine):
                found = owner_of(run)
                logger.error(
                    "%s is now trained by %s; this training ends, unsaved", run, found[0] if found else "others"
                )
                os._exit(1)  # saving would write over what the other has done

    thread = threading.Thread(target=beat, name="owner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _is_ours(path, mine):
            with contextlib.suppress(OSError):  # a disk that is read-only now: the error that ends this says so better
                path.unlink(missing_ok=True)


def _take(path: Path, mine: Owner, *, take_over: bool) -> None:
    aside = path.with_name(f"{NAME}.{mine.token}")
    try:
        with writing(path):
            aside.write_text(json.dumps(asdict(mine)))
            for _ in range(3):
                if _linked(aside, path):
                    return
                found = owner_of(path.parent)
                if found and not take_over and not found[0].is_gone(mine, found[1]):
                    raise _taken(path.parent, *found)
                if found:
                    logger.warning("%s was trained by %s, which %s; this training goes on there",
                                   path.parent, found[0], "is told to yield" if take_over else "is gone")  # fmt: skip
                _remove(path, found[0].token if found else None)
            raise ConfigError(f"{path.parent}: another training has just begun there", "See dino2 status.")
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _linked(aside: Path, path: Path) -> bool:
    """Give a file its name unless that is taken; an answer lost on the way over NFS shows in the count of links."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return aside.stat().st_nlink == 2
    except OSError:  # no links here, as on FAT and some FUSE file systems
        try:
            with path.open("x") as file:
                file.write(aside.read_text())
        except FileExistsError:
            return False
    return True


def _remove(path: Path, token: str | None) -> None:
    """Remove the file of a dead owner; should another have replaced it meanwhile, put that back."""
    old = path.with_name(f"{NAME}.{secrets.token_hex(8)}.old")
    with contextlib.suppress(FileNotFoundError):
        path.rename(old)
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads(old.read_text())["token"] != token:
                os.link(old, path)
        old.unlink(missing_ok=True)


def _taken(run: Path, owner: Owner, age: float) -> ConfigError:
    stop = f"scancel {owner.job}" if owner.job else f"kill {owner.pid} on {owner.host}"
    return ConfigError(
        f"{run} is being trained by {owner}, with a sign of life {max(0, age):.0f} s ago",
        f"Choose another --output-dir, or stop that one ({stop}), which saves. If it is surely gone: --take-over. "
        f"Without a sign of life for {STALE_S / 60:.0f} minutes it counts as gone.",
    )


def _is_ours(path: Path, mine: Owner) -> bool:
    try:
        return bool(json.loads(path.read_text())["token"] == mine.token)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError):
        return True  # the disk is away for a moment


def _server_time(folder: Path) -> float:
    """Now, by the clock that gives files their times."""
    probe = folder / f"{NAME}.{secrets.token_hex(8)}.now"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _machine(host: str) -> str:
    found = [host]
    with contextlib.suppress(OSError):
        found += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(found)


def _born(pid: int) -> str:
    """When a process began; nothing if it runs no more."""
    if platform.system() == "Linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "runs"


def refuse_jobs_of(run: Path) -> None:
    """Refuse another training for a folder for which a job waits or runs.

    Raises:
        ConfigError: there is one.
    """
    for job in reversed(read_jobs(run)):
        state = slurm_state(job["job_id"])
        if state is not None and state not in (*ENDED, "COMPLETING"):
            raise ConfigError(
                f"{run} has a job already: {job['job_id']} is {state.lower()}",
                f"It goes on by itself; dino2 status {run} shows it, scancel {job['job_id']} ends it.",
            )
