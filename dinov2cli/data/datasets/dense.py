"""Images of which every pixel has a label: a class, or how far away it is."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dinov2cli.console import counted, few, in_threads
from dinov2cli.data.datasets.base import require_images
from dinov2cli.data.datasets.listing import FilesDataset, PathTable, list_images
from dinov2cli.data.decoding import USUAL, LazyImage, Reading, pixels_of, read_file, read_stored
from dinov2cli.data.formats.arrays import read_array
from dinov2cli.data.formats.pillow import read_indices
from dinov2cli.data.formats.stored import Stored, UnreadableImage, turned
from dinov2cli.data.workers import warn_once
from dinov2cli.errors import DataError
from dinov2cli.files import user_path

IGNORED = 255
"""In masks: a pixel without a class, which is neither learned nor counted."""
MOST_CLASSES = 255


class Pair(NamedTuple):
    """Paths of an image and of its labels."""

    image: str
    label: str


class DenseDataset(FilesDataset):
    """Images with a map of labels each, without a class of their own.

    Args:
        pairs: of paths.
        what: for people, as "ADE20k TRAIN in /data/ade".

    Raises:
        DataError: there are none.
    """

    labels: Literal["masks", "depth"]
    """What the maps hold."""

    def __init__(self, pairs: Iterable[Pair], what: str) -> None:
        pairs = list(pairs)
        require_images(len(pairs), what)
        self._paths = PathTable.of(pair.image for pair in pairs)
        self._labels = PathTable.of(pair.label for pair in pairs)
        self._what = what

    def label_path(self, index: int) -> str:
        """Where the labels of an image lie."""
        self._check_index(index)
        return self._labels[index]

    def describe(self) -> str:
        return f"{self._what}: {counted(len(self), 'image')}"

    def read_label(self, path: str, reading: Reading) -> Stored:
        """The labels [H, W, 1] in a file, as they are used. Raises `UnreadableImage`."""
        raise NotImplementedError

    def pair(self, index: int, reading: Reading = USUAL) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [H, W, C] as of `image`, and labels [H, W], turned as the image is.

        The labels are those of the pixels as the image's file stores them, unless their height and width, exchanged,
        say that they belong to the image as it is shown.

        Raises:
            UnreadableImage: one of the two cannot be read, or their sizes differ.
        """
        path, label_path = self.path(index), self.label_path(index)
        image = LazyImage(self.encoded(index), path, reading).stored()  # a large TIFF as a whole, too
        label = self.read_label(label_path, reading)
        labels = turned(label.array, label.orientation) if label.orientation != 1 else label.array
        stored, upright = image.array.shape[:2], image.array.shape[:2]
        if image.orientation > 4:
            upright = (upright[1], upright[0])
        follows = reading.images.exif_orientation and image.orientation != 1 and label.orientation == 1
        if follows and labels.shape[:2] == stored:
            if stored == upright:
                warn_once("%s: EXIF turns it, and its labels are taken for those of the pixels as they are stored, and "
                          "turned with them; the same holds for others like it", path)  # fmt: skip
            labels = turned(labels, image.orientation)
        pixels = pixels_of(image, path, reading)
        if labels.shape[:2] != pixels.shape[:2]:
            sizes = (f"{width} x {height}" for height, width in (labels.shape[:2], pixels.shape[:2]))
            raise UnreadableImage(label_path, "is {} pixels, and its image {}".format(*sizes))
        return pixels, labels[..., 0]

    def label(self, index: int, reading: Reading = USUAL) -> np.ndarray:
        """The labels alone, [H, W] as of `pair`."""
        return self.pair(index, reading)[1]


