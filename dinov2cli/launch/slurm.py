"""Submitting a command as a Slurm job, through submitit. Imports no torch: a login node needs none."""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dinov2cli.cluster import need_slurm, on_this_cluster, split_parameter, with_site
from dinov2cli.console import logger
from dinov2cli.errors import ConfigError, EnvironmentProblem
from dinov2cli.files import write_text
from dinov2cli.launch.environment import NOTES_FOLDER, RUN_TOKEN, SLURM_OPTIONS, SUPERVISOR_PID
from dinov2cli.launch.job import NodeTask
from dinov2cli.launch.local import Elsewhere, launch_here
from dinov2cli.requests.base import Request, words_of
from dinov2cli.requests.eval import EvalRequest
from dinov2cli.requests.launch import Slurm
from dinov2cli.site import read_site, shown

if TYPE_CHECKING:
    from submitit import SlurmExecutor

CPUS_PER_GPU = 8
SAVING_S = 120  # before the time limit, when Slurm tells the job to save; `--slurm signal_delay_s=...` changes it
WITHOUT_LIMIT = 1_000_000  # requeues that submitit allows: a run of weeks needs many, and each goes on where it was


class Wanted(NamedTuple):
    """What a job is to have."""

    slurm: Slurm
    gpus: int  # on each machine; with `cpu` as many processes, and no GPUs
    cpu: bool


def wanted_for(typed: Slurm, gpus: int | None, *, cpu: bool, usual: int) -> Wanted:
    """What a job is to have, with what the site's file says where nothing is typed.

    Args:
        gpus: GPUs of each machine as typed; else, where the site has GPUs, `usual`.

    Raises:
        ConfigError: as `on_this_cluster`.
    """
    slurm, site = on_this_cluster(typed), read_site()
    if slurm.nodes != typed.nodes:
        file = shown(site.sources["slurm.fewer_nodes"])
        logger.warning("--nodes %d becomes --nodes %d, all there are (slurm.fewer_nodes in %s)",
                       typed.nodes, slurm.nodes, file)  # fmt: skip
    cpu = cpu or (gpus is None and site.settings.slurm.gpus == 0)
    return Wanted(slurm, gpus or (1 if cpu else usual), cpu)


@dataclass(frozen=True)
class Submitted:
    """A job in the queue.

    Attributes:
        job_id: Slurm's number.
        folder: its script, its logs (`<job>_<node>_log.out`) and submitit's files.
        run: the run folder, for a training.
    """

    job_id: str
    folder: Path
    run: Path | None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.job_id}_0_log.out"

    def as_dict(self) -> dict[str, str]:
        return {"job_id": self.job_id, "log": str(self.log)}

    def __str__(self) -> str:
        """Where the job is, how to watch it and how to stop it."""
        watch = [f"watch    dino2 status {self.run}"] if self.run is not None else []
        return "\n".join([f"job      {self.job_id}", f"log      {self.log}", *watch, f"stop     scancel {self.job_id}"])


def submit(request: Request, wanted: Wanted, *, folder: Path, name: str, run: Path | None = None) -> Submitted:
    """Submit a request as a job.

    Args:
        request: what each process of the job does.
        wanted: what to ask of Slurm.
        folder: where a new folder for this job is made.
        name: of the job, in `squeue`.
        run: the run folder, if the request may be restarted from its checkpoints.

    Raises:
        EnvironmentProblem: there is no Slurm here, or it refuses the job.
        ConfigError: a parameter is none that sbatch takes.
    """
    need_slurm()
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    own = new_folder(folder)
    executor = make_executor(wanted, own, name)
    task = NodeTask(words_of(request), wanted.gpus, wanted.slurm, own, run.absolute() if run else None)
    try:
        with outside_of_any_job():
            job = executor.submit(task)
    except (FailedJobError, FailedSubmissionError) as error:
        shutil.rmtree(own, ignore_errors=True)
        hint = "sinfo shows the partitions and their limits; --dry-run shows the script."
        raise EnvironmentProblem(f"Slurm did not take the job: {last_line(str(error))}", hint) from error
    write_record(own, job.job_id, request, wanted)
    return Submitted(job.job_id, own, run)


def launch_evaluation(request: EvalRequest) -> Elsewhere | None:
    """Start an evaluation where the request says: as a job, in several processes here, or (None) in this process.

    A job's folder is `slurm/` in the output folder, else in the run that the checkpoint belongs to, else here.

    Raises:
        Dino2Error: as the launchers.
    """
    if request.slurm.is_asked:
        checkpoint = Path(request.checkpoint).absolute()
        runs = (place for place in (checkpoint, *checkpoint.parents) if (place / "config.yaml").exists())
        folder = request.output_dir or next(runs, Path())
        wanted = wanted_for(request.slurm, request.gpus, cpu=request.device == "cpu", usual=1)
        request, name = request.model_copy(update={"device": "cpu"} if wanted.cpu else {}), request.protocol()
        if request.dry_run:
            return Elsewhere(script(wanted, folder=folder.absolute() / "slurm", name=f"dino2-{name}"))
        return Elsewhere(submit(request, wanted, folder=folder.absolute() / "slurm", name=f"dino2-{name}"))
    return launch_here(request)


