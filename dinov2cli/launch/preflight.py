"""Whether a run can succeed, found out before it starts: `dino2 doctor`, and the first seconds of every training.

A check looks at one thing and returns a finding. Every process makes every check, in the same order, because some of
them are collective; the findings of all processes become one, so that all of them stop for the same reason.
"""

import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from dinov2cli import distributed
from dinov2cli.config import Config
from dinov2cli.console import logger
from dinov2cli.errors import DataError, Dino2Error, EnvironmentProblem
from dinov2cli.launch import machine_checks as machine
from dinov2cli.launch import run_checks as run
from dinov2cli.launch.findings import Finding, Situation, Status, failure

if TYPE_CHECKING:
    from dinov2cli.data.datasets import ImageDataset

ANSWER_SECONDS = 60
"""How long the processes wait for each other before one is taken for missing."""


class Check(NamedTuple):
    """A function of the situation, and what must be fine before it makes sense."""

    examine: Callable[[Situation], Finding]
    after: tuple[str, ...] = ()


MACHINE = {
    "versions": Check(machine.versions),
    "device": Check(machine.device),
    "precision": Check(machine.precision, after=("device",)),
    "attention": Check(machine.attention, after=("precision",)),
    "communication": Check(machine.communication, after=("device",)),
    "clocks": Check(machine.clocks),
    "open files": Check(machine.open_files),
}
"""Checks of the machine, with or without a run in mind."""
DATA = {"dataset": Check(run.dataset), "shared memory": Check(machine.shared_memory)}
"""Checks that need a configuration with a dataset."""
MODEL = {"memory": Check(run.memory, after=("precision",))}
"""Checks that need a configuration."""
OUTPUT = {
    "output folder": Check(run.output_folder),
    "disk space": Check(run.disk_space, after=("output folder",)),
    "checkpoint": Check(run.checkpoint, after=("output folder", "disk space")),
}
"""Checks that need a run folder."""
ALL = {**MACHINE, **DATA, **MODEL, **OUTPUT}


def preflight(config: Config, device: torch.device, *, dataset: "ImageDataset | None" = None) -> None:
    """Stop a run that cannot succeed, on all processes alike, within seconds of its start.

    Collective: every process of the run calls it, inside `distributed.process_group()`, once the run folder exists.
    Warnings are logged; otherwise process 0 says one line.

    Args:
        dataset: what `config.train.dataset_path` names, if it has been listed already.

    Raises:
        DataError: the training images cannot be read, or are not the same for all processes.
        EnvironmentProblem: anything else that the run would fail of; the message names it and its remedy.
    """
    began = time.perf_counter()
    findings = examine(ALL, Situation(config, device, dataset))
    if distributed.is_main():
        for name, finding in findings.items():
            if finding.status is Status.WARNING:
                logger.warning("%s: %s. %s", name, finding.text, finding.remedy)
        if not failures(findings):
            reduced = findings["communication"].facts.get("bandwidth_gb_s")
            speed = f"; all-reduce over {distributed.world_size()} processes: {reduced:.2g} GB/s" if reduced else ""
            logger.info("%d checks in %.1f s%s", len(findings), time.perf_counter() - began, speed)
    raise_failures(findings)


def examine(checks: dict[str, Check], situation: Situation) -> dict[str, Finding]:
    """Make the checks, on all processes: what was found by name, without those that an earlier failure makes moot.

    Raises:
        EnvironmentProblem: a process does not answer.
    """
    wait_for_all()
    for name, check in checks.items():
        before = [situation.found[other] for other in check.after if other in checks and other in situation.found]
        missing = [other for other in check.after if other in checks and other not in situation.found]
        if missing or any(finding.status is Status.FAILURE for finding in before):
            continue
        here = _finding_of(check, situation)
        situation.found[name] = merge(distributed.all_gather_objects((socket.gethostname(), here)))
    return situation.found


def wait_for_all(seconds: float = ANSWER_SECONDS) -> None:
    """Make sure that all processes have come this far; a missing one would else be waited for without a word.

    Raises:
        EnvironmentProblem: one has not, on all that have.
    """
    if distributed.world_size() == 1:
        return
    try:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        dist.monitored_barrier(group, wait_all_ranks=True)
    except RuntimeError as error:
        raise EnvironmentProblem(
            f"not all of the {distributed.world_size()} processes answer within {seconds:g} s "
            f"({str(error).strip().splitlines()[0]})",
            "Look at the logs and nodes of those that are missing, and start the run again.",
        ) from error
    dist.destroy_process_group(group)


def merge(findings: Sequence[tuple[str, Finding]]) -> Finding:
    """One finding from those of all processes, given as (host, finding) in rank order: the worst of them.

    Where not all processes find the same, it names those that do.
    """
    order = list(Status)
    worst = max((finding.status for _, finding in findings), key=order.index)
    bad = [(rank, host, finding) for rank, (host, finding) in enumerate(findings) if finding.status is worst]
    _, _, first = bad[0]
    if worst is Status.OK or len(findings) == 1:
        return first
    alike = [(rank, host) for rank, host, finding in bad if finding.text == first.text]
    if len(alike) == len(findings):
        return first
    hosts = ", ".join(dict.fromkeys(host for _, host in alike))
    ranks = ", ".join(str(rank) for rank, _ in alike[:8]) + (", ..." if len(alike) > 8 else "")
    name = "process" if len(alike) == 1 else "processes"
    return first._replace(text=f"{name} {ranks} of {len(findings)} ({hosts}): {first.text}")


def failures(findings: dict[str, Finding]) -> dict[str, Finding]:
    """Those that a run would fail of."""
    return {name: finding for name, finding in findings.items() if finding.status is Status.FAILURE}


def raise_failures(findings: dict[str, Finding]) -> None:
    """Raise what was found wrong, as one error.

    Raises:
        DataError: the first failure is about the dataset.
        EnvironmentProblem: any other failure.
    """
    failed = failures(findings)
    if not failed:
        return
    kind = DataError if next(iter(failed)) == "dataset" else EnvironmentProblem
    text = "; ".join(f"{name}: {finding.text}" for name, finding in failed.items())
    raise kind(text, "\n".join(dict.fromkeys(finding.remedy for finding in failed.values() if finding.remedy)))


def _finding_of(check: Check, situation: Situation) -> Finding:
    """A check's finding; what it raises is one, too, since the other processes wait for it."""
    try:
        return check.examine(situation)
    except Dino2Error as error:
        return failure(error.message, error.hint or "")
    except Exception as error:
        logger.debug("a check failed", exc_info=True)
        lines = str(error).strip().splitlines()
        return failure(f"{type(error).__name__}: {lines[-1] if lines else ''}", "")
