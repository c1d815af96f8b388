"""An index: a folder with the features of images, their paths, and all that these features depend on.

    index.json            what it is made with, and what of the files below counts; replaced whole, so each change is
                          there or not
    data-1/features.npy   float16 or float32 [N, D]; a row is an image, and rows are appended
    data-1/images.npy     `IMAGE` records [N]
    data-1/paths          the bytes of the paths, one after the other
    data-1/removed-3.npy  bool [N' <= N], rows that are no longer found; of the rows after these none

What lies behind the rows that count is an interrupted addition, and is written over.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dinov2cli import __version__
from dinov2cli.console import Advance
from dinov2cli.errors import DataError, EnvironmentProblem
from dinov2cli.files import append_rows, flush_to_disk, locked_now, parse_json, write_array, write_text, writing

ABOUT = "an index of dino2 search"
FORMAT = 1
IMAGE = np.dtype([("path_end", "<i8"), ("bytes", "<i8"), ("changed", "<i8"), ("position", "<i8"), ("source", "<i4"),
                  ("readable", "?")])  # fmt: skip
"""Of an image: where its path ends, size and time of change (ns) of the file that holds it, its place in the dataset
that it is of (`Contents.sources`), and whether it could be read; where not, features are zeros and never found."""
COMPACT_ABOVE = 0.25
"""Share of rows that are removed above which an addition or a removal drops them from the files."""
BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class Recipe:
    """What all features of an index are made with.

    Args:
        model: what gives these weights again, for `--model`; with the file of its configuration where one was given.
        weights: SHA-256 of the model.
        transform: sizes in pixels and how files become pixels, in words.
        precision: dtype of the matrix products.
        options: how images are read and resized, as fields of a request.
    """

    model: str
    config_file: str | None
    weights: str
    transform: str
    precision: str
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, other: "Recipe", name: str, of: Path) -> None:
        """Raise DataError where features of the other cannot be compared with those of the index in `of`.

        Precision may differ: the cosines change in the third digit at most.
        """
        if other.weights != self.weights:
            raise DataError(
                f"{name}: the features of {of} are of other weights: SHA-256 {self.weights[:12]}... of {self.model}, "
                f"and these are {other.weights[:12]}...",
                "Give --model with the weights that it was built with, or build another index.",
            )
        if other.transform != self.transform:
            raise DataError(
                f"{name}: the images of {of} were prepared in another way ({self.transform}), not by {other.transform}",
                "Leave out the options that differ, or build another index.",
            )


@dataclass(frozen=True)
class Contents:
    """What counts in the folder of an index: `index.json`."""

    recipe: Recipe
    dim: int
    dtype: str
    data: str = "data-1"
    rows: int = 0
    paths_end: int = 0
    removed: int = 0
    """Number of the file of removed rows; 0: none are."""
    sources: tuple[str, ...] = ()
    """Dataset strings that images were added from."""
    version: str = __version__
    format: int = FORMAT


class Index:
    """The images of an index as they are now; nothing that is done to it later changes these.

    Attributes:
        features: float16 or float32 [N, D], memory-mapped.
        images: `IMAGE` [N], memory-mapped.
        alive: bool [N], the rows that may be found.
    """

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.folder, self.contents = folder, contents
        data, rows = folder / contents.data, contents.rows
        self.features = _mapped(data / "features.npy", rows)
        self.images = _mapped(data / "images.npy", rows)
        self._paths = np.memmap(data / "paths", np.uint8, "r") if contents.paths_end else np.empty(0, np.uint8)
        if len(self._paths) < contents.paths_end or self.features.shape[1:] != (contents.dim,):
            raise _damaged(folder, f"{data} does not hold what index.json says")
        self.removed = np.zeros(rows, bool)
        if contents.removed:
            found = _mapped(data / f"removed-{contents.removed}.npy", None)
            self.removed[: len(found)] = found
        self.alive = ~self.removed & self.images["readable"]

    @staticmethod
    def open(folder: Path) -> "Index":
        """Read an index, which another process may be writing.

        Raises:
            DataError: there is none, or it is damaged.
        """
        for _ in range(3):  # what index.json names is gone where it was replaced meanwhile
            contents = _read_contents(folder)
            try:
                return Index(folder, contents)
            except FileNotFoundError as error:
                gone = error
        raise _damaged(folder, f"{gone.filename} is gone")

    @property
    def recipe(self) -> Recipe:
        return self.contents.recipe

    def __len__(self) -> int:
        """Images that may be found."""
        return int(np.count_nonzero(self.alive))

    def path(self, row: int) -> str:
        """Where the image of a row lies."""
        start = int(self.images["path_end"][row - 1]) if row else 0
        return os.fsdecode(self._paths[start : int(self.images["path_end"][row])].tobytes())

    def source(self, row: int) -> str:
        """The dataset that an image was added from."""
        return self.contents.sources[int(self.images["source"][row])]

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row of each path, unreadable images included, removed ones left out."""
        joined, ends = self._paths.tobytes(), self.images["path_end"].tolist()
        starts = [0, *ends]
        return {os.fsdecode(joined[starts[row] : ends[row]]): row for row in np.flatnonzero(~self.removed).tolist()}

    # What follows is for the process that holds the lock. Each returns what is then on the disk.

    def with_images(
        self, features: np.ndarray, images: np.ndarray, paths: Sequence[str], instead_of: Sequence[int] = ()
    ) -> "Index":
        """The index with more images.

        Args:
            features: [n, D].
            images: `IMAGE` [n], whose `path_end` is filled in here.
            instead_of: rows that are removed.
        """
        with writing(self.folder):
            return self._committed(_appended(self.folder, self.contents, features, images, paths), instead_of)

    def with_source(self, source: str) -> "Index":
        """The index with one more dataset that images may be of, unless it has it."""
        known = self.contents.sources
        return self if source in known else self._committed(replace(self.contents, sources=(*known, source)))

    def without(self, rows: Sequence[int]) -> "Index":
        """The index without some rows."""
        return self._committed(self.contents, rows)

    def compacted(self, progress: Advance = lambda more: None) -> "Index":
        """The index with its removed rows dropped from the files: features are copied, not computed anew."""
        kept = np.flatnonzero(~self.removed)
        number = int(self.contents.data.removeprefix("data-")) + 1
        contents = replace(self.contents, data=f"data-{number}", rows=0, paths_end=0, removed=0)
        with writing(self.folder):
            _make_data(self.folder, contents)
            for start in range(0, len(kept), BLOCK_ROWS):
                block = kept[start : start + BLOCK_ROWS]
                paths = [self.path(row) for row in block.tolist()]
                contents = _appended(self.folder, contents, self.features[block], self.images[block], paths)
                progress(len(block))
            _commit(self.folder, contents)
            shutil.rmtree(self.folder / self.contents.data, ignore_errors=True)
        return Index(self.folder, contents)

    def _committed(self, contents: Contents, without: Sequence[int] = ()) -> "Index":
        data = self.folder / contents.data
        if len(without):
            removed = np.zeros(contents.rows, bool)
            removed[: len(self.removed)] = self.removed
            removed[np.asarray(without)] = True
            contents = replace(contents, removed=contents.removed + 1)
            write_array(data / f"removed-{contents.removed}.npy", removed)
        with writing(self.folder):
            _commit(self.folder, contents)
            if len(without):
                (data / f"removed-{self.contents.removed}.npy").unlink(missing_ok=True)
        return Index(self.folder, contents)


