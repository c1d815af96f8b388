"""`labels.txt` of ImageNet-1k: `wnid,name` lines, in class-index order."""

import csv
from pathlib import Path
from typing import NamedTuple

from dinov2cli.errors import DataError
from dinov2cli.files import write_text, writing


class Labels(NamedTuple):
    """names: class id -> name, in the file's order. problems: oddities of the file that could be read all the same."""

    names: dict[str, str]
    problems: list[str]

    def class_index(self) -> dict[str, int]:
        """Class id -> index: the rank of the id, as everywhere that ImageNet's classes are numbered."""
        return {class_id: index for index, class_id in enumerate(sorted(self.names))}


def read_labels(root: Path) -> Labels:
    """Read `<root>/labels.txt`: UTF-8, quotes around names with commas, any line ends.

    Raises:
        DataError: no such file, or a line that cannot be read.
    """
    path = root / "labels.txt"
    if not path.is_file():
        raise DataError(f"{path} does not exist", "--write-labels makes one from the names of the class folders.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from error
    names: dict[str, str] = {}
    problems = []
    lines = text.splitlines()
    for number, row in enumerate(csv.reader(lines), start=1):
        if not row:
            continue
        if len(row) < 2 or not row[0].strip():
            raise DataError(f"{path}, line {number}: expected 'class id,name', found {','.join(row)!r}")
        class_id, name = row[0].strip(), ",".join(row[1:])
        if len(row) > 2:
            problems.append(f"{path}, line {number}: a comma in a name without quotes; read as {name!r}")
        if class_id in names:
            raise DataError(f"{path}, line {number}: {class_id} stands there twice")
        names[class_id] = name
    if not names:
        raise DataError(f"{path} is empty")
    if list(names) != sorted(names):
        first = next(a for a, b in zip(names, sorted(names), strict=True) if a != b)
        problems.append(f"{path}: not sorted by class id (first at {first}); classes are numbered by sorted id")
    if "\r" in text:
        problems.append(f"{path}: Windows line ends; other tools may take them for part of the names")
    return Labels(names, problems)


def write_labels(root: Path, class_ids: list[str]) -> Path:
    """Write `<root>/labels.txt` with each class id as its own name. Raises DataError if there is one already."""
    path = root / "labels.txt"
    if path.exists():
        raise DataError(f"{path} exists already; it is not overwritten")
    if not class_ids:
        raise DataError(f"{root} has no class folders in train/ or val/ to make labels.txt from")
    with writing(path):
        write_text(path, "".join(f"{class_id},{class_id}\n" for class_id in sorted(class_ids)), flush=True)
    return path
