"""What a path holds: folders, archives, tables or Parquet files of images, and what only looks like classes."""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from dinov2cli.console import logger
from dinov2cli.data.datasets.arrays import ArraysDataset
from dinov2cli.data.datasets.base import ImageDataset
from dinov2cli.data.datasets.folder import FolderDataset
from dinov2cli.data.datasets.imagenet import data_root
from dinov2cli.data.datasets.listing import image_extensions, is_folder
from dinov2cli.data.datasets.parquet import ParquetDataset, holds_images, parquet_files
from dinov2cli.data.datasets.shards import COMPRESSED, ArchiveDataset, ShardsDataset
from dinov2cli.data.datasets.table import DELIMITERS, TableDataset
from dinov2cli.data.spelling import HDF5_SUFFIXES, holds_arrays
from dinov2cli.errors import DataError

TRAIN = {"train", "training"}  # train_set, Training-Set and trainset are such, too
OTHERS = {"val", "valid", "validation", "test", "testing", "dev", "eval"}
"""Names of folders that, beside one of `TRAIN`, are parts of a dataset and not classes."""
MANY = 1000
"""Entries of a folder up to which `check_layout` looks at it: one with more is no set of parts."""
FILES = (".tar", ".zip", ".parquet", ".h5", ".hdf5", *DELIMITERS)
"""Of files that hold a dataset."""
LISTS = (".txt", ".lst", ".list")


def recognise(path: Path) -> ImageDataset:
    """The dataset that a file or a folder holds.

    Raises:
        DataError: it holds none, or looks like one of several things; the message says which, and how to say so.
    """
    return of_folder(path) if path.is_dir() else of_file(path)


def is_dataset_file(file: str | Path) -> bool:
    """Whether a file, by its name, holds a dataset and not one image."""
    return str(file).lower().endswith((*FILES, *COMPRESSED, *HDF5_SUFFIXES))


def of_file(file: Path) -> ImageDataset:
    """The dataset in an archive, a table or a Parquet file."""
    if not is_dataset_file(file):
        raise DataError(
            f"{file} is a file that is no dataset; datasets are folders and {', '.join(FILES)} files",
            f"If it is a list of image files: list:{file}" if file.suffix.lower() in LISTS else None,
        )
    suffix = file.suffix.lower()
    if suffix in HDF5_SUFFIXES:
        return ArraysDataset(str(file))
    if suffix == ".parquet" and holds_images(file):
        return ParquetDataset(str(file))
    if suffix in (".parquet", *DELIMITERS):
        return TableDataset(str(file))
    archive = ArchiveDataset(file)
    if parts := _parts_among(archive.class_names):
        raise DataError(
            f"{file} holds {' and '.join(parts)}, which are parts of a dataset rather than classes",
            f"Unpack it and give one of them; or archive:{file} for all images, with these as classes.",
        )
    return archive


def check_layout(path: Path) -> None:
    """Raise what `recognise` would for a file that is no dataset, and for a folder of parts or of nothing.

    Only the path itself is looked at, and of a folder that holds a single one, that.
    """
    if not path.is_dir():
        if not is_dataset_file(path):
            of_file(path)
        return
    folders, files = _content(path, MANY)
    if holds_arrays(str(path)) or len(folders) + len(files) > MANY:
        return
    _refuse_parts(path, folders)
    endings = (*image_extensions(), *FILES, *COMPRESSED, *HDF5_SUFFIXES)
    if any(name.lower().endswith(endings) for name in files):
        return
    if not folders:
        FolderDataset(path)
    elif len(folders) == 1 and len(_content(inner := path / folders[0])[0]) > 1:
        check_layout(inner)


def _content(folder: Path, at_most: int | None = None) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder, sorted; not many more than `at_most`."""
    with os.scandir(folder) as entries:
        visible = (entry for entry in entries if not entry.name.startswith("."))
        found = {entry.name: is_folder(entry) for entry in islice(visible, None if at_most is None else at_most + 1)}
    return sorted(name for name in found if found[name]), sorted(name for name in found if not found[name])


def of_folder(folder: Path) -> ImageDataset:
    """The dataset in a folder. What is found in it, if it is not simply images, is logged."""
    if holds_arrays(str(folder)):
        return ArraysDataset(str(folder))
    folders, files = _content(folder)
    _refuse_parts(folder, folders)
    if any(os.path.splitext(name)[1].lower() in image_extensions() for name in files):
        return FolderDataset(folder)
    if any(name.lower().endswith(".tar") for name in files):
        return ShardsDataset(folder)
    if parquet_files(folder) and set(folders) <= {"data"}:
        return ParquetDataset(folder)
    if len(folders) == 1 and len(_content(folder / folders[0])[0]) > 1:
        inner = folder / folders[0]
        logger.info(
            "%s holds one folder alone: the folders in %s are the classes (folder:%s: one class)", folder, inner, folder
        )
        return of_folder(inner)
    archives = [name for name in files if name.lower().endswith((".zip", *COMPRESSED))]
    tables = [name for name in files if os.path.splitext(name)[1].lower() in (*DELIMITERS, *HDF5_SUFFIXES)]
    if not folders and len(archives) == 1:
        logger.info("%s: the images are those of %s in it", folder, archives[0])
        return ArchiveDataset(folder / archives[0])
    if not folders and (archives or tables):
        raise DataError(f"no images found in {folder}; it holds {', '.join((archives + tables)[:5])}",
                        f"Give the file: {folder / (archives + tables)[0]}")  # fmt: skip
    return FolderDataset(folder)


def _refuse_parts(folder: Path, folders: list[str]) -> None:
    """Raise for a folder whose subfolders are train, val and test: as classes they would mean nothing."""
    if data_root(folder) != folder:
        raise DataError(
            f"{folder} is ImageNet as Kaggle gives it, with its parts in {data_root(folder)}", _imagenet(folder)
        )
    if not (parts := _parts_among(folders)):
        return
    train = folder / parts[0]
    if any(name.startswith("n") and name[1:].isdigit() and len(name) == 9 for name in _content(train)[0]):
        raise DataError(
            f"{folder} is the root of an ImageNet: {' and '.join(parts)} are parts, not classes", _imagenet(folder)
        )
    raise DataError(
        f"{folder} holds {' and '.join(parts)}, which are parts of a dataset rather than classes",
        f"Give one of them, such as {train}; or folder:{folder} for all images, with these as classes.",
    )


def _parts_among(names: Sequence[str]) -> list[str]:
    """Those that are parts of a dataset, the training set first; none where that or any other is not there."""
    bare = {name: name.lower().removesuffix("set").rstrip("_- ") for name in names}
    trains, others = ([name for name in names if bare[name] in kind] for kind in (TRAIN, OTHERS))
    return trains + others if trains and others else []


def _imagenet(root: Path) -> str:
    extra = f"dino2 prepare-imagenet --root {root}, and then ImageNet:split=TRAIN:root={root}"
    return f"{extra}; or folder:{data_root(root) / 'train'}"
