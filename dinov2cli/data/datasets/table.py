"""Images by a table of their paths and labels: CSV, TSV or Parquet."""

import csv
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from dinov2cli.console import counted
from dinov2cli.data.datasets.base import classes_of, require_images, require_there
from dinov2cli.data.datasets.listing import FilesDataset, PathTable, image_extensions
from dinov2cli.data.datasets.parquet import open_parquet
from dinov2cli.errors import DataError
from dinov2cli.files import user_path

PATH_COLUMNS = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "img",
    "img_path",
)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target", "category")
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}


class TableDataset(FilesDataset):
    """The images that a table names, in its order.

    Args:
        file: a .csv (with commas, semicolons, tabs or bars), .tsv or .parquet; the first line of text names the
            columns, unless it names an image.
        root: where relative paths begin; by default the table's folder.
        path: column of the paths; by default the one of `PATH_COLUMNS` that is there, or the only one of image files.
        label: column of the labels, numbers or names, empty for none; by default the first of `LABEL_COLUMNS`; `none`
            for no labels.

    Raises:
        DataError: a file that cannot be read, columns that are not there or not to be told, or no image that exists.
    """

    def __init__(self, file: str, root: str | None = None, path: str | None = None, label: str | None = None) -> None:
        self.file = user_path(file)
        columns = read_columns(self.file, path, label)
        self.path_column = _chosen(self.file, columns, path, PATH_COLUMNS, "path")
        self.label_column = _chosen(self.file, columns, label, LABEL_COLUMNS, "label") if label != "none" else ""
        self._prefix = os.path.join(user_path(root) if root else self.file.parent, "")
        self._paths = PathTable.of(columns[self.path_column])
        require_images(len(self._paths), str(self.file))
        if self.label_column:
            labels = [label or None for label in columns[self.label_column]]
            self.class_names, self._classes = classes_of(labels, key=_numbers_by_value)
        require_there(self, self.file, "Table")

    def describe(self) -> str:
        by = f"{len(self.class_names)} classes by column {self.label_column!r}" if self.class_names else "no labels"
        return f"table {self.file}: {counted(len(self), 'image')} by column {self.path_column!r}, {by}"


def read_columns(file: Path, *wanted: str | None) -> dict[str, Sequence[str]]:
    """The columns of a table as text, by name; of Parquet only those that may be of use. Raises `DataError`."""
    if file.suffix.lower() == ".parquet":
        parquet = open_parquet(file)
        known = {*PATH_COLUMNS, *LABEL_COLUMNS, *wanted}
        names = [name for name in parquet.schema_arrow.names if name in known or name.lower() in known]
        names = names or parquet.schema_arrow.names
        table = parquet.read(columns=names, use_threads=False)
        return {name: ["" if v is None else str(v) for v in table[name].to_pylist()] for name in names}
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            first = text.readline()
            delimiter = max(DELIMITERS.get(file.suffix.lower(), DELIMITERS[".csv"]), key=first.count)
            text.seek(0)
            rows = list(csv.reader(text, delimiter=delimiter, strict=True))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a table in UTF-8 ({error}); save it as such (Excel: CSV UTF-8)") from error
    rows = [row for row in rows if any(map(str.strip, row))]
    if not rows:
        raise DataError(f"{file} is empty")
    names = rows[0] if not any(map(_is_image, rows[0])) else []
    rows = rows[1:] if names else rows
    names = names or ["path" if _is_image(cell) else "label" if len(rows[0]) == 2 else f"column {i}"
                      for i, cell in enumerate(rows[0])]  # fmt: skip
    if wrong := [number for number, row in enumerate(rows, 1) if len(row) != len(names)]:
        raise DataError(f"{file}: row {wrong[0]} of images has {len(rows[wrong[0] - 1])} columns, not {len(names)}")
    stripped = [name.strip() for name in names]
    if twice := next((name for name in stripped if name and stripped.count(name) > 1), ""):
        raise DataError(f"{file}: two columns are named {twice!r}; name one otherwise")
    return {name.strip(): [row[column].strip() for row in rows] for column, name in enumerate(names)}


def _chosen(file: Path, columns: dict[str, Sequence[str]], wanted: str | None, usual: Sequence[str], what: str) -> str:
    """The column that holds the paths or labels; "" for labels that are nowhere."""
    names = {name.lower(): name for name in columns}
    has = f"{file} has the columns {', '.join(columns)}"
    if wanted is not None:
        if wanted not in columns:
            raise DataError(f"{has}, and none {wanted!r}")
        return wanted
    if found := next((names[name] for name in usual if name in names), ""):
        return found
    of_images = [name for name, values in columns.items() if any(map(_is_image, islice(values, 1)))]
    if what == "path" and len(of_images) != 1:
        raise DataError(f"{has}; which one holds the paths of images is not to be told",
                        f"Name it: Table:file={file}:path=COLUMN")  # fmt: skip
    return of_images[0] if what == "path" else ""


def _is_image(text: str) -> bool:
    return os.path.splitext(text.strip())[1].lower() in image_extensions()


def _numbers_by_value(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return float("inf"), name
