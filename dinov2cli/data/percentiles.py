"""Percentiles of the samples of a set, streamed: which values are black and white in all of its images."""

from dataclasses import dataclass, field

import numpy as np

from dinov2cli.data.channels import place_of
from dinov2cli.data.decoding import Reading
from dinov2cli.data.formats.stored import Stored

SAMPLES = 16_384
"""Of an image, evenly spread; every image counts the same."""
KEPT_BITS = 20
"""Of float32: values are told apart to 0.05 %, whole numbers to 4096 exactly."""
_SIGN = np.uint32(1 << 31)
_LOST = np.uint32(32 - KEPT_BITS)


@dataclass
class Levels:
    """How often each level was seen, in shares of images.

    Args:
        weights: by level, a number that grows with it.
    """

    images: int = 0
    batches: int = 0
    weights: dict[int, float] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = {int(level): weight for level, weight in self.weights.items()}  # JSON has no whole numbers there

    def add(self, stored: Stored, reading: Reading, path: str) -> None:
        """The samples of one image, of the channels that are read. Raises `UnreadableImage` if it lacks one."""
        samples = stored.array[..., : stored.channels]
        if reading.images.channels:
            samples = stored.array[..., [place_of(name, stored, path) for name in reading.images.channels]]
        flat = samples.reshape(-1)
        flat = flat[:: max(1, flat.size // SAMPLES)].astype(np.float32)
        flat = flat[np.isfinite(flat)]
        levels, counts = np.unique(_levels(flat), return_counts=True)
        self._add(dict(zip(levels.tolist(), (counts / max(flat.size, 1)).tolist(), strict=True)))
        self.images += 1

    def join(self, other: "Levels") -> None:
        """Those of the next batch."""
        self._add(other.weights)
        self.images += other.images
        self.bad += other.bad
        self.batches += 1

    def _add(self, weights: dict[int, float]) -> None:
        for level, weight in weights.items():
            self.weights[level] = self.weights.get(level, 0.0) + weight

    def percentile(self, p: float) -> float:
        """The least value that at least p percent of the samples do not exceed, rounded towards zero."""
        levels = np.array(sorted(self.weights), np.uint32)
        shares = np.cumsum([self.weights[level] for level in levels.tolist()])
        at = int(np.searchsorted(shares, p / 100 * shares[-1] * (1 - 1e-12)))
        return float(_values(levels[at : at + 1])[0])


def _levels(values: np.ndarray) -> np.ndarray:
    """float32 -> uint32 of `KEPT_BITS`, in the same order."""
    bits = (values + np.float32(0)).view(np.uint32)  # no negative zero
    ordered: np.ndarray = np.where(bits & _SIGN, ~bits, bits | _SIGN) >> _LOST
    return ordered


def _values(levels: np.ndarray) -> np.ndarray:
    """The value nearest zero of each level."""
    low = levels << _LOST
    bits: np.ndarray = np.where(low & _SIGN, low ^ _SIGN, ~(low | ((np.uint32(1) << _LOST) - np.uint32(1))))
    return bits.astype(np.uint32).view(np.float32)
