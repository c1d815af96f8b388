"""Several datasets as one, and some images of one."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from dinov2cli.data.datasets.base import UNLABELLED, ImageDataset
from dinov2cli.data.decoding import USUAL, LazyImage, Reading
from dinov2cli.data.sampler import Order, SampleOrder, WeightedOrder
from dinov2cli.errors import DataError


class OfOtherDatasets(ImageDataset):
    """Images that other datasets hold."""

    @abstractmethod
    def _held(self, index: int) -> tuple[ImageDataset, int]:
        """The dataset that holds an image, and its place there."""

    def encoded(self, index: int) -> bytes | memoryview:
        images, i = self._held(index)
        return images.encoded(i)

    def image(self, index: int, reading: Reading = USUAL) -> np.ndarray:
        images, i = self._held(index)
        return images.image(i, reading)

    def open(self, index: int, reading: Reading = USUAL) -> LazyImage:
        images, i = self._held(index)
        return images.open(i, reading)

    def path(self, index: int) -> str:
        images, i = self._held(index)
        return images.path(i)

    def container(self, index: int) -> str:
        images, i = self._held(index)
        return images.container(i)

    def file_size(self, index: int) -> int | None:
        images, i = self._held(index)
        return images.file_size(i)


class RowsDataset(OfOtherDatasets):
    """Some images of another dataset, in any order, with its classes.

    Args:
        base: that dataset.
        rows: int64 [N], positions in it.
        name: for messages.

    Raises:
        DataError: rows that it has not.
    """

    def __init__(self, base: ImageDataset, rows: np.ndarray, name: str = "rows") -> None:
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(base):
            raise DataError(f"{name}: rows {rows.min()} to {rows.max()} of a dataset of {len(base)} images")
        self.base, self.rows, self.name = base, rows, name
        self.class_names = base.class_names

    def __len__(self) -> int:
        return len(self.rows)

    def targets(self) -> np.ndarray:
        found: np.ndarray = self.base.targets()[self.rows]
        return found

    def describe(self) -> str:
        return f"{self.name}: {len(self)} images of {self.base.describe()}"

    def _held(self, index: int) -> tuple[ImageDataset, int]:
        self._check_index(index)
        return self.base, int(self.rows[index])


class JoinedDataset(OfOtherDatasets):
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

    def is_weighted(self) -> bool:
        return any(weight != 1 for weight in self.weights)

    def order(self, seed: int) -> Order:
        if self.is_weighted():
            return WeightedOrder([len(part) for part in self.parts], self.weights, seed)
        return SampleOrder(len(self), seed)

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

    def _held(self, index: int) -> tuple[ImageDataset, int]:
        self._check_index(index)
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], index - (self.ends[part - 1] if part else 0)
