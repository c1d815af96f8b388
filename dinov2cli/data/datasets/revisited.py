"""Revisited Oxford and Paris: photographs of buildings, and which of them show the building of a query.

A folder with `gnd_roxford5k.pkl` (or `gnd_rparis6k.pkl`) and the images in `jpg/`, as the benchmark distributes them.
The pickle is read as data: what could run code is refused.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2cli.data.datasets.base import require_images
from dinov2cli.data.datasets.listing import FilesDataset, PathTable
from dinov2cli.data.decoding import USUAL, Reading
from dinov2cli.errors import DataError

PLAIN = {("builtins", name) for name in ("dict", "list", "tuple", "set", "int", "float", "str", "bool", "bytes")}
ARRAYS = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
ARRAYS |= {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
GRADES = ("easy", "hard", "junk")


class Truth(NamedTuple):
    """Rows of the database, int64, by how they show a query's building: clearly, with difficulty, hardly."""

    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray


class Photographs(FilesDataset):
    """Image files, or a box of each: left, top, right and bottom in pixels."""

    def __init__(self, files: Sequence[Path], what: str, boxes: np.ndarray | None = None) -> None:
        require_images(len(files), what)
        self._paths, self._what, self._boxes = PathTable.of(map(str, files)), what, boxes

    def image(self, index: int, reading: Reading = USUAL) -> np.ndarray:
        pixels = super().image(index, reading)
        if self._boxes is None:
            return pixels
        left, top, right, bottom = np.rint(self._boxes[index]).astype(int).tolist()
        height, width = pixels.shape[:2]
        top, left = min(max(top, 0), height - 1), min(max(left, 0), width - 1)
        return pixels[top : max(bottom, top + 1), left : max(right, left + 1)]

    def describe(self) -> str:
        boxes = ", cut to their boxes" if self._boxes is not None else ""
        return f"{self._what}: {len(self)} images{boxes}"


class Revisited(NamedTuple):
    """The benchmark: database, queries, and for each query what shows its building."""

    database: Photographs
    queries: Photographs
    truths: list[Truth]


def read_revisited(folder: Path, *, boxes: bool = False) -> Revisited:
    """The benchmark in a folder.

    Args:
        boxes: cut queries to the boxes of their buildings.

    Raises:
        DataError: it is none, it could run code, rows that are not there, or images that are missing.
    """
    file = min(folder.glob("gnd_*.pkl"), default=None)
    if file is None:
        raise DataError(f"{folder} has no gnd_*.pkl, as Revisited Oxford and Paris have.")
    try:
        with file.open("rb") as handle:
            content = _Data(handle, encoding="latin1").load()
        database, queries = ([str(name) for name in content[key]] for key in ("imlist", "qimlist"))
        truths = [
            Truth(*(np.asarray(each[grade], np.int64).reshape(-1) for grade in GRADES)) for each in content["gnd"]
        ]
        bounds = np.array([each["bbx"] for each in content["gnd"]], np.float64).reshape(-1, 4) if boxes else None
    except Exception as error:  # whatever damage makes of a pickle
        raise DataError(f"{file} is no ground truth of Revisited Oxford or Paris: {error}") from None
    if len(truths) != len(queries):
        raise DataError(f"{file}: {len(truths)} truths of {len(queries)} queries.")
    rows = np.concatenate([rows for truth in truths for rows in truth]) if truths else np.empty(0, np.int64)
    if rows.size and not 0 <= rows.min() <= rows.max() < len(database):
        raise DataError(f"{file} names image {rows.max()} of a database of {len(database)}.")
    files = [[folder / "jpg" / f"{name.removesuffix('.jpg')}.jpg" for name in names] for names in (database, queries)]
    missing = [path for path in (*files[0], *files[1]) if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]} is missing, one of {len(missing)} images that {file.name} names.")
    return Revisited(
        Photographs(files[0], f"{folder} database"), Photographs(files[1], f"{folder} queries", bounds), truths
    )


class _Data(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN | ARRAYS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} could run code; refused")
