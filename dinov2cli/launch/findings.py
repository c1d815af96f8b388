"""What the checks before a run find, and what they are given to look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dinov2cli.config import Config

if TYPE_CHECKING:
    from dinov2cli.data.datasets import ImageDataset


class Status(StrEnum):
    """Of a check; a run that has a failure cannot succeed."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


class Finding(NamedTuple):
    """What one check found, in one line, and what to do about it.

    `facts` are the figures behind it, for `--json`.
    """

    status: Status
    text: str
    remedy: str = ""
    facts: Mapping[str, Any] = {}


def ok(text: str, **facts: Any) -> Finding:
    """All is well."""
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
    dataset: "ImageDataset | None" = None
    thorough: bool = False
    found: dict[str, Finding] = field(default_factory=dict)
    """What earlier checks found, of all processes together."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.train.output_dir)
