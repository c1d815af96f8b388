"""Images inside Parquet files, as Hugging Face's datasets export them."""

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov2cli.console import counted, logger
from dinov2cli.data.datasets.base import ImageDataset, PerProcess, classes_of, require_images
from dinov2cli.data.decoding import UnreadableImage, read_file
from dinov2cli.errors import DataError, EnvironmentProblem
from dinov2cli.files import user_path

if TYPE_CHECKING:
    import pyarrow.parquet as pq

GROUPS_KEPT = 4
"""Row groups that a process keeps in memory: what is read at once."""
LARGE_GROUP = 200
"""Images of a row group from which on reading them at random is slow."""
_PARQUET = re.compile(r"[^.].*\.parquet", re.IGNORECASE)
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(-\w+)?\.parquet")


class ParquetDataset(ImageDataset):
    """The images in the Parquet files of a folder (or of its `data/`), or in one file.

    A column of images holds files, as bytes or as a struct with `bytes`, or else the `path` of a file beside; classes
    are a column of integers, whose names are taken from what Hugging Face's datasets write beside, or of text.

    Args:
        root: the folder or the file.
        split: of files `<split>-00000-of-00012.parquet` those of one split.
        image, label: the columns; by default the first that holds images, and `label` or the first of whole numbers.

    Raises:
        DataError: no such files, several splits, or no column of images.
        EnvironmentProblem: pyarrow is not installed.
    """

    def __init__(
        self, root: str | Path, split: str | None = None, image: str | None = None, label: str | None = None
    ) -> None:
        self.root = user_path(root)
        self.files = _files_of(self.root, split)
        self.split = split or next(iter(splits_of(self.files)), "")
        self._rows = PerProcess(partial(_read_rows, PerProcess(open_parquet, GROUPS_KEPT)), GROUPS_KEPT)
        first = open_parquet(self.files[0])
        self.image_column = image or _image_column(self.files[0], first)
        self.label_column = label or _label_column(first)
        ends, labels = [], []
        for number, file in enumerate(self.files):
            parquet = open_parquet(file)
            for name in filter(None, (self.image_column, self.label_column)):
                if name not in parquet.schema_arrow.names:
                    raise DataError(f"{file} has no column {name!r}; it has {', '.join(parquet.schema_arrow.names)}")
            rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
            ends += [(number, group, count) for group, count in enumerate(rows)]
            if self.label_column:
                try:
                    column = parquet.read(columns=[self.label_column], use_threads=False)[self.label_column]
                except (OSError, ValueError) as error:
                    raise DataError(f"{file}: damaged in column {self.label_column!r} ({error})") from error
                labels += column.to_pylist()
        table = np.array(ends, np.int64).reshape(-1, 3)
        self._file, self._group, self._ends = table[:, 0], table[:, 1], np.cumsum(table[:, 2])
        require_images(len(self), str(self.root))
        if (largest := int(table[:, 2].max())) > LARGE_GROUP:
            logger.info("%s: an image is read with its row group of up to %d", self.root, largest)
        self.class_names, self._classes = classes_of(
            labels or [None] * len(self),
            _class_names(first, self.label_column),
            where=f"{self.root}: column {self.label_column!r}",
        )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def encoded(self, index: int) -> bytes:
        self._check_index(index)
        group = int(np.searchsorted(self._ends, index, side="right"))
        try:
            rows = self._rows(self.files[int(self._file[group])], int(self._group[group]), self.image_column)
        except (OSError, ValueError, DataError) as error:
            raise UnreadableImage(self.path(index), f"cannot be read ({error})") from error
        value = rows[index - (int(self._ends[group - 1]) if group else 0)].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            return read_file(str(self.files[int(self._file[group])].parent / value["path"]))
        if not isinstance(content, bytes):
            raise UnreadableImage(self.path(index), "the row holds no image's bytes")
        return content

    def path(self, index: int) -> str:
        self._check_index(index)
        first = int(np.searchsorted(self._file, self._file_of(index)))
        return f"{self.container(index)}:row {index - (int(self._ends[first - 1]) if first else 0)}"

    def container(self, index: int) -> str:
        return str(self.files[self._file_of(index)])

    def _file_of(self, index: int) -> int:
        return int(self._file[np.searchsorted(self._ends, index, side="right")])

    def describe(self) -> str:
        classes = (
            f"{len(self.class_names)} classes by column {self.label_column!r}" if self.class_names else "no labels"
        )
        split = f" ({self.split})" if self.split else ""
        what = f"{len(self.files)} Parquet file{'s' * (len(self.files) > 1)}{split} in {self.root}"
        return f"{what}: {counted(len(self), 'image')} in column {self.image_column!r}, {classes}"


