"""A curation as it goes on: what has become of each image, and why.

Shapes: N images.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2cli import distributed
from dinov2cli.console import logger
from dinov2cli.curate.collection import Collection
from dinov2cli.curate.graph import AtThreshold
from dinov2cli.requests.curate import CurateRequest

KEPT, UNREADABLE, DUPLICATE, AGAINST, NOT_ALIKE, NOT_DRAWN = range(6)
"""What became of an image."""
REASONS = ("kept", "unreadable", "near-duplicate", "near an evaluation set", "not like the given sets", "not drawn")
"""In words."""


@dataclass
class Step:
    """What a step did: how many images it found and left, its seconds, and whatever else is to be said of it."""

    name: str
    before: int
    after: int
    seconds: float
    said: dict[str, Any] = field(default_factory=dict)


@dataclass
class Curation:
    """A curation as it goes on.

    Attributes:
        fate: uint8 [N], what became of each image.
        beside: int64 [N], the image it is shown beside, or -1: of a near-duplicate the one that is kept, else one of
            the sets, by its row, these one after the other.
        score: float32 [N], their cosine.
        swept: what other thresholds of near-duplicates would do.
        sets: those that images were compared with, by what became of the images.
        nearest: float32 [N], how similar the nearest image of each is.
    """

    request: CurateRequest
    pool: Collection
    device: torch.device
    fate: np.ndarray
    beside: np.ndarray
    score: np.ndarray
    steps: list[Step] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    swept: list[AtThreshold] = field(default_factory=list)
    sets: dict[int, list[Collection]] = field(default_factory=dict)
    nearest: np.ndarray | None = None

    @property
    def work(self) -> Path:
        return self.request.output / "work"

    @property
    def alive(self) -> np.ndarray:
        """bool [N]."""
        kept: np.ndarray = self.fate == KEPT
        return kept

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        if distributed.is_main():
            logger.warning("%s", text)

    def set_of(self, fate: int, row: int) -> tuple[Collection, int]:
        """The collection in which an image's `beside` is a row, and that row."""
        for each in self.sets.get(fate, [self.pool]):
            if row < len(each):
                return each, row
            row -= len(each)
        raise IndexError(row)

    def drop(self, rows: np.ndarray, fate: int, beside: Any = -1, score: Any = np.nan) -> None:
        self.fate[rows], self.beside[rows], self.score[rows] = fate, beside, score