def create(folder: Path, recipe: Recipe, dim: int, dtype: str) -> Index:
    """A new index without images.

    Raises:
        EnvironmentProblem: the folder cannot be written.
    """
    contents = Contents(recipe, dim, dtype)
    with writing(folder):
        _make_data(folder, contents)
        _commit(folder, contents)
    return Index(folder, contents)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While this process may change the index in a folder; what an interrupted change has left is removed first.

    Raises:
        EnvironmentProblem: another process is changing it, or the folder cannot be written.
    """
    hint = "Wait until that has ended; it can be searched meanwhile."
    with locked_now(folder / "index", EnvironmentProblem(f"{folder} is being changed by another process", hint)):
        if is_index(folder):
            _tidy(folder, _read_contents(folder))
        yield


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index."""
    return (folder / "index.json").is_file()


def _tidy(folder: Path, contents: Contents) -> None:
    for data in folder.glob("data-*"):
        if data.name != contents.data:
            shutil.rmtree(data, ignore_errors=True)
    for removed in (folder / contents.data).glob("removed-*.npy"):
        if removed.name != f"removed-{contents.removed}.npy":
            removed.unlink(missing_ok=True)


def _read_contents(folder: Path) -> Contents:
    file = folder / "index.json"
    try:
        values = parse_json(file.read_bytes())
        if values.pop("about") != ABOUT:
            raise ValueError("of another program")
        if values["format"] > FORMAT:
            raise DataError(f"{folder} is an index of a newer dino2 ({values['version']}); this one is {__version__}.")
        values["recipe"], values["sources"] = Recipe(**values["recipe"]), tuple(values["sources"])
        return Contents(**values)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder} is no index: it has no index.json",
            f"Build one: dino2 search build {folder} --model CKPT --data FOLDER",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"index.json cannot be read: {error}") from None


def _commit(folder: Path, contents: Contents) -> None:
    values = {"about": ABOUT, **asdict(contents), "version": __version__}
    write_text(folder / "index.json", json.dumps(values, indent=1), flush=True)


def _damaged(folder: Path, why: str) -> DataError:
    return DataError(f"the index {folder} is damaged: {why}", "Build it anew in another folder.")


def _mapped(file: Path, rows: int | None) -> np.ndarray:
    try:
        array: np.ndarray = np.load(file, mmap_mode="r")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(file.parent.parent, f"{file} cannot be read: {error}") from None
    if len(array) < (rows or 0):
        raise _damaged(file.parent.parent, f"{file} has {len(array)} of {rows} rows")
    return array[:rows]


def _make_data(folder: Path, contents: Contents) -> None:
    data = folder / contents.data
    data.mkdir(parents=True, exist_ok=True)
    write_array(data / "features.npy", np.empty((0, contents.dim), contents.dtype))
    write_array(data / "images.npy", np.empty(0, IMAGE))
    (data / "paths").touch()


def _appended(
    folder: Path, contents: Contents, features: np.ndarray, images: np.ndarray, paths: Sequence[str]
) -> Contents:
    """Write rows behind those of `contents`; they count once what is returned is committed."""
    data, encoded = folder / contents.data, [os.fsencode(path) for path in paths]
    images = images.copy()
    images["path_end"] = contents.paths_end + np.cumsum([len(path) for path in encoded], dtype=np.int64)
    append_rows(data / "features.npy", features.astype(contents.dtype), contents.rows)
    append_rows(data / "images.npy", images, contents.rows)
    with (data / "paths").open("r+b") as file:
        file.seek(contents.paths_end)
        file.write(b"".join(encoded))
    flush_to_disk(data / "paths")
    end = int(images["path_end"][-1]) if len(images) else contents.paths_end
    return replace(contents, rows=contents.rows + len(images), paths_end=end)
