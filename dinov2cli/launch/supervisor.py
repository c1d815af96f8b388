"""Several processes of one command: started, told of signals, restarted, ended.

Each machine has one supervisor; its workers are its children, with torchrun's variables. Supervisors of several
machines meet in a store that the first one keeps, before every start: it decides for all whether to go on. A worker
that dies takes the others with it, and all start again, as often as that brings the run forward.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

from torch.distributed import DistError, HashStore, Store, TCPStore

from dinov2cli.console import Interrupted, handling, logger
from dinov2cli.errors import Dino2Error, EnvironmentProblem, TrainingFailure
from dinov2cli.launch.environment import NOTES_FOLDER, SUPERVISOR_PID
from dinov2cli.launch.notes import Note, cause, is_marked, read_notes, write_note
from dinov2cli.launch.restarts import Restart, enough, newest_checkpoint, read_restarts, record_restart

# Seconds to wait
LAST_WORDS = 3.0  # for the notes of the other workers after one has failed, before they are killed
PATIENCE = 30.0  # for the workers to end after one has reported a failure
FINISHING = 900.0  # for a training's workers to end after the first that has
BEGINNING = 3600.0  # for a training's workers to be ready to join the others: slow disks, and weights to fetch
# To join, times the machines, once the workers of all are ready. It takes a second, but torch waits for a lost
# connection for hours.
JOINING = 120.0
LOOK = 5.0  # between two looks at the notes
MEETING = 900.0  # for the supervisors of the other machines
PARTING = 30.0  # for the other machines to leave the store at the end, and for a killed process

NO_MEMORY = "If the system ended it for want of memory (see dmesg), lower train.batch_size_per_gpu or num_workers."


@dataclass(frozen=True)
class Group:
    """The processes to run.

    Attributes:
        command: what each is: arguments of `python`.
        workers: how many on this machine.
        notes: folder for their notes, seen by all machines, empty at first.
        run: the run folder, whose checkpoints tell progress; None for a command that is not restarted.
        session: name for the command or job, the same on all machines.
        nodes: number of machines.
        node: index of this one.
        first_start: why the processes start now, where this is not the first time.
    """

    command: Sequence[str]
    workers: int
    notes: Path
    run: Path | None = None
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    nodes: int = 1
    node: int = 0
    first_start: Restart | None = None


def supervise(group: Group, store: Store | None = None, address: str = "localhost") -> None:
    """Run the group to its end. Returns when all processes have finished what they had to do.

    Args:
        group: the processes.
        store: where the supervisors of several machines meet.
        address: this machine's name, as others know it.

    Raises:
        Dino2Error: the workers ended with this error of the user's, or failed too often (TrainingFailure).
        Interrupted: a signal ended them, after they had saved.
    """
    supervisor = Supervisor(group, store or HashStore(), address)
    try:
        with supervisor.signals_handed_on():
            while where := supervisor.meet():
                supervisor.start(where)
                supervisor.watch()
    except (DistError, TimeoutError) as error:
        if supervisor.signals:
            raise Interrupted(supervisor.signals[0]) from error
        raise EnvironmentProblem(
            f"the processes of {group.nodes} machines did not find each other: {error}",
            "See whether the machines reach each other by name and port, and whether one of them has failed.",
        ) from error
    finally:
        supervisor.end_workers()
    supervisor.raise_ending()


class Supervisor:
    """Starts and watches the workers of one machine, and remembers how they ended."""

    def __init__(self, group: Group, store: Store, address: str) -> None:
        self.group, self.store, self.address = group, store, address
        # In the machines' own order: so the first machine's log is that of rank 0.
        self.ranks = range(group.node * group.workers, (group.node + 1) * group.workers)
        self.workers: list[subprocess.Popen[bytes]] = []
        self.joining: Store | None = None  # where the workers find each other; the first machine keeps it
        self.signals: list[int] = []
        self.round, self.notes = -1, group.notes  # the notes since the last start are in a folder of their own
        self.stopped = self.given_up = False  # the run ended otherwise than by finishing; as it came no further
        self.looked = 0.0  # when the notes were last read
        self.since: dict[str, float] = {}  # when what matters to them was seen first
        self.old_stacks: dict[int, int] = {}  # when those that were there before had been written

    @contextmanager
    def signals_handed_on(self) -> Iterator[None]:
        """Hand each signal on to the workers, once. A second Ctrl-C kills them."""

        def received(number: int, frame: FrameType | None) -> None:
            if number not in self.signals:
                self.signals.append(number)
                self.hand_on(number)
                self.store.set("stopping", "yes")
            elif number == signal.SIGINT:
                self.kill()

        with handling([signal.SIGINT, signal.SIGTERM, signal.SIGUSR2], received):
            yield

    def hand_on(self, number: int) -> None:
        """Ctrl-C arrives as SIGTERM, since a second SIGINT, which a scheduler may send, stops a worker at once."""
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    def keys(self, stage: str) -> list[str]:
        """What the machines write into the store when they have come to a stage of this start."""
        return [f"{stage} {self.round} {node}" for node in range(self.group.nodes)]

    def meet(self) -> str:
        """Wait for the other machines, at first and when their workers have ended.

        Returns:
            host:port at which the workers of the next start find each other; nothing if there is none.
        """
        here, left, decision = self.keys("here"), self.keys("left"), f"decision {self.round}"
        self.store.set(here[self.group.node], "yes")
        if self.group.node == 0:
            self.wait_for(here, MEETING)
            self.store.set(decision, self.decide())
        self.wait_for([decision], MEETING)
        what = self.store.get(decision).decode()
        if ":" in what:
            return what
        self.stopped, self.given_up = what != "done", what == "give up"
        with suppress(DistError, TimeoutError):  # all has been said
            self.store.set(left[self.group.node], "yes")
            if self.group.node == 0:
                self.wait_for(left, PARTING)
        return ""

    def wait_for(self, keys: list[str], seconds: float) -> None:
        """Wait, in small steps, in which signals are heard, for what others write; TimeoutError if they do not."""
        began = time.monotonic()
        while not self.store.check(keys):
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"no answer within {seconds:g} s")
            time.sleep(0.05)

    def decide(self) -> str:
        """Whether the workers are started (again): host:port, `done`, `stop` or `give up`; a restart is announced.

        All machines have just met, so that all notes are written.
        """
        run, session, restart = self.group.run, self.group.session, self.group.first_start
        if self.round >= 0 and not self.store.check([f"failed {self.round}"]):
            return "done"
        if self.store.check(["stopping"]):  # a signal has come to any machine: what fails after that stays so
            return "stop"
        if self.round >= 0:
            why = cause(read_notes(self.notes)) or Note(-1, "death", "a machine left", signal=signal.SIGKILL)
            if run is None or why.kind in ("error", "interrupted"):
                return "stop"
            kind: Literal["crash", "death"] = "death" if why.kind == "death" and why.signal else "crash"
            restart = Restart(kind, why.message, why.rank, newest_checkpoint(run), session)
        if restart is not None and run is not None:
            if restart.kind != "requeue" and enough(read_restarts(run), session, restart.iteration):
                return "give up"
            record_restart(run, restart)
            who = f"process {restart.rank}: " if restart.rank >= 0 else ""
            logger.warning("%s%s; all processes start again from iteration %d", who, restart.reason, restart.iteration)
        # A store of its own for each start: no process can find the addresses of the dead there.
        self.joining = TCPStore(self.address, 0, is_master=True, wait_for_workers=False)
        return f"{self.address}:{self.joining.port}"

    def start(self, where: str) -> None:
        """Start this machine's workers."""
        self.round += 1
        self.notes = self.group.notes / f"start_{self.round}"
        (host, _, port), count = where.rpartition(":"), self.group.workers
        common = {
            "MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": str(count * self.group.nodes),
            "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": str(self.group.node),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already: the workers open none
            NOTES_FOLDER: str(self.notes), SUPERVISOR_PID: str(os.getpid()),
        }  # fmt: skip
        self.old_stacks = {rank: self.stacks_written(rank) for rank in self.ranks}
        words, self.workers = [sys.executable, *self.group.command], []
        for local, rank in enumerate(self.ranks):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(local)}
            # Of what torch's C++ layer remarks, that which matters is said here, once.
            environment = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, **own}
            self.workers.append(subprocess.Popen(words, env=environment, start_new_session=True))
        self.since = {"start": time.monotonic()}
        for number in self.signals:  # that came while they were being started; SIGTERM twice does no harm
            self.hand_on(number)

    def watch(self) -> None:
        """Wait until the workers of all machines are done, or those of one have failed: then those here are ended."""
        ended, failed = self.keys("ended"), f"failed {self.round}"
        while not self.store.check(ended):
            codes = [worker.poll() for worker in self.workers]
            if any(codes) or self.waits_in_vain():  # neither running (None) nor done (0)
                self.store.set(failed, "yes")
            elif None not in codes:
                self.store.set(ended[self.group.node], "yes")
            if self.store.check([failed]):
                self.bury()
                return
            time.sleep(0.1 if self.group.nodes == 1 else 0.5)

    def waits_in_vain(self) -> bool:
        """Whether they wait for ever, for a worker of this machine that does not begin, or join the others, or end
        after it has reported a failure, or another has ended. A note says which."""
        if time.monotonic() - self.looked < LOOK:
            return False
        self.looked = time.monotonic()
        failures = [each.rank for each in read_notes(self.notes) if each.kind != "interrupted"]
        if any(self.lasts(f"failure of {rank}") > PATIENCE for rank in failures):
            return True
        trains, late, why = self.group.run is not None, self.without("joining"), ""
        if not late:
            self.store.set(self.keys("ready")[self.group.node], "yes")
        if not self.store.check(self.keys("ready")):
            if trains and self.lasts("start") > BEGINNING:
                why = f"did not begin within {BEGINNING / 60:.3g} minutes"
        elif self.lasts("all are ready") > JOINING * min(self.group.nodes, 5):
            late, why = self.without("joined"), "did not get a connection to the others"
        running = [rank for rank, worker in zip(self.ranks, self.workers, strict=True) if worker.poll() is None]
        one_ended = len(running) < len(self.workers) or any(self.store.check([key]) for key in self.keys("ended"))
        if trains and one_ended and self.lasts("one has ended") > FINISHING:
            late, why = running, f"did not end within {FINISHING / 60:.3g} minutes of the first"
        for rank in late if why else []:
            write_note(self.notes, Note(rank, "death", why))
        return bool(why and late)

    def lasts(self, what: str) -> float:
        """For how many seconds this has been so, by the looks at it since the start."""
        return time.monotonic() - self.since.setdefault(what, time.monotonic())

    def without(self, stage: Literal["joining", "joined"]) -> list[int]:
        """The ranks of this machine that have not come to a stage of their start."""
        return [rank for rank in self.ranks if not is_marked(self.notes, rank, stage)]

    def bury(self) -> None:
        """End all workers of this machine after one has failed, and write notes for those who could not."""
        until = time.monotonic() + LAST_WORDS
        while None in (codes := [worker.poll() for worker in self.workers]) and time.monotonic() < until:
            time.sleep(0.05)
        self.end_workers()
        known = {note.rank for note in read_notes(self.notes)}
        for rank, code in zip(self.ranks, codes, strict=True):
            if code and rank not in known:
                number = -code if code < 0 else 0
                how = f"was killed ({signal.Signals(number).name})" if number else f"ended with exit code {code}"
                if code == 1 and self.stacks_written(rank) != self.old_stacks[rank]:
                    how = f"hung; what it was doing is in {self.stacks(rank)}"
                write_note(self.notes, Note(rank, "death", how, signal=number))

    def stacks(self, rank: int) -> Path:
        """Where a worker writes what it is doing when it hangs (`train.hang_timeout`)."""
        return (self.group.run or Path()) / "logs" / "stacks" / f"rank_{rank:05d}.txt"

    def stacks_written(self, rank: int) -> int:
        """When it did so last, by the clock of the disk, which need not be that of this machine; 0: never."""
        with suppress(OSError):
            return self.stacks(rank).stat().st_mtime_ns if self.group.run else 0
        return 0

    def raise_ending(self) -> None:
        """Raise, as `supervise` does, how the workers ended, if not by finishing."""
        why = cause(notes := read_notes(self.notes))
        if why is not None and why.kind == "error":
            error = Dino2Error(why.message, why.hint)
            error.exit_code = why.exit_code
            raise error
        interrupted = [note.signal for note in notes if note.kind == "interrupted"]
        if interrupted or (self.signals and (self.stopped or why is not None)):
            if why is not None and why.kind != "interrupted":
                logger.warning("process %d %s while stopping; the last checkpoint stands", why.rank, why.message)
            asked = [*interrupted, *self.signals]
            raise Interrupted(signal.SIGUSR2 if signal.SIGUSR2 in asked else asked[0])
        if why is not None and self.stopped:
            often = ", again and again without a new checkpoint in between" if self.given_up else ""
            hint = NO_MEMORY if why.signal else why.hint
            raise TrainingFailure(f"process {why.rank} failed{often}: {why.message}", hint)

    def kill(self) -> None:
        """Kill the workers with their loader processes, which are in the same process group."""
        for worker in self.workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)

    def end_workers(self) -> None:
        """Kill the workers and wait until they are gone; one that a dead disk holds is left behind."""
        self.kill()
        for worker in self.workers:
            with suppress(subprocess.TimeoutExpired):
                worker.wait(PARTING)
