"""The classes of ImageNet-1k: `labels.txt` (`wnid,name` lines), or what Kaggle gives in its place; and those of its
validation images, which are downloaded in one flat folder."""

import csv
import os
import re
import zlib
from pathlib import Path
from struct import unpack_from
from typing import Literal, NamedTuple

from dinov2cli.errors import DataError
from dinov2cli.files import write_text, writing

MAPPING = "LOC_synset_mapping.txt"
SOLUTION = "LOC_val_solution.csv"
_SYNSET = re.compile(r"n\d{8}\s+\S.*")
_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_CLASS_ID = re.compile(r"n\d{8}")


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


def sort_val(root: Path, labels_file: Path, how: Literal["move", "link"]) -> int:
    """Give every `<root>/val/ILSVRC2012_val_*.JPEG` its place in `<root>/val/<class id>/`; the number sorted.

    Nothing is deleted or overwritten: files are moved, or stay where they are with a link from the class folder.

    Raises:
        DataError: labels that cannot be read or do not cover the images; before anything is moved.
    """
    val = root / "val"
    if not val.is_dir():
        raise DataError(f"{val} does not exist")
    flat = {int(found[1]): entry.name for entry in os.scandir(val) if (found := _IMAGE.fullmatch(entry.name))}
    if not flat:
        return 0
    classes = read_val_labels(labels_file)
    without = [name for number, name in sorted(flat.items()) if number not in classes]
    if without:
        raise DataError(f"{labels_file} has no label for {len(without)} images, the first {without[0]}")
    for number, name in sorted(flat.items()):
        folder = val / classes[number]
        folder.mkdir(exist_ok=True)
        target = folder / name
        if target.exists():
            continue
        if how == "link":
            target.symlink_to(os.path.join("..", name))
        else:
            (val / name).rename(target)
    return len(flat)


def read_val_labels(path: Path) -> dict[int, str]:
    """Class id of each validation image by its number.

    Understood are the devkit's `ILSVRC2012_validation_ground_truth.txt` (a number a line, with `meta.mat` beside it),
    a class id a line in the order of the images, and lines that name the image and then its class id, separated by
    blanks, tabs or commas.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    # Names and numbers are ASCII; what else there is need not be.
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if lines and all(line.isdigit() for line in lines):
        ids = class_ids_of_devkit(path.with_name("meta.mat"))
        if max(map(int, lines)) > len(ids) or min(map(int, lines)) < 1:
            raise DataError(f"{path}: labels lie outside 1..{len(ids)}, the classes of {path.with_name('meta.mat')}")
        return {number: ids[int(line) - 1] for number, line in enumerate(lines, start=1)}
    if lines and all(_CLASS_ID.fullmatch(line) for line in lines):
        return dict(enumerate(lines, start=1))
    classes = {}
    for line in lines:
        number, class_id = re.search(r"ILSVRC2012_val_(\d{8})", line), _CLASS_ID.search(line)
        if number and class_id:
            classes[int(number[1])] = class_id[0]
    if not classes:
        raise DataError(
            f"{path} is not understood",
            "Give the devkit's ILSVRC2012_validation_ground_truth.txt (meta.mat beside it), or lines "
            "'ILSVRC2012_val_00000001.JPEG n01751748'.",
        )
    return classes


def class_ids_of_devkit(meta: Path) -> list[str]:
    """Class ids in the devkit's order (ILSVRC2012_ID 1, 2, ...), from its `meta.mat`.

    The file is MATLAB's version 5: tagged elements, compressed or not. Its one variable lists the synsets in order,
    so their ids come in order wherever they stand in it.
    """
    if not meta.is_file():
        raise DataError(f"{meta} does not exist; the devkit's numbers are meaningless without it")
    data = meta.read_bytes()
    content, position = bytearray(), 128
    try:
        while position + 8 <= len(data):
            kind, size = unpack_from("<II", data, position)
            element = data[position + 8 : position + 8 + size]
            content += zlib.decompress(element) if kind == 15 else element  # 15: miCOMPRESSED
            position += 8 + size
    except zlib.error as error:
        raise DataError(f"{meta}: damaged ({error})") from error
    # Characters are stored in one byte or in two.
    ids = re.findall(rb"(?<![A-Za-z])n\d{8}(?!\d)|n\x00(?:\d\x00){8}", bytes(content))
    if not ids:
        raise DataError(f"{meta}: holds no class ids")
    return list(dict.fromkeys(found.replace(b"\0", b"").decode() for found in ids))
