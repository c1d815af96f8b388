"""The faults of `chaos.py --slurm`: what befalls jobs, machines and daemons; the training is a job of two machines."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos_faults import damage, hang, hang_briefly, images_replaced, kill_loader, kill_process
from chaos_history import PATIENCE_S, Violation
from chaos_jobs import NODES, Job, SlurmHistory, slurm
from chaos_machine import alive, kill

# ---- What befalls jobs -----------------------------------------------------------------------------------------------


def advance_or_start(history: SlurmHistory) -> None:
    """Let it train, or submit it anew and let it begin: what comes then may find no handler of signals yet."""
    if history.rng.random() < 0.6:
        history.advance(1)
        return
    history.kill_all()
    history.start()
    history.wait_for(lambda: history.job.poll() is not None or history.job.state == "RUNNING", "a job that runs", 120)
    time.sleep(history.rng.random() * 8)


def kill_task(history: SlurmHistory) -> str:
    """A machine's task, with it the training processes there; Slurm ends the job, which must be started again."""
    kill(history.pick(history.launchers))
    return history.goes_on()


def requeue(history: SlurmHistory) -> str:
    advance_or_start(history)
    slurm("scontrol", "requeue", history.job.number)
    return history.goes_on()


def time_is_up(history: SlurmHistory) -> str:
    """What Slurm sends before the time limit, to the tasks, or to the script and all their processes, too."""
    advance_or_start(history)
    more = history.rng.choice(([], [], ["--batch"], ["--full"]))
    slurm("scancel", "--signal", "USR2", *more, history.job.number)
    return f"{' '.join(more) or 'tasks'}: {history.goes_on()}"


def preemption(history: SlurmHistory) -> str:
    """A job of more importance takes both machines for some seconds."""
    advance_or_start(history)
    words = ["srun", "--partition", "high", "--nodes", "2", "--exclusive", "sleep", str(history.rng.choice((0, 3)))]
    other = subprocess.run(words, capture_output=True, text=True, timeout=300)
    if other.returncode:
        raise Violation(f"the other job: {other.stderr}")
    return history.goes_on()


def cancelled(history: SlurmHistory) -> str:
    """For good: the next submission goes on."""
    time.sleep(history.rng.random() * 8)  # also while it starts
    history.job.terminate()
    outcome = history.ends({130, 0})
    history.start()
    return f"{outcome}, {history.goes_on()}"


def submitted_again(history: SlurmHistory) -> str:
    """The same words again, as a job or here, while the job trains: refused, and the first one goes on."""
    history.advance(1)
    more: tuple[str, ...] = history.rng.choice(((), ("--no-resume",)))
    if history.rng.random() < 0.3:
        said = subprocess.run(history.words(*more), capture_output=True, text=True, env=history.environment())
    else:
        said = history.refused_or_said(*more)
    refuse(history, said)
    return history.goes_on()


def submitted_while_queued(history: SlurmHistory) -> str:
    """The same words again while the job waits in the queue: after a requeue, or since it was submitted."""
    if history.rng.random() < 0.5:
        slurm("scontrol", "requeuehold", history.job.number)
        history.wait_for(lambda: history.job.poll() is None and "HOLD" in held(history), "a job that waits", 60)
    else:
        history.kill_all()
        history.start(2, "--slurm", "hold=true")
    refuse(history, history.refused_or_said())
    slurm("scontrol", "release", history.job.number)
    return history.goes_on()


def held(history: SlurmHistory) -> str:
    shown = slurm("scontrol", "show", "job", history.job.number, "--oneliner").stdout
    found = re.search(r"JobState=(\w+) Reason=(\w+)", shown)
    return f"{found[2].upper()} HOLD" if found and found[1] == "PENDING" and "eld" in found[2] else ""


def refuse(history: SlurmHistory, said: "subprocess.CompletedProcess[str]") -> None:
    refused = said.returncode == 2 and re.search(r"is being trained by process|has a job already", said.stderr)
    if not history.ended() and (not refused or "Traceback" in said.stderr):
        raise Violation(f"the second submission ended with {said.returncode}: {said.stdout} {said.stderr[-2000:]}")


