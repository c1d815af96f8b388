"""What a Slurm job runs: on each machine one task, which supervises the processes of that machine."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2cli.errors import Dino2Error, EnvironmentProblem
from dinov2cli.files import write_text
from dinov2cli.launch.environment import RUN_TOKEN, SLURM_OPTIONS
from dinov2cli.launch.local import share_cores
from dinov2cli.launch.restarts import Restart, newest_checkpoint
from dinov2cli.requests.launch import Slurm

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission
    from torch.distributed import Store

MEETING_S = 900  # to wait for the first machine of the job
END_S = 900  # to wait for Slurm to end the job, after all is saved


@dataclass
class NodeTask:
    """The task of each machine; pickled by submitit at submission, called in the job.

    Attributes:
        words: what each process is called with.
        workers: processes on each machine.
        slurm: what was asked of Slurm, for jobs that this one submits.
        folder: the job's own, seen by all machines.
        run: the run folder, if the command may be restarted from its checkpoints.
    """

    words: list[str]
    workers: int
    slurm: Slurm
    folder: Path
    run: Path | None

    def __call__(self) -> None:
        """Run the machine's processes to their end, then leave the job to its fate: done, failed or in the queue."""
        from dinov2cli.console import Interrupted, err, set_up_logging

        set_up_logging()
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        try:
            self.supervise()
        except Interrupted as stop:
            if stop.signal == signal.SIGUSR2 and callable(requeue):
                requeue(signal.SIGUSR2, None)  # on the first machine, does not return
            # Slurm is about to end the job: to start it again (a preemption, scontrol requeue) or not (scancel), as it
            # has been told. A task that ends by itself now would make the job a failed one, which is not started again.
            time.sleep(END_S)
            raise SystemExit(130) from stop
        except Dino2Error as error:
            if int(os.environ["SLURM_NODEID"]) == 0:
                err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
            raise SystemExit(error.exit_code) from error

    def checkpoint(self, *arguments: Any, **more: Any) -> "DelayedSubmission":
        """What submitit submits when it requeues the job: the same; the run folder knows how far it is."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def supervise(self) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read at import; what matters is said here, once
        from dinov2cli.launch.supervisor import Group, supervise

        job, node = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_NODEID"])
        start = int(os.environ.get("SLURM_RESTART_COUNT", 0))  # how often Slurm has started this job before
        notes = self.folder / f"notes_{job}_{start}"
        notes.mkdir(parents=True, exist_ok=True)
        os.environ[RUN_TOKEN] = self.folder.name + job
        os.environ[SLURM_OPTIONS] = self.slurm.model_dump_json()
        share_cores(self.workers)
        command, nodes = ["-m", "dinov2cli", *self.words], int(os.environ["SLURM_JOB_NUM_NODES"])
        group = Group(command, self.workers, notes, self.run, job, nodes, node, self.requeued(job, start))
        address = os.environ.get("SLURMD_NODENAME", "localhost")
        supervise(group, self.meet(self.folder / f"rendezvous_{job}_{start}", node, address), address)

    def requeued(self, job: str, start: int) -> Restart | None:
        """Why this is not the job's first start, if so."""
        if start == 0:
            return None
        iteration = newest_checkpoint(self.run) if self.run else 0
        if (self.folder / f"killed_{job}_{start - 1}").exists():
            return Restart("death", "a machine's task was killed", -1, iteration, job)
        return Restart("requeue", f"job {job} was requeued", -1, iteration, job)

    def meet(self, place: Path, node: int, address: str) -> "Store":
        """The store of the job's machines: at the first one, which says its port in a file."""
        from torch.distributed import TCPStore

        if node == 0:
            store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
            write_text(place, f"{address}:{store.port}")
            return store
        until = time.monotonic() + MEETING_S
        while not place.exists():
            if time.monotonic() > until:
                raise EnvironmentProblem(
                    f"{address}: the job's first machine did not write {place} within {MEETING_S} s",
                    "Is the run folder on a file system that all machines share? The first machine's log tells more.",
                )
            time.sleep(0.5)
        host, _, port = place.read_text().rpartition(":")
        return TCPStore(host, int(port), is_master=False, wait_for_workers=False)
