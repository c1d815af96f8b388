"""Images in an array of an HDF5 or Zarr file."""

import numpy as np

from dinov2cli.console import counted
from dinov2cli.data.datasets.base import ImageDataset, PerProcess, classes_of, require_images
from dinov2cli.data.decoding import USUAL, LazyImage, Reading, StoredImage
from dinov2cli.data.formats.stacks import Stack, values_inside
from dinov2cli.data.spelling import inside
from dinov2cli.errors import DataError
from dinov2cli.files import user_path


class ArraysDataset(ImageDataset):
    """The images of a stack, in its order, or the one image of an array.

    Args:
        file, path, axes: as of `Stack`.
        label: path of the array of classes, a number or name an image; in another file, `FILE::PATH`.

    Raises:
        DataError: no such array, or not as many labels as images.
        EnvironmentProblem: h5py or zarr is not installed.
    """

    def __init__(self, file: str, path: str = "", label: str | None = None, axes: str | None = None) -> None:
        self.file, self._where, self._opened = str(user_path(file)), (path, axes), PerProcess(Stack)
        stack = self._opened(self.file, *self._where)
        self.name, self.shape, self.axes, self.is_stack = stack.name, stack.array.shape, stack.axes, bool(stack.counts)
        self._length = len(stack)
        require_images(len(self), self.name)
        if label is not None:
            place = inside(label) or inside(f"{self.file}::{label}")
            values = values_inside(place.file, place.path).reshape(-1) if place else np.empty(0)
            if len(values) != len(self):
                raise DataError(f"{label}: {len(values)} labels for the {len(self)} images of {self.name}")
            names = [each.decode() if isinstance(each, bytes) else each for each in values.tolist()]
            self.class_names, self._classes = classes_of(names, where=label)

    def __len__(self) -> int:
        return self._length

    def open(self, index: int, reading: Reading = USUAL) -> LazyImage:
        self._check_index(index)
        stored = self._opened(self.file, *self._where).stored(index, reading.max_image_gb)
        return StoredImage(stored, self.path(index), reading)

    def encoded(self, index: int) -> bytes:
        """The image's samples."""
        return self.open(index).described().array.tobytes()

    def path(self, index: int) -> str:
        self._check_index(index)
        return f"{self.name}[{index}]" if self.is_stack else self.name

    def container(self, index: int) -> str:
        return self.file

    def describe(self) -> str:
        shape = f"{list(self.shape)} ({self.axes})"
        return f"array {self.name} {shape}: {counted(len(self), 'image')}, {self._classes_in_words}"
