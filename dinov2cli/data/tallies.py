"""What is added up of the images of a set: sums of channels, and how often each level is seen."""

import math
from dataclasses import dataclass, field

import numpy as np

from dinov2cli.data.channels import place_of
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.data.decoding import Reading

SAMPLES = 16_384
"""Of an image whose levels are counted, evenly spread; every image counts the same."""
KEPT_BITS = 20
"""Of float32: values are told apart to 0.05 %, whole numbers to 4096 exactly."""
_SIGN = np.uint32(1 << 31)
_LOST = np.uint32(32 - KEPT_BITS)


@dataclass
class Sums:
    """Over images: of each one's mean, and mean of squares; the lowest and highest values. All float64, a channel."""

    images: int = 0
    batches: int = 0
    bad: list[str] = field(default_factory=list)
    mean: list[float] = field(default_factory=lambda: [0.0])
    square: list[float] = field(default_factory=lambda: [0.0])
    low: list[float] = field(default_factory=lambda: [math.inf])
    high: list[float] = field(default_factory=lambda: [-math.inf])

    @classmethod
    def of(cls, dataset: ImageDataset, index: int, reading: Reading) -> "Sums":
        """Those of one image. Raises `UnreadableImage`."""
        image = dataset.image(index, reading)
        flat = image.reshape(-1, image.shape[2]).astype(np.float64) / (255 if image.dtype == np.uint8 else 1)
        of_channels = flat.mean(0), np.square(flat).mean(0), flat.min(0), flat.max(0)
        return cls(1, 0, [], *(numbers.tolist() for numbers in of_channels))

    def join(self, other: "Sums") -> None:
        """Those of further images."""
        self.images, self.batches = self.images + other.images, self.batches + other.batches
        self.bad += other.bad
        self.mean, self.square = np.add(self.mean, other.mean).tolist(), np.add(self.square, other.square).tolist()
        self.low, self.high = np.minimum(self.low, other.low).tolist(), np.maximum(self.high, other.high).tolist()


@dataclass
class Levels:
    """How often each level of the channels that are read was seen, in shares of images.

    Args:
        weights: by level, a number that grows with it.
    """

    images: int = 0
    batches: int = 0
    bad: list[str] = field(default_factory=list)
    weights: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = {int(level): weight for level, weight in self.weights.items()}  # JSON has no whole numbers there

    @classmethod
    def of(cls, dataset: ImageDataset, index: int, reading: Reading) -> "Levels":
        """Those of one image. Raises `UnreadableImage`, also if it lacks a channel."""
        stored = dataset.open(index, reading).stored()
        samples = stored.array[..., : stored.channels]
        if reading.images.channels:
            places = [place_of(name, stored, dataset.path(index)) for name in reading.images.channels]
            samples = stored.array[..., places]
        flat = samples.reshape(-1)
        flat = flat[:: max(1, flat.size // SAMPLES)].astype(np.float32)
        flat = flat[np.isfinite(flat)]
        levels, counts = np.unique(_levels(flat), return_counts=True)
        return cls(1, weights=dict(zip(levels.tolist(), (counts / max(flat.size, 1)).tolist(), strict=True)))

    def join(self, other: "Levels") -> None:
        """Those of further images."""
        self.images, self.batches = self.images + other.images, self.batches + other.batches
        self.bad += other.bad
        for level, weight in other.weights.items():
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