def open_parquet(file: Path) -> "pq.ParquetFile":
    """A Parquet file, read without threads of its own, which a forked process would wait for."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise EnvironmentProblem(f"{file}: Parquet files need pyarrow", "pip install 'dinov2cli[parquet]'") from None
    try:
        return pq.ParquetFile(file, memory_map=True, pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file}: not a Parquet file ({error})") from error


def _read_rows(opened: "PerProcess[pq.ParquetFile]", file: Path, group: int, column: str) -> Any:
    return opened(file).read_row_group(group, [column], use_threads=False)[column].combine_chunks()


def parquet_files(root: Path) -> list[Path]:
    """The Parquet files of a folder or, if it has none, of its `data/`."""
    places = [folder for folder in (root, root / "data") if folder.is_dir()]
    here = (sorted(each for each in place.iterdir() if _PARQUET.fullmatch(each.name)) for place in places)
    return next(filter(None, here), [])


def splits_of(files: list[Path]) -> dict[str, list[Path]]:
    """The files that are shards of a split, by its name."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        if found := _SHARD.fullmatch(file.name):
            splits.setdefault(found["split"], []).append(file)
    return splits


def holds_images(file: Path) -> bool:
    """Whether a Parquet file has a column of images, and is not a table of their paths."""
    return bool(_candidates(open_parquet(file)))


def _files_of(root: Path, split: str | None) -> list[Path]:
    files = [root] if os.path.isfile(root) else parquet_files(root)
    if not files:
        raise DataError(f"{root} holds no .parquet files")
    splits = splits_of(files)
    if split is not None:
        if split not in splits:
            raise DataError(f"{root} has no split {split!r}; it has {', '.join(splits) or 'none'}")
        return splits[split]
    if len(splits) > 1:
        raise DataError(f"{root} holds the splits {', '.join(splits)}",
                        f"Choose one: Parquet:root={root}:split={next(iter(splits))}")  # fmt: skip
    return files


def _candidates(parquet: "pq.ParquetFile") -> list[str]:
    import pyarrow.types as types

    def holds(of: Any) -> bool:
        if types.is_struct(of):
            return bool(of.get_field_index("bytes") >= 0)
        return bool(types.is_binary(of) or types.is_large_binary(of))

    return [field.name for field in parquet.schema_arrow if holds(field.type)]


def _image_column(file: Path, parquet: "pq.ParquetFile") -> str:
    if not (found := _candidates(parquet)):
        raise DataError(f"{file}: no column holds images as bytes; it has {', '.join(parquet.schema_arrow.names)}",
                        f"For a table of paths: Table:file={file}")  # fmt: skip
    return found[0]


def _label_column(parquet: "pq.ParquetFile") -> str:
    import pyarrow.types as types

    fields = {field.name: field.type for field in parquet.schema_arrow}
    numbers = [name for name, of in fields.items() if types.is_integer(of)]
    return "label" if "label" in fields else numbers[0] if len(numbers) == 1 else ""


def _class_names(parquet: "pq.ParquetFile", column: str) -> list[str]:
    written = (parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        return list(json.loads(written)["info"]["features"][column]["names"])
    except (ValueError, KeyError, TypeError):
        return []
