"""A history of `chaos.py --slurm`: its training is a job of two machines."""

import os
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from chaos_history import PATIENCE_S, History, Violation
from chaos_machine import alive, children, comm, kill, leads, parent, variables

NODES = ("n1", "n2")
FINAL = {"COMPLETED": 0, "CANCELLED": 130, "FAILED": 1, "TIMEOUT": 1, "NODE_FAIL": 1, "OUT_OF_MEMORY": 1}
LOOK_S = 0.5  # between two questions to Slurm


class Job:
    """A submitted training, dealt with like a process: `returncode` is that of its command, 130 when cancelled."""

    def __init__(self, number: str, log: Path) -> None:
        self.number, self.log, self.returncode = number, log, None
        self.state, self.asked = "PENDING", 0.0

    def poll(self) -> int | None:
        if self.returncode is None and time.monotonic() - self.asked > LOOK_S:
            shown = slurm("scontrol", "show", "job", self.number, "--oneliner").stdout  # nothing while Slurm is down
            self.asked = time.monotonic()
            if found := re.search(r"JobState=(\w+)", shown):
                self.state = found[1]
            if self.state in FINAL and (code := re.search(r"ExitCode=(\d+):", shown)):
                self.returncode = int(code[1]) or FINAL[self.state]
                if self.state == "CANCELLED":
                    self.returncode = FINAL[self.state]
        return self.returncode

    def wait(self, seconds: float = 120) -> int:
        until = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise Violation(f"job {self.number} is {self.state} for {seconds} s")
            time.sleep(0.1)
        return code

    def terminate(self) -> None:
        slurm("scancel", self.number)


class SlurmHistory(History):
    """A history whose training is submitted to the cluster of two machines that `tests/slurm/cluster_up.sh` starts."""

    life: Job | None  # type: ignore[assignment]

    def __init__(self, place: Path, name: str, whole: Path, cluster: Path) -> None:
        super().__init__(place, name, whole)
        self.cluster, self.own_disk_wanted, self.own_clock_wanted = cluster, False, False
        os.environ["SLURM_CONF"] = f"{cluster}/etc/slurm.conf"

    def __exit__(self, *error: object) -> None:
        if self.life is not None:
            self.life.terminate()
            with suppress(Violation):
                self.life.wait()
            self.life = None
        for node in NODES:
            self.make_well(node)
        # A controller that was killed may have forgotten that a job has ended.
        slurm("scancel", *(path.name.partition("_")[0] for path in self.run.glob("slurm/*/*_submission.sh")))
        super().__exit__(*error)

    # ---- Starting and watching -------------------------------------------------------------------------------------

    @property
    def job(self) -> Job:
        assert self.life is not None
        return self.life

    def submit(self, *more: str) -> Job:
        said = self.refused_or_said(*more)
        if said.returncode:
            raise Violation(f"the job was not submitted, exit code {said.returncode}: {said.stderr[-2000:]}")
        facts = dict(line.split(maxsplit=1) for line in said.stdout.splitlines())
        return Job(facts["job"], Path(facts["log"]))

    def refused_or_said(self, *more: str) -> "subprocess.CompletedProcess[str]":
        words = self.words("--nodes", "2", "--timeout-min", "60", *more)
        return subprocess.run(words, capture_output=True, text=True, env=self.environment(), timeout=PATIENCE_S)

    def start(self, processes: int = 2, *more: str) -> None:
        assert self.life is None
        self.life = self.submit(*more)
        self.logs.append(self.life.log)

    def said(self) -> str:
        """What the present job has said so far, on all its machines."""
        if not self.logs:
            return ""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.logs[-1].parent.glob("*_log.out")))

    def left_cleanly(self, code: int, text: str) -> bool:
        return code == 0  # a job that is cancelled has its seconds, which may not do

    def kill_all(self) -> None:
        """As a loss of power on all machines, after which the job is not there any more."""
        if self.life is not None:
            for pid in self.processes():
                kill(pid)
            self.life.terminate()
            self.life.wait()
            self.life = None
        self.check_down(left_cleanly=False)

    # ---- Processes and machines ------------------------------------------------------------------------------------

    def trainers(self) -> list[int]:
        """The training processes of both machines; each leads its process group."""
        return [pid for pid in self.processes() if b"RANK" in variables(pid) and leads(pid)]

    def loaders(self) -> list[int]:
        return [loader for trainer in self.trainers() for loader in children(trainer)]

    def launchers(self) -> list[int]:
        """The tasks of both machines, each of which has started training processes."""
        return sorted({parent(pid) for pid in self.trainers()} - {0, 1})

    def daemon(self, name: str) -> int:
        return int((self.cluster / "run" / f"{name}.pid").read_text())

    def start_daemon(self, name: str) -> None:
        node = name.partition("-")[2]
        words = ["bash", f"{self.cluster}/slurmd.sh", node] if node else ["slurmctld"]
        subprocess.run(words, env={**os.environ, "CLUSTER_STATE": str(self.cluster)}, check=True, timeout=60,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

    def make_well(self, node: str) -> None:
        if not alive(self.daemon(f"slurmd-{node}")):
            self.start_daemon(f"slurmd-{node}")
        if not alive(self.daemon("slurmctld")):
            self.start_daemon("slurmctld")
        slurm("scontrol", "update", f"nodename={node}", "state=resume")

    def of_machine(self, node: str) -> list[int]:
        """All of the job on a machine, with Slurm's own processes for it."""
        mine = [pid for pid in self.processes() if variables(pid).get(b"SLURMD_NODENAME") == node.encode()]
        return [*mine, *{parent(pid) for pid in mine if comm(parent(pid)) == "slurmstepd"}]


def slurm(*words: str) -> "subprocess.CompletedProcess[str]":
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(words, capture_output=True, text=True, timeout=30)
    return subprocess.CompletedProcess(words, 1, "", "no answer")
