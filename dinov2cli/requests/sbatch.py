"""What Slurm can be asked for, and what is wrong with what somebody asks of it."""

import difflib
import re
import shutil
import subprocess
from typing import Any, NamedTuple

from dinov2cli.errors import ConfigError, EnvironmentProblem, Problems
from dinov2cli.requests.launch import Slurm

# What sbatch takes (its manual), what of it dino2 sets itself, and submitit's own names.
SBATCH = frozenset(
    """
account acctg-freq batch bb bbf begin chdir cluster-constraint clusters comment constraint container container-id
contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution
exclude exclusive export export-file extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node
gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs immediate job-name kill-on-invalid-dep licenses
mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile
nodelist nodes oom-kill-step overcommit oversubscribe partition power prefer priority profile propagate qos quiet reboot
requeue reservation resv-ports segment signal sockets-per-node spread-job stepmgr switches thread-spec threads-per-core
time time-min tmp tres-bind tres-per-task uid use-min-nodes verbose wait-all-nodes wckey""".split()  # noqa: SIM905
)
IN_HAND = frozenset(
    {
        "error",
        "input",
        "ntasks",
        "ntasks-per-gpu",
        "ntasks-per-node",
        "open-mode",
        "output",
        "parsable",
        "test-only",
        "wait",
        "wrap",
    }
)
SUBMITIT = frozenset({"signal_delay_s", "num_gpus"})


OUT_OF_SERVICE = ("down", "drain", "fail", "maint", "unk", "inval", "power")
"""How the states of machines begin that take no jobs."""


class Partition(NamedTuple):
    """A part of the cluster.

    Attributes:
        nodes: machines that belong to it.
        in_service: those of them that take jobs now.
        is_default: where jobs go that name none.
    """

    name: str
    nodes: int
    in_service: int
    is_default: bool


def check(slurm: Slurm, *, submits: bool) -> None:
    """Say all that is wrong with these options, as far as can be told without submitting.

    Args:
        submits: a job is really to be submitted, so that there must be a Slurm.

    Raises:
        Dino2Error: a parameter or an amount of memory that sbatch does not take, a partition that is not there.
    """
    wrong = Problems()
    with wrong.noted():
        if submits:
            need_slurm()
    given = {"mem": ("--mem", slurm.mem), "partition": ("--partition", slurm.partition)}
    for word in slurm.parameters:
        with wrong.noted():
            key, value = split_parameter(word)
            if key in given and isinstance(value, str):
                given[key] = (f"--slurm {key}", value)
    with wrong.noted():
        option, amount = given["mem"]
        if amount and not re.fullmatch(r"\d+[KMGT]?B?", amount, re.IGNORECASE):
            raise ConfigError(f"{option} {amount}: give memory as a number with its unit, such as 500G")
    with wrong.noted():
        option, partition = given["partition"]
        there = [each.name for each in partitions()]
        if partition and there and (unknown := [name for name in partition.split(",") if name not in there]):
            near = difflib.get_close_matches(unknown[0], there, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{option} {partition}: Slurm has no partition {unknown[0]}{guess}",
                              f"There are: {', '.join(there)}")  # fmt: skip
    wrong.tell()


def partitions() -> list[Partition]:
    """The cluster's partitions as `sinfo` tells; none where it is not there or does not answer."""
    if shutil.which("sinfo") is None:
        return []
    try:
        words = ["sinfo", "-h", "-o", "%P|%D|%T"]
        told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found: dict[str, Partition] = {}
    for line in told.splitlines():
        name, nodes, state = line.strip().split("|")
        before = found.get(name, Partition(name.rstrip("*"), 0, 0, name.endswith("*")))
        serving = 0 if state.startswith(OUT_OF_SERVICE) or state.endswith("*") else int(nodes)
        found[name] = before._replace(nodes=before.nodes + int(nodes), in_service=before.in_service + serving)
    return list(found.values())


def split_parameter(word: str) -> tuple[str, Any]:
    """`KEY=VALUE` as a pair; `true` makes it a flag, `false` takes it away.

    Raises:
        ConfigError: it is none, or sbatch has no such parameter, or dino2 has it in hand.
    """
    key, _, value = word.partition("=")
    key = key.strip("-")
    name = key.replace("_", "-")
    if name == "array":
        raise ConfigError(f"--slurm {word}: the jobs of an array would all write to one folder; submit one by one")
    if not key or not value:
        raise ConfigError(f"--slurm {word}: write KEY=VALUE, a parameter of sbatch, such as --slurm reservation=NAME")
    if name in IN_HAND:
        raise ConfigError(f"--slurm {word}: dino2 sets {name} itself")
    if name not in SBATCH and key not in SUBMITIT:
        near = difflib.get_close_matches(name, SBATCH, n=1)
        raise ConfigError(
            f"--slurm {word}: sbatch has no parameter {name}{f'; did you mean {near[0]}?' if near else ''}",
            "man sbatch lists them, and --help those that have options of their own.",
        )
    flags: dict[str, Any] = {"true": True, "false": None}
    return key, flags.get(value.lower(), value)


def need_slurm() -> None:
    """Raise EnvironmentProblem where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise EnvironmentProblem(
            "there is no Slurm here (sbatch is not found), so nothing can be submitted",
            "On this machine alone, leave out --nodes and the other Slurm options; --gpus N starts N processes here.",
        )
