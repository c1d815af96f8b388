"""What every image dataset offers, and reading parts of files by position, in any process."""

import os
import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any, Generic, TypeVar

import numpy as np

from dinov2cli.data.decoding import USUAL, LazyImage, Reading, UnreadableImage, read_file
from dinov2cli.data.regions import open_image
from dinov2cli.data.sampler import Order, SampleOrder
from dinov2cli.errors import DataError

Made = TypeVar("Made")

UNLABELLED = -1
OPEN_FILES = 16
LOOKED_AT = 20


class ImageDataset(ABC):
    """Images by index, with class labels where there are any.

    Subclasses store their listing in numpy arrays, not in Python objects: forked workers then share its memory.
    """

    class_names: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    def encoded(self, index: int) -> bytes | memoryview:
        """The image file's bytes. Raises `UnreadableImage` if the file cannot be read."""
        return read_file(self.path(index))

    @abstractmethod
    def path(self, index: int) -> str:
        """Where the image lies, for messages."""

    def container(self, index: int) -> str:
        """The file that holds the image, which may hold others, too: it changes when the image does."""
        return self.path(index)

    def targets(self) -> np.ndarray:
        """Class indices, int64 [N]; -1 where there is no label. By default what a subclass keeps as `_classes`."""
        classes: np.ndarray | None = getattr(self, "_classes", None)
        return np.full(len(self), UNLABELLED, np.int64) if classes is None else classes.astype(np.int64)

    @abstractmethod
    def describe(self) -> str:
        """One line for people: what, where, how many."""

    def file_size(self, index: int) -> int | None:
        """Bytes of `encoded(index)`, without reading them; None for an image that is no file of its own."""
        try:
            return os.path.getsize(self.path(index))
        except OSError:
            return None

    def image(self, index: int, reading: Reading = USUAL) -> np.ndarray:
        """Pixels, uint8 [H, W, 3] RGB. Raises `UnreadableImage`."""
        return self.open(index, reading).pixels()

    def order(self, seed: int) -> Order:
        """The order in which a training with this seed sees the images."""
        return SampleOrder(len(self), seed)

    def target(self, index: int) -> int:
        """Class index, -1 if there is no label."""
        return int(self._targets[index])

    def open(self, index: int, reading: Reading = USUAL) -> LazyImage:
        """The image, not decoded yet; of a large TIFF its header alone is read. Raises `UnreadableImage`."""
        path = self.path(index)
        return open_image(path, reading) or LazyImage(self.encoded(index), path, reading)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.image(index), self.target(index)

    @cached_property
    def _targets(self) -> np.ndarray:
        return self.targets()

    @property
    def _classes_in_words(self) -> str:
        return f"{len(self.class_names)} classes" if self.class_names else "no labels"

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside this dataset of {len(self)} images")


def require_images(count: int, where: str, hint: str | None = None) -> None:
    """Raise `DataError` for a dataset without images."""
    if count == 0:
        raise DataError(f"no images found in {where}", hint)


def require_there(images: ImageDataset, file: Path, kind: str) -> None:
    """Raise `DataError` where none of the first images that a file names exists: its paths begin elsewhere."""
    first = [images.path(i) for i in range(min(len(images), LOOKED_AT))]
    if not any(map(os.path.exists, first)):
        raise DataError(f"{file}: of the first {len(first)} images none exists; the first is {first[0]!r}",
                        f"Where relative paths begin: {kind}:file={file}:root=FOLDER")  # fmt: skip


