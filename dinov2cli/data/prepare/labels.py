"""The classes of ImageNet-1k: `labels.txt` (`wnid,name` lines), or what Kaggle gives in its place."""

import csv
import re
from pathlib import Path
from typing import NamedTuple

from dinov2cli.errors import DataError
from dinov2cli.files import write_text, writing

MAPPING = "LOC_synset_mapping.txt"
SOLUTION = "LOC_val_solution.csv"
_SYNSET = re.compile(r"n\d{8}\s+\S.*")


class Labels(NamedTuple):
    """names: class id -> name, in the file's order. problems: oddities of the file that could be read all the same."""

    names: dict[str, str]
    problems: list[str]

    def class_index(self) -> dict[str, int]:
        """Class id -> index: the rank of the id, as everywhere that ImageNet's classes are numbered."""
        return {class_id: index for index, class_id in enumerate(sorted(self.names))}


def kaggle_file(name: str, root: Path, data: Path) -> Path | None:
    """A file of Kaggle's download: at the root, or up to three folders above the images; None if there is none."""
    return next((path for place in (root, *data.parents[:3]) if (path := place / name).is_file()), None)


def read_labels(root: Path, data: Path | None = None) -> Labels:
    """Read labels.txt (UTF-8, quotes around names with commas, any line ends), else Kaggle's LOC_synset_mapping.txt.

    Args:
        root: where it lies.
        data: the folder of train/ and val/, where it is another one.

    Raises:
        DataError: no such file, or a line that cannot be read.
    """
    data = data or root
    own = next((place / "labels.txt" for place in (root, data) if (place / "labels.txt").is_file()), None)
    path = own or kaggle_file(MAPPING, root, data)
    if path is None:
        raise DataError(f"{root / 'labels.txt'} does not exist",
                        "--write-labels makes one from the ids of the classes.")  # fmt: skip
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from error
    names: dict[str, str] = {}
    problems = []
    lines = text.splitlines()
    as_kaggle = all(_SYNSET.fullmatch(line) for line in lines if line.strip())
    rows = (line.split(maxsplit=1) for line in lines) if as_kaggle else csv.reader(lines)
    for number, row in enumerate(rows, start=1):
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


def write_labels(path: Path, labels: Labels) -> None:
    """Write a labels.txt. Raises EnvironmentProblem where it cannot be written."""
    with writing(path):
        write_text(path, "".join(f"{class_id},{name}\n" for class_id, name in labels.names.items()), flush=True)
