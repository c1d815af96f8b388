"""What every image dataset offers."""

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np

from dinov2cli.data.decoding import ImageSize, decode_image, jpeg_header
from dinov2cli.data.sampler import Order, SampleOrder
from dinov2cli.errors import DataError

UNLABELLED = -1


class ImageDataset(ABC):
    """Images by index, with class labels where there are any.

    Subclasses store their listing in numpy arrays, not in Python objects: forked workers then share its memory.
    """

    class_names: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encoded(self, index: int) -> bytes | memoryview:
        """The image file's bytes. Raises `UnreadableImage` if the file cannot be read."""

    @abstractmethod
    def path(self, index: int) -> str:
        """Where the image lies, for messages."""

    @abstractmethod
    def targets(self) -> np.ndarray:
        """Class indices, int64 [N]; -1 where there is no label."""

    @abstractmethod
    def describe(self) -> str:
        """One line for people: what, where, how many."""

    def image(self, index: int) -> np.ndarray:
        """Pixels, uint8 [H, W, 3] RGB. Raises `UnreadableImage`."""
        return decode_image(self.encoded(index), self.path(index))

    def order(self, seed: int) -> Order:
        """The order in which a training with this seed sees the images."""
        return SampleOrder(len(self), seed)

    def target(self, index: int) -> int:
        """Class index, -1 if there is no label."""
        return int(self._targets[index])

    def open(self, index: int) -> "LazyImage":
        """The image, not decoded yet. Raises `UnreadableImage` if the file cannot be read."""
        return LazyImage(self.encoded(index), self.path(index))

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.image(index), self.target(index)

    @cached_property
    def _targets(self) -> np.ndarray:
        return self.targets()

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside this dataset of {len(self)} images")


class LazyImage:
    """An encoded image whose size may be asked for before it is decoded, so that a JPEG can be decoded smaller."""

    def __init__(self, data: bytes | memoryview, path: str) -> None:
        self._data = data
        self._path = path
        self._pixels: np.ndarray | None = None
        self._header = jpeg_header(data)

    @property
    def can_shrink(self) -> bool:
        return self._header is not None

    @property
    def size(self) -> ImageSize:
        if self._header is not None:
            return ImageSize(self._header.height, self._header.width)
        return ImageSize(*self.pixels().shape[:2])

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """uint8 [ceil(H/shrink), ceil(W/shrink), 3]. `shrink` above 1 only where `can_shrink`."""
        if self._pixels is None:
            self._pixels = decode_image(self._data, self._path, shrink=shrink)
        return self._pixels


def require_images(count: int, where: str, hint: str | None = None) -> None:
    """Raise `DataError` for a dataset without images."""
    if count == 0:
        raise DataError(f"no images found in {where}", hint)
