"""What Slurm has here, what it can be asked for, and what is wrong with what somebody asks of it."""

import re
import shutil
import subprocess
from typing import Any, NamedTuple

from dinov2cli.console import counted
from dinov2cli.errors import ConfigError, EnvironmentProblem, Problems, did_you_mean
from dinov2cli.requests.launch import Slurm
from dinov2cli.site import read_site, shown, user_file

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
    "error input ntasks ntasks-per-gpu ntasks-per-node open-mode output parsable test-only wait wrap".split()  # noqa: SIM905
)
SUBMITIT = frozenset({"signal_delay_s", "num_gpus"})


class Partition(NamedTuple):
    """A part of the cluster: how many machines belong to it, and whether jobs go there that name none."""

    name: str
    nodes: int
    is_default: bool


def check(typed: Slurm, *, submits: bool) -> None:
    """Say all that is wrong with a job's options, the site's among them, as far as can be told without submitting.

    Args:
        submits: a job is really to be submitted, so that there must be a Slurm.

    Raises:
        Dino2Error: a parameter or an amount of memory that sbatch does not take, and as `on_this_cluster`.
    """
    wrong = Problems()
    with wrong.noted():
        if submits:
            need_slurm()
    for word in with_site(typed).parameters:
        with wrong.noted():
            split_parameter(word)
    with wrong.noted():
        option, amount = _said(typed, "mem")
        if amount and not re.fullmatch(r"\d+[KMGT]?B?", amount, re.IGNORECASE):
            raise ConfigError(f"{option} {amount}: give memory as a number with its unit, such as 500G")
    with wrong.noted():
        on_this_cluster(typed)
    wrong.tell()


def with_site(typed: Slurm) -> Slurm:
    """What is typed, else what the site's file says; `--slurm KEY=VALUE` of both, the file's first."""
    site = read_site().settings.slurm
    missing = {name: getattr(site, name) for name in Slurm.model_fields if getattr(typed, name) in (None, ())}
    return typed.model_copy(update={**missing, "parameters": (*site.parameters, *typed.parameters)})


def on_this_cluster(typed: Slurm) -> Slurm:
    """`with_site`, with no more machines than the partition has, where the site's file allows that.

    Raises:
        ConfigError: there is no such partition, or it has fewer machines than asked for.
    """
    slurm, there = with_site(typed), {each.name: each for each in partitions()}
    option, given = _said(typed, "partition")
    names = given.split(",") if given else [each.name for each in there.values() if each.is_default]
    if there and (unknown := [name for name in names if name not in there]):
        guess = did_you_mean(unknown[0], there)
        raise ConfigError(f"{option} {given}: Slurm has no partition {unknown[0]}{guess}",
                          f"There are: {', '.join(there)}")  # fmt: skip
    largest = max((there[name].nodes for name in names if there), default=None)
    if largest is None or slurm.nodes is None or slurm.nodes <= largest:
        return slurm
    if read_site().settings.slurm.fewer_nodes:
        return slurm.model_copy(update={"nodes": largest})
    raise ConfigError(
        f"--nodes {slurm.nodes}: partition {' and '.join(names)} has {counted(largest, 'machine')}",
        f"Type --nodes {largest}; or with `fewer_nodes: true` below `slurm:` in {shown(user_file())} such commands "
        "take as many machines as there are.",
    )


def origins(typed: Slurm) -> list[tuple[str, str, str]]:
    """(option, value, where it comes from) of a job's options that have a value."""
    site, full = read_site(), with_site(typed)
    rows = []
    for name in Slurm.model_fields:
        value, file = getattr(full, name), site.sources.get(f"slurm.{name}")
        if value not in (None, ()):
            text = "; ".join(value) if isinstance(value, tuple) else str(value)
            said = [*(["typed"] if getattr(typed, name) not in (None, ()) else []), *([shown(file)] if file else [])]
            rows.append((name, text, " and ".join(said if name == "parameters" else said[:1])))
    return rows


def _said(typed: Slurm, name: str) -> tuple[str, str | None]:
    """How an option is said, and its value: `--slurm KEY=VALUE` counts more than it, what is typed more than a file."""
    site = read_site()
    defaults = site.settings.slurm
    said = [(f"slurm.{name} in {shown(site.sources.get(f'slurm.{name}', ''))}", getattr(defaults, name))]
    said.append((f"--{name}", getattr(typed, name)))
    for where, words in (("slurm.parameters", defaults.parameters), ("--slurm", typed.parameters)):
        said += [(f"{where} {name}", word.partition("=")[2]) for word in words if word.partition("=")[0] == name]
    return next((each for each in reversed(said) if each[1]), said[0])


def partitions() -> list[Partition]:
    """The cluster's partitions as `sinfo` tells; none where it is not there or does not answer."""
    if shutil.which("sinfo") is None:
        return []
    try:
        words = ["sinfo", "-h", "-o", "%P|%D"]
        told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found: dict[str, Partition] = {}
    for line in told.splitlines():  # of a partition as many as there are states of machines
        name, nodes = line.strip().split("|")
        before = found.get(name, Partition(name.rstrip("*"), 0, name.endswith("*")))
        found[name] = before._replace(nodes=before.nodes + int(nodes))
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
        raise ConfigError(
            f"--slurm {word}: sbatch has no parameter {name}{did_you_mean(name, SBATCH)}",
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
