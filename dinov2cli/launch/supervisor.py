"""Several processes of one command, under torchrun's elastic agent: started, told of signals, restarted, ended.

The agent does the work: rendezvous, ranks, starting and watching. Added to it is what a run of days needs. A signal is
handed on to the workers once, and they get all the time they want to save. A worker that dies takes the others with
it at once, and all start again from the last checkpoint, as often as that brings the run forward. What ended the run
is known and said once.
"""

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from dinov2cli.console import Interrupted, logger
from dinov2cli.errors import Dino2Error, EnvironmentProblem, TrainingFailure
from dinov2cli.launch.environment import NOTES_FOLDER, START, SUPERVISOR_PID
from dinov2cli.launch.notes import Note, cause, read_notes, time_of_mark, write_note
from dinov2cli.launch.restarts import Restart, enough, newest_checkpoint, read_restarts, record_restart

LAST_WORDS = 3.0
"""Seconds that the other workers get to leave their notes after one has failed, before they are killed."""
PATIENCE = 30.0
"""Seconds that the other workers get to end after one has reported an error."""
JOINING = 120.0
"""Seconds from when all workers of a machine are ready to join the others until they have joined, times the machines.

Joining takes a second, but a lost connection is waited for for hours.
"""


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


def supervise(group: Group, rendezvous: "RendezvousHandler | None" = None, address: str = "localhost") -> None:
    """Run the group to its end. Returns when all processes have finished what they had to do.

    Args:
        group: the processes.
        rendezvous: where the supervisors of several machines meet; alone, this one meets itself.
        address: this machine's name, as others know it.

    Raises:
        Dino2Error: the workers ended with this error of the user's, or failed too often (TrainingFailure).
        Interrupted: a signal ended them, after they had saved.
    """
    quieten()
    os.environ[SUPERVISOR_PID] = str(os.getpid())
    # Otherwise torch keeps one store for all starts, without a prefix for each: a process that is quick to start again
    # finds the addresses of the dead there, and waits for them or gives up.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    spec = WorkerSpec(
        role="dino2",
        local_world_size=group.workers,
        entrypoint=sys.executable,
        # The agent fills in `${local_rank}` and the like; a dollar sign of the user's is doubled for it.
        args=tuple(word.replace("$", "$$") for word in group.command),
        rdzv_handler=rendezvous or make_rendezvous("localhost:0", group, address, is_host=True)[0],
        max_restarts=1_000_000,  # the supervisor decides
        monitor_interval=0.1 if group.nodes == 1 else 0.5,
        local_addr=address,
    )
    supervisor = Supervisor(spec, group)
    try:
        with supervisor.signals_handed_on():
            supervisor.run()
    except RendezvousError as error:
        if supervisor.signals:
            raise Interrupted(supervisor.signals[0]) from error
        raise EnvironmentProblem(
            f"the processes of {group.nodes} machines did not find each other: {error}",
            "See whether the machines reach each other by name and port, and whether one of them has failed.",
        ) from error
    finally:
        spec.rdzv_handler.shutdown()
    supervisor.raise_ending()


def make_rendezvous(endpoint: str, group: Group, address: str, *, is_host: bool) -> tuple[RendezvousHandler, int]:
    """A c10d rendezvous at `host:port` (port 0: a free one, if this is its host); also returns the port."""
    parameters = RendezvousParameters(
        "c10d", endpoint, group.session, group.nodes, group.nodes, local_addr=address, is_host=is_host, join_timeout=900
    )
    backend, store = create_backend(parameters)
    port = store.port if isinstance(store, TCPStore) else 0
    return create_handler(store, backend, parameters), port


def quieten() -> None:
    """Keep the agent's and C++ layer's remarks to themselves: what matters is said here, once."""
    agent = logging.getLogger("torch.distributed.elastic")
    if "LOGLEVEL" not in os.environ:  # torch's own switch for seeing them
        agent.addHandler(logging.NullHandler())
        agent.propagate = False
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


