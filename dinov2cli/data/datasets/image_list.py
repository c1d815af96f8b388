"""Images by a list: a text file that names some of the images there are, such as `dino2 curate` writes."""

import codecs
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2cli.console import counted
from dinov2cli.data.datasets.base import ImageDataset, classes_of, require_images, require_there
from dinov2cli.data.datasets.joined import RowsDataset
from dinov2cli.errors import DataError

ROWS_OF = "# rows of "
"""How a list begins whose images are no files of their own: the dataset that holds them follows."""
COMPARED = 1000
"""Rows whose paths are compared with those of the dataset that they are of."""


class PathsDataset(ImageDataset):
    """The image files of a list, in its order: a path a line, and behind a tab its class, if it has one. Lines that
    begin with `# ` are remarks.

    Args:
        file: the list, for messages.
        lines: what stands in it.
        root: where relative paths begin.

    Raises:
        DataError: no path, or no image that exists.
    """

    def __init__(self, file: Path, lines: "Lines", root: Path) -> None:
        self.file, self._lines = file, (lines := lines.without_remarks())
        require_images(len(self._lines), str(file))
        self._prefix = os.path.join(root, "")
        self.class_names, self._classes = classes_of([lines.second_column(i) or None for i in range(len(lines))])
        require_there(self, file, "List")

    def __len__(self) -> int:
        return len(self._lines)

    def path(self, index: int) -> str:
        self._check_index(index)
        return os.path.join(self._prefix, self._lines.first_column(index))

    def describe(self) -> str:
        return f"list {self.file}: {counted(len(self), 'image')}, {self._classes_in_words}"


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

    def without_remarks(self) -> "Lines":
        """Those that do not begin with `# `."""
        second = self.content[np.minimum(self.starts + 1, len(self.content) - 1)]
        kept = (self.content[self.starts] != ord("#")) | (second != ord(" "))
        return Lines(self.content, self.starts[kept], self.tabs[kept], self.stops[kept])

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
