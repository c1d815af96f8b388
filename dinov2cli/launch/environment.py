"""What a process can tell of how it was started, from its environment variables alone."""

import os

NOTES_FOLDER = "DINO2_NOTES"  # the folder in which a supervised worker leaves a note of how it ended (`launch.notes`)
SUPERVISOR_PID = "DINO2_SUPERVISOR"  # process number of the supervisor, with which its workers end
# One word for each command typed, so that its workers set an earlier run aside once, not at every restart.
RUN_TOKEN = "DINO2_RUN_TOKEN"
SLURM_OPTIONS = "DINO2_SLURM_OPTIONS"  # of the job that this process belongs to, for jobs that it submits itself


def is_worker() -> bool:
    """Whether a launcher (torchrun, `srun` with several tasks, or dino2 itself) started this process as one of several.

    `SLURM_STEP_NUM_TASKS` is set by `srun` alone: inside `salloc` or a batch script, `dino2 train` may still launch.
    """
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def worker_rank() -> int:
    """This process's index among all that were started together, 0 where it is alone."""
    by_srun = os.environ.get("SLURM_PROCID", "0") if is_worker() else "0"
    return int(os.environ.get("RANK", by_srun))


def is_supervised() -> bool:
    """Whether a supervisor (`launch.supervisor`) waits for this process's note."""
    return NOTES_FOLDER in os.environ and "RANK" in os.environ
