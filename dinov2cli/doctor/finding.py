"""What a check finds, and how the findings of all processes become one.

A check looks at one thing and returns a finding. Every process makes every check, in the same order, because some of
them are collective; of what the processes find the worst counts, so that all of them stop for the same reason.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dinov2cli import distributed
from dinov2cli.config import Config
from dinov2cli.console import few, logger
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.device import Precision
from dinov2cli.errors import DataError, Dino2Error, EnvironmentProblem

ANSWER_SECONDS = 60
"""How long the processes wait for each other before one is taken for missing."""


class Status(StrEnum):
    """From the best to the worst; a run that has a failure cannot succeed."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


class Finding(NamedTuple):
    """What one check found, in one line, and what to do about it; `facts` are the figures behind it, for `--json`."""

    status: Status
    text: str
    remedy: str = ""
    facts: Mapping[str, Any] = {}


def ok(text: str, **facts: Any) -> Finding:
    return Finding(Status.OK, text, "", facts)


def warning(text: str, remedy: str, **facts: Any) -> Finding:
    """The run can succeed, but something is worth knowing."""
    return Finding(Status.WARNING, text, remedy, facts)


def failure(text: str, remedy: str, **facts: Any) -> Finding:
    """The run cannot succeed."""
    return Finding(Status.FAILURE, text, remedy, facts)


@dataclass(frozen=True)
class Situation:
    """What is examined, as this process sees it.

    Args:
        config: of the run; of checks without a run the defaults.
        device: where this process would train.
        dataset: the training images, if they have been listed already.
        thorough: take the time for figures (`dino2 doctor`), instead of a few seconds at the start of a run.
    """

    config: Config
    device: torch.device
    dataset: ImageDataset | None = None
    thorough: bool = False

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.train.output_dir)

    @property
    def precision(self) -> Precision:
        """The arithmetic of the run on this device."""
        asked = self.config.compute_precision
        return Precision.resolve(asked.precision, self.device, grad_scaler=asked.grad_scaler)


class Check(NamedTuple):
    """What to look at, and the checks that must be fine before it makes sense."""

    examine: Callable[[Situation], Finding]
    after: tuple[str, ...] = ()


def examine(checks: Mapping[str, Check], situation: Situation) -> dict[str, Finding]:
    """Make the checks, on all processes: what was found by name, without those that an earlier failure makes moot.

    Raises:
        EnvironmentProblem: a process does not answer.
    """
    wait_for_all()
    found: dict[str, Finding] = {}
    for name, check in checks.items():
        before = [found.get(other) for other in check.after if other in checks]
        if any(finding is None or finding.status is Status.FAILURE for finding in before):
            continue
        found[name] = merge(distributed.all_gather_objects((socket.gethostname(), _finding_of(check, situation))))
    return found


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
    """One finding from those of all processes, given as (host, finding) in rank order: the first of the worst.

    Where not all processes find the same, it names those that do.
    """
    worst = max((finding for _, finding in findings), key=severity)
    alike = [rank for rank, (_, finding) in enumerate(findings) if finding[:2] == worst[:2]]
    if worst.status is Status.OK or len(alike) == len(findings):
        return worst
    hosts = ", ".join(dict.fromkeys(findings[rank][0] for rank in alike))
    name = "process" if len(alike) == 1 else "processes"
    return worst._replace(text=f"{name} {few([*map(str, alike)], 8)} of {len(findings)} ({hosts}): {worst.text}")


def severity(finding: Finding) -> int:
    return list(Status).index(finding.status)


def problem_of(findings: Mapping[str, Finding]) -> Dino2Error | None:
    """What was found wrong, as one error: a DataError if the first failure is about the dataset."""
    failed = {name: finding for name, finding in findings.items() if finding.status is Status.FAILURE}
    if not failed:
        return None
    kind = DataError if next(iter(failed)) == "dataset" else EnvironmentProblem
    text = "; ".join(f"{name}: {finding.text}" for name, finding in failed.items())
    return kind(text, "\n".join(dict.fromkeys(finding.remedy for finding in failed.values() if finding.remedy)))


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