class SegmentationDataset(DenseDataset):
    """Images with a class for every pixel.

    Args:
        classes: the class that each number in a mask means, -1 for one that is ignored; None: the numbers are the
            classes, and 255 is ignored.
        n_classes: how many there are; None: one more than the largest number in any mask, for which all are read.
    """

    labels = "masks"

    def __init__(
        self,
        pairs: Iterable[Pair],
        what: str,
        *,
        classes: Sequence[int] | None = None,
        n_classes: int | None = None,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(pairs, what)
        self._meaning = None if classes is None else np.array(classes, np.int64)
        self.class_names = tuple(names)
        self._n_classes = n_classes or len(names) or None

    @property
    def n_classes(self) -> int:
        """Raises DataError where it takes reading all masks, and one cannot be read or has too large a number."""
        if self._n_classes is None:
            self._n_classes = 1 + largest_class(self)
        return self._n_classes

    def read_label(self, path: str, reading: Reading) -> Stored:
        """Classes uint8 [H, W, 1], 255 where there is none."""
        file = read_file(path), path, reading.max_image_gb
        stored = read_array(*file) or read_indices(*file)
        numbers = stored.array
        if numbers.shape[2] != 1 or numbers.dtype.kind not in "ui":
            raise UnreadableImage(path, f"{numbers.dtype} {list(numbers.shape)} is no mask; whole numbers [H, W] are")
        low, high = int(numbers.min()), int(numbers.max())
        most = MOST_CLASSES if self._meaning is None else len(self._meaning) - 1
        if low < 0 or high > most:
            known = (
                f"known are 0 to {most}" if self._meaning is not None else "classes are 0 to 254, and 255 is ignored"
            )
            raise UnreadableImage(path, f"holds the number {low if low < 0 else high}; {known}")
        classes = numbers if self._meaning is None else self._meaning[numbers]
        classes = np.where(classes < 0, IGNORED, classes).astype(np.uint8)
        if self._n_classes is not None:
            beyond = int(classes[classes != IGNORED].max(initial=0))
            if beyond >= self._n_classes:
                known = f"{self._n_classes}, 0 to {self._n_classes - 1}"
                raise UnreadableImage(path, f"holds the class {beyond}; there are {known}")
        return replace(stored, array=classes)

    def with_classes(self, n_classes: int, names: Sequence[str] = ()) -> "SegmentationDataset":
        """Itself, with the number of classes said."""
        self._n_classes, self.class_names = n_classes, tuple(names) or self.class_names
        return self


class DepthDataset(DenseDataset):
    """Images with a distance in metres for every pixel.

    Args:
        scale: what whole numbers are divided by to be metres; files of floating point numbers hold metres.
    """

    labels = "depth"

    def __init__(self, pairs: Iterable[Pair], what: str, *, scale: float = 1000.0) -> None:
        super().__init__(pairs, what)
        self.scale = scale

    def read_label(self, path: str, reading: Reading) -> Stored:
        """Metres float32 [H, W, 1], 0 where they are not known (0, negative, not finite)."""
        stored = read_stored(read_file(path), path, reading.max_image_gb)
        values = stored.array
        if values.shape[2] != 1 or values.dtype.itemsize < 2:
            raise UnreadableImage(path, f"{values.dtype} {list(values.shape)} is no depth; 16-bit or floating point "
                                  "[H, W] is, as PNG, TIFF or .npy")  # fmt: skip
        metres = values.astype(np.float32)
        if values.dtype.kind in "ui":
            metres /= np.float32(self.scale)
        metres[~np.isfinite(metres) | (metres < 0)] = 0
        return replace(stored, array=metres)


def over_labels(dataset: DenseDataset, measure: Callable[[np.ndarray], float], what: str) -> list[float]:
    """`measure` of the labels of every image, as files have them. Raises DataError for the first that is unreadable."""

    def of(index: int) -> float:
        return measure(dataset.read_label(dataset.label_path(index), USUAL).array)

    return in_threads(of, range(len(dataset)), what, 8)


def largest_class(dataset: SegmentationDataset) -> int:
    """Of all masks. Raises DataError where no pixel has a class."""
    largest = int(max(over_labels(dataset, lambda mask: mask[mask != IGNORED].astype(int).max(initial=-1), "classes")))
    if largest < 0:
        raise DataError(f"{dataset.describe()}: all pixels of all masks are 255, which is ignored")
    return largest


def pairs_by_stem(images: str | Path, labels: str | Path) -> list[Pair]:
    """The images of a folder and the files of another with the same names but for their suffix, subfolders included.

    Raises:
        DataError: one of the two is no folder, an image has no labels, labels have no image, or a name is there twice.
    """
    found = []
    for folder in (images, labels):
        root = user_path(folder)
        if not os.path.isdir(root):
            raise DataError(f"{root} is not a folder")
        by_stem: dict[str, str] = {}
        for path in list_images(root).paths:
            stem = os.path.splitext(path)[0]
            if stem in by_stem:
                raise DataError(f"{root}: {by_stem[stem]} and {path} have one name, so that labels are not told apart")
            by_stem[stem] = path
        require_images(len(by_stem), str(root), "Files are recognised by their extension (.jpg, .png, .npy, ...).")
        found.append((root, by_stem))
    (image_root, by_image), (label_root, by_label) = found
    for stems, others, where, lack in (
        (by_image, by_label, label_root, "images have no labels"),
        (by_label, by_image, image_root, "files of labels have no image"),
    ):
        if missing := [path for stem, path in stems.items() if stem not in others]:
            raise DataError(
                f"{len(missing)} of {len(stems)} {lack} in {where}: {few(missing, 3)}",
                "An image and its labels have the same name but for the suffix: images/a.jpg, masks/a.png.",
            )
    return [
        Pair(os.path.join(image_root, path), os.path.join(label_root, by_label[stem]))
        for stem, path in by_image.items()
    ]
