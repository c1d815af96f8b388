"""The dataset that a string names; `dinov2cli.data.spelling` has the grammar."""

import inspect
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from dinov2cli.data.datasets.arrays import ArraysDataset
from dinov2cli.data.datasets.base import ImageDataset
from dinov2cli.data.datasets.dense_layouts import ADE20k, Cityscapes, Depths, Kitti, Masks, NYUd, PascalVOC
from dinov2cli.data.datasets.folder import FolderDataset
from dinov2cli.data.datasets.image_list import ROWS_OF, PathsDataset, lines_of, rows_of
from dinov2cli.data.datasets.imagenet import ImageNet, ImageNet22k
from dinov2cli.data.datasets.joined import JoinedDataset
from dinov2cli.data.datasets.listing import image_extensions
from dinov2cli.data.datasets.parquet import ParquetDataset
from dinov2cli.data.datasets.recognise import check_layout, recognise
from dinov2cli.data.datasets.sample_photos import SamplePhotos
from dinov2cli.data.datasets.shards import ArchiveDataset, ShardsDataset
from dinov2cli.data.datasets.table import TableDataset
from dinov2cli.data.spelling import EXAMPLES, KNOWN, SHORT, complete, inside, joined, options_of, unquoted
from dinov2cli.errors import DataError, did_you_mean
from dinov2cli.files import user_path
from dinov2cli.site import read_site


class DatasetKind(NamedTuple):
    """A dataset by name; its constructor's parameters are its keys."""

    build: Callable[..., ImageDataset]
    example: str

    def parameters(self) -> Collection[str]:
        """What may be said of it."""
        return inspect.signature(self.build).parameters


def _of_list(file: str, root: str | None = None) -> ImageDataset:
    """The images that a list names (`image_list`): files, or rows of the dataset that its first line names.

    Args:
        file: the list, UTF-8.
        root: where relative paths begin; by default the list's folder.

    Raises:
        DataError: no such file, or what is in it is not there.
    """
    path = user_path(file)
    first = next(lines_of(path), "")
    if first.startswith(ROWS_OF):
        try:
            base = make_dataset(first.removeprefix(ROWS_OF))
        except RecursionError:
            raise DataError(f"{path}: a list of rows of itself") from None
        if isinstance(base, JoinedDataset) and base.is_weighted():
            raise DataError(f"{path}: a list names each image once: leave out the weights of its first line",
                            "A list as a whole may have one: 2*list:FILE + OTHER")  # fmt: skip
        return rows_of(base, path)
    return PathsDataset(path, user_path(root) if root else path.parent)


KINDS = {
    "Archive": DatasetKind(ArchiveDataset, EXAMPLES["Archive"]),
    "Arrays": DatasetKind(ArraysDataset, EXAMPLES["Arrays"]),
    "Folder": DatasetKind(FolderDataset, EXAMPLES["Folder"]),
    "ImageNet": DatasetKind(ImageNet, EXAMPLES["ImageNet"]),
    "ImageNet22k": DatasetKind(ImageNet22k, EXAMPLES["ImageNet22k"]),
    "List": DatasetKind(_of_list, EXAMPLES["List"]),
    "Parquet": DatasetKind(ParquetDataset, EXAMPLES["Parquet"]),
    "SamplePhotos": DatasetKind(SamplePhotos, EXAMPLES["SamplePhotos"]),
    "Shards": DatasetKind(ShardsDataset, EXAMPLES["Shards"]),
    "Table": DatasetKind(TableDataset, EXAMPLES["Table"]),
    "ADE20k": DatasetKind(ADE20k, EXAMPLES["ADE20k"]),
    "Cityscapes": DatasetKind(Cityscapes, EXAMPLES["Cityscapes"]),
    "Depths": DatasetKind(Depths, EXAMPLES["Depths"]),
    "KITTI": DatasetKind(Kitti, EXAMPLES["KITTI"]),
    "Masks": DatasetKind(Masks, EXAMPLES["Masks"]),
    "NYUd": DatasetKind(NYUd, EXAMPLES["NYUd"]),
    "VOC": DatasetKind(PascalVOC, EXAMPLES["VOC"]),
}


def make_dataset(dataset_string: str) -> ImageDataset:
    """The dataset that a string names.

    A path, of which `recognise` tells what it holds, `folder:PATH` and its like (`SHORT`), or
    `Name:key=value:key=value`; several of these joined by `+`, each with an optional weight `2*`.

    Raises:
        DataError: unknown name, key or split, or a dataset that cannot be read.
    """
    text = complete(dataset_string)
    if os.path.exists(path := os.path.expanduser(text)):
        return recognise(Path(path))
    parts = [(float(weight or 1), _one_dataset(part)) for weight, part in joined(text)]
    if min(weight for weight, _ in parts) <= 0:
        raise DataError(f"{text!r}: weights are above 0")
    return parts[0][1] if len(parts) == 1 else JoinedDataset([part for _, part in parts], [each for each, _ in parts])


def check_dataset(dataset_string: str, split: str | None = None) -> None:
    """Raise what `make_dataset` would for the string itself, for folders that are not there, and by `check_layout`.

    No images are listed.

    Args:
        split: that of an ImageNet for which none is said.
    """
    text = complete(dataset_string, split)
    if os.path.exists(path := os.path.expanduser(text)):
        return check_layout(Path(path))
    for weight, part in joined(text):
        name = part.partition(":")[0]
        if weight is not None and float(weight) <= 0:
            raise DataError(f"{text!r}: weights are above 0")
        _, options = _kind_of(part) or ("", {})
        place = options.get("root") or options.get("file")
        if place and not os.path.exists(os.path.expanduser(unquoted(place))):
            raise DataError(f"{part}: there is no {place}")
        is_read_at_once = name in ("ImageNet", "ImageNet22k", "SamplePhotos")
        if not is_read_at_once and not place and os.path.exists(path := os.path.expanduser(unquoted(part))):
            check_layout(Path(path))
        elif is_read_at_once or not place:
            _one_dataset(part)


def _one_dataset(text: str) -> ImageDataset:
    if found := _kind_of(text):
        kind, options = found
        return KINDS[kind].build(**options)
    if os.path.exists(path := os.path.expanduser(unquoted(text))):
        return recognise(Path(path))
    if os.path.splitext(text)[1].lower() in image_extensions():
        raise DataError(f"{unquoted(text)}: there is no such file")
    name = text.partition(":")[0]
    own = read_site().settings.datasets.keys() - KINDS.keys()
    meant = did_you_mean(name, [*KINDS, *own])
    known = "".join(f", {each}" for each in sorted(own))
    raise DataError(f"{unquoted(text)!r} is neither a folder nor a known dataset{meant}", KNOWN + known)


def _kind_of(text: str) -> tuple[str, dict[str, str]] | None:
    """The kind of dataset that a string names, with its options."""
    if (place := inside(unquoted(text))) and text.partition(":")[0] not in KINDS:
        return "Arrays", {"file": place.file, "path": place.path}
    name, _, rest = text.partition(":")
    if name in SHORT and rest:
        name = SHORT[name]
        first, *_ = inspect.signature(KINDS[name].build).parameters
        rest = f"{first}={rest}"
    return (name, _options(name, rest)) if name in KINDS else None


def _options(name: str, text: str) -> dict[str, str]:
    build, example = KINDS[name]
    parameters = inspect.signature(build).parameters
    options = options_of(name, text, parameters, example)
    missing = [key for key, p in parameters.items() if p.default is p.empty and not options.get(key)]
    if missing:
        raise DataError(f"{name} needs {' and '.join(f'{key}=...' for key in missing)}", f"Example: {example}")
    return options
