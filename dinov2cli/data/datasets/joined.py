"""Several datasets as one."""

from collections.abc import Sequence

import numpy as np

from dinov2cli.data.datasets.base import UNLABELLED, ImageDataset
from dinov2cli.data.decoding import USUAL, LazyImage, Reading
from dinov2cli.data.sampler import Order, SampleOrder, WeightedOrder


class JoinedDataset(ImageDataset):
    """Datasets one after another. Classes with the same name are one class.

    Args:
        parts: the datasets.
        weights: how often a part is seen in an epoch of training: 2 twice, 0.5 every other epoch. They change the
            training order alone; an evaluation sees every image once.
    """

    def __init__(self, parts: Sequence[ImageDataset], weights: Sequence[float] | None = None) -> None:
        self.parts = list(parts)
        self.weights = [1.0] * len(self.parts) if weights is None else list(weights)
        self.ends = np.cumsum([len(part) for part in self.parts]).tolist()
        self.class_names = tuple(dict.fromkeys(name for part in self.parts for name in part.class_names))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def order(self, seed: int) -> Order:
        if all(weight == 1 for weight in self.weights):
            return SampleOrder(len(self), seed)
        return WeightedOrder([len(part) for part in self.parts], self.weights, seed)

    def encoded(self, index: int) -> bytes | memoryview:
        part, i = self._locate(index)
        return self.parts[part].encoded(i)

    def open(self, index: int, reading: Reading = USUAL) -> LazyImage:
        part, i = self._locate(index)
        return self.parts[part].open(i, reading)

    def path(self, index: int) -> str:
        part, i = self._locate(index)
        return self.parts[part].path(i)

    def container(self, index: int) -> str:
        part, i = self._locate(index)
        return self.parts[part].container(i)

    def file_size(self, index: int) -> int | None:
        part, i = self._locate(index)
        return self.parts[part].file_size(i)

    def targets(self) -> np.ndarray:
        place = {name: i for i, name in enumerate(self.class_names)}
        targets = []
        for part in self.parts:
            # The last entry answers for -1, no label.
            table = np.array([*(place[name] for name in part.class_names), UNLABELLED], dtype=np.int64)
            targets.append(table[part.targets()])
        return np.concatenate(targets)

    def describe(self) -> str:
        parts = [
            f"{weight:g} x ({part.describe()})" if weight != 1 else part.describe()
            for part, weight in zip(self.parts, self.weights, strict=True)
        ]
        return f"{len(self)} images joined: " + " + ".join(parts)

    def _locate(self, index: int) -> tuple[int, int]:
        self._check_index(index)
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - (self.ends[part - 1] if part else 0)