class Supervisor(LocalElasticAgent):
    """torch's agent of one machine, which also decides when to go on and remembers how it ended."""

    def __init__(self, spec: WorkerSpec, group: Group) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=os.devnull))
        self.group = group
        self.signals: list[int] = []
        self.round = -1
        self.ended = False  # whatever the workers' exit codes say
        self.given_up = False
        self.looked = 0.0  # when the notes were last read

    @property
    def notes(self) -> Path:
        """Folder of the notes since the last start."""
        return self.group.notes / f"start_{self.round}"

    @property
    def stopping(self) -> Path:
        """A file that is there once a signal has been seen on any machine: what fails after that is not restarted."""
        return self.group.notes / "stopping"

    @contextmanager
    def signals_handed_on(self) -> Iterator[None]:
        """Hand each signal on to the workers, once. A second Ctrl-C kills them."""

        def hand_on(number: int, frame: FrameType | None) -> None:
            if number in self.signals:
                if number == signal.SIGINT:
                    self.kill_workers()
                return
            self.signals.append(number)
            self.stopping.touch()
            for pid in self.worker_pids():
                send(pid, as_worker_sees(number))

        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2]
        before = {number: signal.signal(number, hand_on) for number in numbers}
        # The agent would install handlers of its own, which give workers 30 s; it is told to take none.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # What the agent asks of its subclasses ---------------------------------------------------------------------------

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        # The machines' own order, not that of the rendezvous: so the first machine's log is that of rank 0.
        workers: list[Worker] = super()._assign_worker_ranks(store, self.group.node, group_world_size, spec)
        return workers

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # All machines have just met, so all notes are written: the first decides for all whether to go on.
        store: Any = worker_group.store
        if self.group.node == 0:
            store.set("dino2/goes-on", "yes" if self.goes_on() else "no")
        if store.get("dino2/goes-on") == b"no":
            self.ended = True
            return {}
        self.round += 1
        os.environ[NOTES_FOLDER], os.environ[START] = str(self.notes), str(self.round)
        pids: dict[int, Any] = super()._start_workers(worker_group)
        for number in self.signals:  # that came while they were being started
            for pid in pids.values():
                send(pid, as_worker_sees(number))
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        finished = RunResult(WorkerState.SUCCEEDED, {worker.global_rank: None for worker in worker_group.workers})
        if self.ended:
            return finished
        codes = self.exit_codes()
        failed = any(codes.values())  # neither running (None) nor done (0)
        if failed or self.waits_in_vain(worker_group):
            self.bury(worker_group)
            super()._monitor_workers(worker_group)
            why = cause(read_notes(self.notes))
            on_purpose = why is not None and why.kind in ("error", "interrupted")
            if on_purpose or self.group.run is None or self.stopping.exists():
                self.ended = True
                return finished
            return RunResult(WorkerState.FAILED)
        watched: RunResult = super()._monitor_workers(worker_group)
        return watched

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        # Whoever still runs here waits for a worker that is gone.
        self.kill_workers()
        super()._shutdown(signal.SIGKILL, timeout)

    # What is added ---------------------------------------------------------------------------------------------------

    def goes_on(self) -> bool:
        """Whether the workers are started (again); a new start is recorded and announced."""
        run, session = self.group.run, self.group.session
        if self.stopping.exists():
            return False
        if self.round < 0:
            restart = self.group.first_start
        else:
            why = cause(read_notes(self.notes)) or Note(-1, "death", "a machine left", signal=signal.SIGKILL)
            assert run is not None, "without a run there is no restart"
            kind: Literal["crash", "death"] = "death" if why.kind == "death" and why.signal else "crash"
            restart = Restart(kind, why.message, why.rank, newest_checkpoint(run), session)
        if restart is None or run is None:
            return True
        if restart.kind != "requeue" and enough(read_restarts(run), session, restart.iteration):
            self.given_up = True
            return False
        record_restart(run, restart)
        who = f"process {restart.rank}: " if restart.rank >= 0 else ""
        logger.warning("%s%s; all processes start again from iteration %d", who, restart.reason, restart.iteration)
        return True

    def waits_in_vain(self, worker_group: WorkerGroup) -> bool:
        """Whether workers wait for ever: for one that has reported an error, or to join the others."""
        now = time.time()
        if now - self.looked < 5:
            return False
        self.looked = now
        ranks = [worker.global_rank for worker in worker_group.workers]
        ready = [time_of_mark(self.notes, rank, "joining") for rank in ranks]
        times = [moment for moment in ready if moment is not None]
        if len(times) == len(ranks) and now - max(times) > JOINING * min(self.group.nodes, 5):
            late = [rank for rank in ranks if time_of_mark(self.notes, rank, "joined") is None]
            for rank in late:
                write_note(self.notes, Note(rank, "death", "did not get a connection to the others", time=now))
            if late:
                return True
        errors = [note for note in read_notes(self.notes) if note.kind == "error"]
        return any(now - note.time > PATIENCE for note in errors)

    def bury(self, worker_group: WorkerGroup) -> None:
        """End all workers of this machine after one has failed, and write notes for those who could not."""
        until = time.monotonic() + LAST_WORDS
        while None in (codes := self.exit_codes()).values() and time.monotonic() < until:
            time.sleep(0.05)
        self.kill_workers()
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        known = {note.rank for note in read_notes(self.notes)}
        for local, code in codes.items():
            if code and ranks[local] not in known:
                number = -code if code < 0 else 0
                how = f"was killed ({signal.Signals(number).name})" if number else f"ended with exit code {code}"
                if code == 1 and (stacks := self.fresh_stacks(ranks[local])):
                    how = f"hung; what it was doing is in {stacks}"
                write_note(self.notes, Note(ranks[local], "death", how, signal=number, time=time.time()))

    def fresh_stacks(self, rank: int) -> Path | None:
        """The stacks that a worker has written in the last minute, as it does when it hangs (`train.hang_timeout`)."""
        path = self.group.run / "logs" / "stacks" / f"rank_{rank:05d}.txt" if self.group.run else None
        return path if path and path.exists() and time.time() - path.stat().st_mtime < 60 else None

    def raise_ending(self) -> None:
        """Say how the workers ended, if not by finishing.

        Raises:
            Dino2Error, Interrupted: as `supervise`.
        """
        notes = read_notes(self.notes)
        why = cause(notes)
        if why is not None and why.kind == "error":
            error = Dino2Error(why.message, why.hint)
            error.exit_code = why.exit_code
            raise error
        interrupted = [note.signal for note in notes if note.kind == "interrupted"]
        if interrupted or (self.signals and (self.ended or why is not None)):
            if why is not None and why.kind != "interrupted":
                logger.warning("process %d %s while stopping; the last checkpoint stands", why.rank, why.message)
            asked = [*interrupted, *self.signals]
            raise Interrupted(signal.SIGUSR2 if signal.SIGUSR2 in asked else asked[0])
        if why is not None and self.ended:
            raise_failure(why, self.given_up)

    def exit_codes(self) -> dict[int, int | None]:
        """Exit code of each worker by local rank, None while it runs."""
        context = self._pcontext
        if not isinstance(context, SubprocessContext):
            return {}
        return {local: handler.proc.poll() for local, handler in context.subprocess_handlers.items()}

    def worker_pids(self) -> list[int]:
        """Process numbers of the workers that run."""
        context, codes = self._pcontext, self.exit_codes()
        return [pid for local, pid in context.pids().items() if codes.get(local) is None] if context else []

    def kill_workers(self) -> None:
        """Kill the workers with their loader processes, which are in the same process group."""
        if self._pcontext is not None:
            for pid in self._pcontext.pids().values():
                send(-pid, signal.SIGKILL)


def raise_failure(why: Note, given_up: bool) -> NoReturn:
    """Raise what made the processes fail, as the failing process's own error."""
    often = ", again and again without a new checkpoint in between" if given_up else ""
    hint = why.hint
    if why.signal:
        hint = "If the system ended it for want of memory (see dmesg), lower train.batch_size_per_gpu or num_workers."
    raise TrainingFailure(f"process {why.rank} failed{often}: {why.message}", hint)


def as_worker_sees(number: int) -> int:
    """The signal to hand on: Ctrl-C as SIGTERM, since a second SIGINT, which a scheduler may send, stops at once."""
    return signal.SIGTERM if number == signal.SIGINT else number


def send(pid: int, number: int) -> None:
    """Send a signal to a process, or to a process group where `pid` is negative, if it is still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
