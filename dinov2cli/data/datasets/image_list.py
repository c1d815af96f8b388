"""Images by a list: a text file that names some of the images there are, such as `dino2 curate` writes."""

import codecs
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2cli.data.datasets.base import UNLABELLED, ImageDataset, require_images
from dinov2cli.data.decoding import USUAL, LazyImage, Reading
from dinov2cli.errors import DataError

ROWS_OF = "# rows of "
"""How a list begins whose images are no files of their own: the dataset that holds them follows."""
LOOKED_AT = 20
"""If none of so many images exists, the paths begin elsewhere."""
COMPARED = 1000
"""Rows whose paths are compared with those of the dataset that they are of."""


class PathsDataset(ImageDataset):
    """The image files of a list, in its order: a path a line, and behind a tab its class, if it has one.

    Args:
        file: the list, for messages.
        lines: what stands in it.
        root: where relative paths begin.

    Raises:
        DataError: no path, or no image that exists.
    """

    def __init__(self, file: Path, lines: "Lines", root: Path) -> None:
        self.file, self._lines = file, lines
        require_images(len(self._lines), str(file))
        self._prefix = os.path.join(root, "")
        labels = [lines.second_column(i) for i in range(len(lines))]
        self.class_names = tuple(sorted({*labels} - {""}))
        place = {"": UNLABELLED} | {name: i for i, name in enumerate(self.class_names)}
        self._classes = np.fromiter((place[label] for label in labels), np.int32, len(labels))
        first = [self.path(i) for i in range(min(len(self), LOOKED_AT))]
        if not any(map(os.path.exists, first)):
            raise DataError(f"{file}: of the first {len(first)} images none exists; the first is {first[0]}",
                            f"Where relative paths begin: List:file={file}:root=FOLDER")  # fmt: skip

    def __len__(self) -> int:
        return len(self._lines)

    def path(self, index: int) -> str:
        self._check_index(index)
        return os.path.join(self._prefix, self._lines.first_column(index))

    def targets(self) -> np.ndarray:
        return self._classes.astype(np.int64)

    def describe(self) -> str:
        classes = f"{len(self.class_names)} classes" if self.class_names else "no labels"
        return f"list {self.file}: {len(self)} images, {classes}"


class RowsDataset(ImageDataset):
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

    def _row(self, index: int) -> int:
        self._check_index(index)
        return int(self.rows[index])

    def encoded(self, index: int) -> bytes | memoryview:
        return self.base.encoded(self._row(index))

    def open(self, index: int, reading: Reading = USUAL) -> LazyImage:
        return self.base.open(self._row(index), reading)

    def path(self, index: int) -> str:
        return self.base.path(self._row(index))

    def container(self, index: int) -> str:
        return self.base.container(self._row(index))

    def file_size(self, index: int) -> int | None:
        return self.base.file_size(self._row(index))

    def targets(self) -> np.ndarray:
        found: np.ndarray = self.base.targets()[self.rows]
        return found

    def describe(self) -> str:
        return f"{self.name}: {len(self)} images of {self.base.describe()}"


@dataclass(frozen=True)
class Lines:
    """The lines of a text, without a Python object for each: bytes, uint8 [total], and where a line's first column
    begins and ends and the line ends, int64 [N] each. Columns are parted by tabs; empty lines are none."""

    content: np.ndarray
    starts: np.ndarray
    tabs: np.ndarray
    stops: np.ndarray

    @classmethod
    def read(cls, file: Path) -> "Lines":
        """Raises DataError for a file that cannot be read."""
        try:
            content = np.fromfile(file, np.uint8)
            content = content[3:] if content[:3].tobytes() == codecs.BOM_UTF8 else content
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        stops = np.flatnonzero(content == ord("\n"))
        if len(content) and content[-1] != ord("\n"):
            stops = np.append(stops, len(content))
        starts = np.concatenate(([0], stops[:-1] + 1)) if len(stops) else stops
        stops = stops - (content[np.maximum(stops - 1, 0)] == ord("\r"))  # as Windows ends lines
        there = stops > starts
        starts, stops = starts[there], stops[there]
        tabs = np.append(np.flatnonzero(content == ord("\t")), len(content))
        return cls(content, starts, np.minimum(tabs[np.searchsorted(tabs, starts)], stops), stops)

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, index: int) -> str:
        return self._text(self.starts[index], self.stops[index])

    def first_column(self, index: int) -> str:
        return self._text(self.starts[index], self.tabs[index])

    def second_column(self, index: int) -> str:
        """ "" where the line has none."""
        return self._text(min(self.tabs[index] + 1, self.stops[index]), self.stops[index])

    def after_first(self) -> "Lines":
        """All but the first line."""
        return Lines(self.content, self.starts[1:], self.tabs[1:], self.stops[1:])

    def _text(self, start: int, stop: int) -> str:
        return bytes(self.content[start:stop]).decode(errors="surrogateescape")


def rows_of(base: ImageDataset, lines: Lines, file: Path) -> RowsDataset:
    """The images of `base` whose rows are the first columns of a list; the second are their paths.

    Raises:
        DataError: what is no row, or `base` has changed since the list was made.
    """
    try:
        rows = np.fromiter((int(lines.first_column(i)) for i in range(len(lines))), np.int64, len(lines))
    except (ValueError, OverflowError) as error:
        raise DataError(f"{file}: not a list of rows ({error}); each line is a number, a tab and a path") from None
    require_images(len(rows), str(file))
    dataset = RowsDataset(base, rows, f"list {file}")
    for i in range(0, len(rows), max(1, len(rows) // COMPARED)):
        was, now = lines.second_column(i), printable(dataset.path(i))
        if was not in ("", now):
            raise DataError(f"{file}: row {rows[i]} was {was}, and is {now} now: the dataset has changed",
                            "Make the list anew.")  # fmt: skip
    return dataset


def printable(path: str) -> str:
    r"""A path as a column of a line: what would part columns or lines, and bytes that are no UTF-8, as `\xNN`."""
    shown = os.fsencode(path).decode(errors="backslashreplace")
    return shown.translate({ord(sign): f"\\x{ord(sign):02x}" for sign in "\t\r\n"})
