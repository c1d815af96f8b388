"""Images by a list: a text file that names some of the images there are, such as `dino2 curate` writes."""

import os
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from dinov2cli.console import counted
from dinov2cli.data.datasets.base import ImageDataset, classes_of, require_images, require_there
from dinov2cli.data.datasets.joined import RowsDataset
from dinov2cli.data.datasets.listing import FilesDataset, PathTable
from dinov2cli.errors import DataError

ROWS_OF = "# rows of "
"""How a list begins whose images are no files of their own: the dataset that holds them follows."""
COMPARED = 1000
"""Rows whose paths are compared with those of the dataset that they are of."""


class PathsDataset(FilesDataset):
    """The image files of a list, in its order: a path a line, and behind a tab its class, if it has one. Lines that
    begin with `# ` are remarks.

    Args:
        file: the list.
        root: where relative paths begin.

    Raises:
        DataError: no path, or no image that exists.
    """

    def __init__(self, file: Path, root: Path) -> None:
        labels: list[str | None] = []

        def paths() -> Iterator[str]:
            for line in lines_of(file):
                if not line.startswith("# "):
                    path, _, label = line.partition("\t")
                    labels.append(label or None)
                    yield path

        self.file, self._prefix, self._paths = file, os.path.join(root, ""), PathTable.of(paths())
        require_images(len(self), str(file))
        self.class_names, self._classes = classes_of(labels)
        require_there(self, file, "List")

    def describe(self) -> str:
        return f"list {self.file}: {counted(len(self), 'image')}, {self._classes_in_words}"


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a text that are not empty. Raises DataError for a file that cannot be read."""
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
            for line in lines:
                if text := line.removesuffix("\n").removesuffix("\r"):  # as Windows ends lines
                    yield text
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def rows_of(base: ImageDataset, file: Path) -> RowsDataset:
    """The images of `base` whose rows are the first columns of a list, from its second line on; the second are their
    paths.

    Raises:
        DataError: what is no row, or `base` has changed since the list was made.
    """
    rows = array("q")

    def paths() -> Iterator[str]:
        for line in islice(lines_of(file), 1, None):
            row, _, path = line.partition("\t")
            rows.append(int(row))
            yield path

    try:
        before = PathTable.of(paths())
    except (ValueError, OverflowError) as error:
        raise DataError(f"{file}: not a list of rows ({error}); each line is a number, a tab and a path") from None
    require_images(len(rows), str(file))
    dataset = RowsDataset(base, np.frombuffer(rows, np.int64), f"list {file}")
    for i in range(0, len(rows), max(1, len(rows) // COMPARED)):
        was, now = before[i], printable(dataset.path(i))
        if was not in ("", now):
            raise DataError(f"{file}: row {rows[i]} was {was}, and is {now} now: the dataset has changed",
                            "Make the list anew.")  # fmt: skip
    return dataset


def printable(path: str) -> str:
    r"""A path as a column of a line: what would part columns or lines, and bytes that are no UTF-8, as `\xNN`."""
    shown = os.fsencode(path).decode(errors="backslashreplace")
    return shown.translate({ord(sign): f"\\x{ord(sign):02x}" for sign in "\t\r\n"})
