"""Which image the k-th sample of a run is: shuffled anew every epoch, in O(1) time and memory at any k.

The permutation of an epoch is a small cipher on the numbers below the dataset's size (a Feistel network with cycle
walking), keyed by seed and epoch. No permutation is stored, so a hundred million images cost what ten do.
"""

from collections.abc import Sequence
from typing import Protocol

_ROUNDS = 6
_MASK64 = 2**64 - 1


class Order(Protocol):
    """Names the dataset index of the k-th sample of a run."""

    def index(self, k: int) -> int: ...


class SampleOrder:
    """Every epoch of `size` samples visits each index once, in an order of its own."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"cannot sample from {size} images")
        self.size = size
        self.seed = seed

    def index(self, k: int) -> int:
        """Dataset index of the `k`-th sample of the run, k >= 0 without upper bound."""
        epoch, position = divmod(k, self.size)
        return permute(position, self.size, key=_mix(self.seed, epoch))


class WeightedOrder:
    """Several datasets joined: in every epoch part i contributes round(weight_i * size_i) samples, shuffled together.

    A part with weight 2 is seen twice an epoch, one with weight 0.1 is seen in full every ten epochs: the slots of a
    part walk through the part's own `SampleOrder`, so no image is favoured by chance.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.slots = [max(1, round(size * weight)) for size, weight in zip(sizes, weights, strict=True)]
        self.size = sum(self.slots)
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.order = SampleOrder(self.size, seed)
        self.part_orders = [SampleOrder(size, _mix(seed, i + 1)) for i, size in enumerate(sizes)]

    def index(self, k: int) -> int:
        """Index into the joined dataset of the `k`-th sample of the run."""
        epoch, slot = k // self.size, self.order.index(k)
        part = 0
        while slot >= self.slots[part]:
            slot -= self.slots[part]
            part += 1
        return self.starts[part] + self.part_orders[part].index(epoch * self.slots[part] + slot)


def permute(position: int, size: int, *, key: int) -> int:
    """Image of `position` under the permutation of range(size) that `key` names."""
    low_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    high_bits = max(1, (size - 1).bit_length() - low_bits)
    while True:
        # The network permutes a domain at most four times as large; walking on until a value falls below `size`
        # restricts that permutation to range(size).
        position = _feistel(position, high_bits, low_bits, key)
        if position < size:
            return position


def _feistel(value: int, high_bits: int, low_bits: int, key: int) -> int:
    high, low = value >> low_bits, value & ((1 << low_bits) - 1)
    high_mask, low_mask = (1 << high_bits) - 1, (1 << low_bits) - 1
    for round_ in range(_ROUNDS):
        if round_ % 2 == 0:
            high ^= _mix(key + round_, low) & high_mask
        else:
            low ^= _mix(key + round_, high) & low_mask
    return high << low_bits | low


def _mix(a: int, b: int) -> int:
    """64-bit hash of two numbers (the finalizer of SplitMix64, twice)."""
    x = (a * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & _MASK64
    for value in (x, b):
        x = (x + value) & _MASK64
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK64
        x ^= x >> 31
    return x