def classes_of(
    labels: Sequence[Any], names: Sequence[str] = (), *, where: str = "", key: Callable[[Any], Any] | None = None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and int32 [N] with -1 where there is no label.

    Args:
        labels: of each image; None, -1 or, of floating point, no number for none; with `names`, numbers.
        where: they stand, for messages.
        key: by which classes are sorted that have no names given.

    Raises:
        DataError: a label that is not one number or word, or that has no name.
    """
    labels = [None if label != label else label for label in labels]
    if names:  # numbers, -1 where a test set has none
        for label in labels:
            if label is not None and (not isinstance(label, int) or label >= len(names)):
                raise DataError(f"{where}: label {label!r} is none of the {len(names)} classes that are named there")
        numbers = [UNLABELLED if label is None or label < 0 else label for label in labels]
        return tuple(names), np.array(numbers, np.int32)
    try:
        known = sorted({label for label in labels if label is not None and label != UNLABELLED}, key=key)
    except TypeError:  # lists and dictionaries; words and numbers at once
        raise DataError(f"{where} holds no labels of one number or word each, such as {labels[0]!r}") from None
    place = {label: i for i, label in enumerate(known)}
    return tuple(map(str, known)), np.array([place.get(label, UNLABELLED) for label in labels], np.int32)


class PerProcess(Generic[Made]):
    """The last things that `make` has given, by its arguments, in each process its own.

    For files that are not to be shared with a forked process, nor sent to another one.
    """

    def __init__(self, make: Callable[..., Made], most: int = 1) -> None:
        self._make, self._most = make, most
        self._process, self._kept = os.getpid(), OrderedDict[tuple[Any, ...], Made]()

    def __call__(self, *key: Any) -> Made:
        if self._process != os.getpid():
            self._process, self._kept = os.getpid(), OrderedDict()
        if key not in self._kept:
            self._kept[key] = self._make(*key)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}


class OpenFiles:
    """Reads byte ranges of files and keeps the last `OPEN_FILES` of them open.

    Positions are given with every read, so forked processes can share it; a copy sent to another process opens anew.
    """

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, start: int, size: int) -> bytes:
        """`size` bytes from `start`. Raises `UnreadableImage` if the file is missing or shorter."""
        try:
            file = self._open(path)
            # Damage may promise more bytes than there are, and as many would be allocated.
            data = os.pread(file, min(size, max(os.fstat(file).st_size - start, 0)), start)
        except OSError as error:
            raise UnreadableImage(path, f"cannot be read ({error.strerror})") from error
        if len(data) < size:
            raise UnreadableImage(path, f"ends at byte {start + len(data)}, {start + size} were expected")
        return data

    def _open(self, path: str) -> int:
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
        else:
            self._descriptors[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if len(self._descriptors) > OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        return self._descriptors[path]

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._descriptors = OrderedDict()

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def read_texts(path: Path) -> tuple[str, ...]:
    """The entries of a `.npy` file of texts; DataError where it is none."""
    try:
        return tuple(str(text) for text in np.load(path))
    except Exception as error:  # numpy raises whatever a damaged header makes it come upon
        raise DataError(f"{path}: not a .npy file of texts ({error})") from error


class RecordFile:
    """A structured `.npy` read record by record: opening it costs nothing, however many records it has.

    Memory-mapping would do as well, but every page touched would count as each worker's memory.

    Raises:
        DataError: the file is missing or is not a one-dimensional structured array with the fields that are `needed`.
    """

    def __init__(self, path: Path, *needed: str) -> None:
        self.path = path
        try:
            table = np.load(path, mmap_mode="r")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, EOFError, TokenError) as error:
            raise DataError(f"{path}: not a .npy file ({error})") from error
        if table.dtype.names is None or table.ndim != 1:
            raise DataError(f"{path}: expected a one-dimensional structured array")
        if missing := [name for name in needed if name not in table.dtype.names]:
            raise DataError(f"{path}: has no field {missing[0]!r}, but {', '.join(table.dtype.names)}")
        self.dtype, self._length, self._start = table.dtype, len(table), table.offset
        self._files = OpenFiles()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.void:
        """The record; IndexError outside 0 .. len - 1."""
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} is outside {self.path} with {self._length} records")
        size = self.dtype.itemsize
        content = self._files.read(str(self.path), self._start + index * size, size)
        record: np.void = np.frombuffer(content, self.dtype)[0]
        for name, (kind, start, *_) in (self.dtype.fields or {}).items():
            if kind.kind != "U":
                continue
            # A damaged text would break whatever takes it for one, at any later time.
            codes = np.frombuffer(content[start : start + kind.itemsize], f"{kind.byteorder}u4")
            if codes.size and codes.max() > sys.maxunicode:
                raise UnreadableImage(str(self.path), f"record {index} is damaged: its {name} is no text")
        return record

    def column(self, name: str) -> np.ndarray:
        """One field of all records, copied into memory."""
        return np.array(np.load(self.path, mmap_mode="r")[name])
