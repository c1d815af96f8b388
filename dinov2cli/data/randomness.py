"""Random numbers that are functions of a key, so that data do not depend on workers, ranks or when a run started.

Philox is a counter-based generator: a key and a counter name a stream directly, there is no state to carry.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What the numbers are for; streams of one seed never overlap."""

    AUGMENTATION = 1
    MASKS = 2
    SAMPLE_PHOTOS = 3
    LINEAR_PROBE = 4
    STOCHASTIC_DEPTH = 5
    RESOLUTION = 6
    DENSE_PROBE = 7


def sample_rng(seed: int, k: int) -> np.random.Generator:
    """Generator for the augmentation of the `k`-th sample of the run with this `seed`."""
    return keyed_rng(seed, Stream.AUGMENTATION, k)


def mask_rng(seed: int, step: int, rank: int) -> np.random.Generator:
    """Generator for the masks of micro step `step` on process `rank`."""
    return keyed_rng(seed, Stream.MASKS, step, rank)


def place_drawn(seed: int, iteration: int, shares: Sequence[float]) -> int:
    """Which of several things an iteration has, the same in every process; each as often as its share says."""
    number = keyed_rng(seed, Stream.RESOLUTION, iteration).random()
    return min(int(np.searchsorted(np.cumsum(shares), number, side="right")), len(shares) - 1)


def keyed_rng(seed: int, stream: Stream, high: int, low: int = 0) -> np.random.Generator:
    """Generator of the numbers named by (seed, stream, high, low): 2^64 draws before it would meet another."""
    return np.random.Generator(np.random.Philox(key=(seed % 2**64, int(stream)), counter=(0, low, high, 0)))