def submitted_twice_at_once(history: SlurmHistory) -> str:
    """Two submissions at the same moment: one trains, and the other is refused, if need be when its job begins."""
    history.kill_all()
    words = history.words("--nodes", "2", "--timeout-min", "60")
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=history.environment()) for _ in range(2)]  # fmt: skip
    jobs = []
    for process in both:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        if process.returncode == 0:
            facts = dict(line.split(maxsplit=1) for line in stdout.splitlines())
            jobs.append(Job(facts["job"], Path(facts["log"])))
        elif process.returncode != 2 or "has a job already" not in stderr:
            raise Violation(f"one of two submissions ended with {process.returncode}: {stderr[-2000:]}")
    if not jobs:
        raise Violation("neither of two submissions was taken")
    history.life = jobs[0]
    if len(jobs) == 2:
        history.wait_for(lambda: any(job.poll() is not None for job in jobs), "one of two jobs to be refused")
        refused = next(job for job in jobs if job.poll() is not None)
        said = refused.log.read_text(errors="replace")
        if refused.returncode != 2 or "error: " not in said or "Traceback" in said:
            raise Violation(f"one of two jobs ended with {refused.returncode}: {said[-2000:]}")
        history.life = next(job for job in jobs if job is not refused)
    history.logs.append(history.job.log)
    return f"{len(jobs)} jobs, {history.goes_on()}"


# ---- What befalls machines and daemons -------------------------------------------------------------------------------


def kill_node_daemon(history: SlurmHistory) -> str:
    """slurmd of a machine, which is started again after a while: the job's processes live on."""
    name = f"slurmd-{history.rng.choice(NODES)}"
    with away(history, name):
        time.sleep(history.rng.uniform(1, 15))
    return f"{name}: {history.goes_on()}"


def kill_controller(history: SlurmHistory) -> str:
    """slurmctld, likewise."""
    with away(history, "slurmctld"):
        time.sleep(history.rng.uniform(1, 10))
    return history.goes_on()


@contextmanager
def away(history: SlurmHistory, name: str) -> Iterator[None]:
    kill(pid := history.daemon(name))
    history.wait_for(lambda: not alive(pid), f"the end of {name}", 20)
    try:
        yield
    finally:
        history.start_daemon(name)


def machine_crashes(history: SlurmHistory) -> str:
    """All of the job on a machine, and its slurmd, as where a machine starts again: Slurm starts the job again."""
    history.advance(1)
    node = history.rng.choice(NODES)
    with away(history, f"slurmd-{node}"):
        for pid in history.of_machine(node):
            kill(pid)
        time.sleep(history.rng.uniform(1, 10))
    slurm("scontrol", "update", f"nodename={node}", "state=resume")
    return f"{node}: {history.goes_on()}"


def machine_down(history: SlurmHistory) -> str:
    """An administrator declares a machine dead, and alive again: Slurm ends the job there, and starts it again."""
    history.advance(1)
    node = history.rng.choice(NODES)
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
    time.sleep(history.rng.uniform(0, 8))
    slurm("scontrol", "update", f"nodename={node}", "state=resume")
    return f"{node}: {history.goes_on()}"


def drained(history: SlurmHistory) -> str:
    """A machine that takes no more jobs: this one goes on, or waits, when it is queued again, until it is back."""
    history.advance(1)
    node = history.rng.choice(NODES)
    slurm("scontrol", "update", f"nodename={node}", "state=drain", "reason=chaos")
    queued = history.rng.random() < 0.5
    if queued:
        slurm("scontrol", "requeue", history.job.number)
        time.sleep(history.rng.uniform(3, 10))
        if history.ended():
            history.ends({0})
    else:
        history.goes_on()
    slurm("scontrol", "update", f"nodename={node}", "state=resume")
    return f"{node}{', queued' if queued else ''}: {history.goes_on()}"


SLURM_FAULTS: dict[str, Callable[[SlurmHistory], str]] = {
    each.__name__: each
    for each in (kill_loader, kill_process, kill_task, requeue, time_is_up, preemption, cancelled, submitted_again,
                 submitted_while_queued, submitted_twice_at_once, kill_node_daemon, kill_controller, machine_crashes,
                 machine_down, drained, hang_briefly, hang, damage, images_replaced)
}  # fmt: skip