def write_record(folder: Path, job_id: str, request: Request, wanted: Wanted) -> None:
    """Say in a job's folder what it is, for `dino2 status` (`launch.status.read_jobs`)."""
    content = request.model_dump(mode="json", exclude_unset=True)
    facts = {"job_id": job_id, "command": request.command.split(), "request": content, "time": time.time()}
    write_text(folder / "job.json", json.dumps({**facts, "nodes": wanted.slurm.nodes or 1}))


def slurm_of_this_job(*parameters: str) -> Slurm:
    """Options for a small job that this one submits: its own (partition, account, set-up, ...) without those of size.

    Args:
        parameters: further `KEY=VALUE`, which win over earlier ones and over the options of that name.
    """
    options = os.environ.get(SLURM_OPTIONS)
    own = Slurm.model_validate_json(options) if options else with_site(Slurm())
    changed = {"nodes": None, "cpus_per_task": None, "mem": None, "parameters": (*own.parameters, *parameters)}
    return own.model_copy(update=changed)


def script(wanted: Wanted, *, folder: Path, name: str) -> str:
    """The batch script that `submit` would hand to sbatch; nothing is written."""
    executor = make_executor(wanted, folder / "<time>", name)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def make_executor(wanted: Wanted, folder: Path, name: str) -> "SlurmExecutor":
    """submitit's executor for what is wanted, on machines without Slurm, too: for them it writes scripts."""
    from submitit.slurm.slurm import SlurmExecutor

    class Anywhere(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = Anywhere(folder, max_num_timeout=WITHOUT_LIMIT, python=DEAF + shlex.quote(sys.executable))
    parameters, further = sbatch_parameters(wanted, name), {"requeue": True}
    for key, value in map(split_parameter, wanted.slurm.parameters):
        if (ours := key.replace("-", "_")) in executor._valid_parameters():
            parameters[ours] = value
        else:
            further[key.replace("_", "-")] = value
    tasks = ["--kill-on-bad-exit=1"]  # one machine's failure would leave the others waiting
    if cpus := parameters.get("cpus_per_task"):
        tasks.append(f"--cpus-per-task={cpus}")  # newer versions of srun do not take it over from sbatch
    executor.update_parameters(
        **parameters,
        additional_parameters={key: value for key, value in further.items() if value is not None},
        srun_args=tasks,
        stderr_to_stdout=True,
        setup=[*wanted.slurm.setup, IGNORE_IN_SCRIPT],
        teardown=REQUEUE_IF_KILLED.format(folder=folder).splitlines(),
    )
    return executor


def sbatch_parameters(wanted: Wanted, name: str) -> dict[str, Any]:
    """What is wanted, under submitit's names; None for what Slurm decides."""
    slurm, minutes = wanted.slurm, wanted.slurm.timeout_min or 1440
    return {
        "job_name": name,
        "nodes": slurm.nodes or 1,
        "ntasks_per_node": 1,  # a supervisor, which starts a process for each GPU
        "gpus_per_node": None if wanted.cpu else wanted.gpus,
        "cpus_per_task": slurm.cpus_per_task or wanted.gpus * (1 if wanted.cpu else CPUS_PER_GPU),
        "mem": slurm.mem,
        "time": minutes,
        "signal_delay_s": min(SAVING_S, minutes * 60 // 3),
        **{key: getattr(slurm, key) for key in ("partition", "account", "qos", "constraint", "exclude", "comment")},
        "wckey": None,
    }


def new_folder(parent: Path) -> Path:
    """A fresh folder named by the time: submitit would take an old job's files for the new one's if ids repeat.

    It is made before sbatch is called, as Slurm does not make the folder of its log.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        folder = parent.absolute() / (f"{stamp}-{number}" if number else stamp)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{parent}: cannot be written to ({error.strerror})") from error
        return folder
    raise EnvironmentProblem(f"{parent}: no new folder could be made there")


@contextmanager
def outside_of_any_job() -> Iterator[None]:
    """Take away what this process's own job or launcher has put into the environment: sbatch would pass it on."""
    launched = {NOTES_FOLDER, SUPERVISOR_PID, RUN_TOKEN, SLURM_OPTIONS, "RANK", "WORLD_SIZE", "LOCAL_RANK",
                "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE",
                "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}  # fmt: skip
    named = {key for key in os.environ if key.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_"))} - {"SLURM_CONF"}
    taken = {key: os.environ[key] for key in os.environ.keys() & (named | launched)}
    if not any(key.startswith(("SLURM_", "RANK")) for key in taken):
        taken.pop("OMP_NUM_THREADS", None)  # the user's own
    for key in taken:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(taken)


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return [*lines, *errors][-1] if lines else "no reason given"


# `scancel --batch` and `--full` signal the script itself, which would end it, and the job with it, unsaved.
IGNORE_IN_SCRIPT = "trap : USR2"

# What Slurm sends before it takes machines away would end a task that is still importing, and the job with it, which
# would not be queued again: until there is a handler, nobody hears it. Slurm then ends and queues the job itself.
DEAF = """sh -c 'trap "" USR2; exec "$0" "$@"' """

# A task that was killed has no verdict on the run: the job goes on from the last checkpoint, in a new start. The
# supervisor of that start reads the file, and gives up where this leads nowhere.
REQUEUE_IF_KILLED = """\
status=$?
if [ $status -eq 137 ]; then
  touch '{folder}'/killed_"$SLURM_JOB_ID"_"${{SLURM_RESTART_COUNT:-0}}"
  scontrol requeue "$SLURM_JOB_ID" && sleep 300
fi
exit $status"""
