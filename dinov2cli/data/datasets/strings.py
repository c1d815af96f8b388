"""Dataset strings: `/photos`, `SamplePhotos:split=TRAIN`, `ImageNet:split=TRAIN:root=/data:extra=/data`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dinov2cli.data.datasets.base import ImageDataset
from dinov2cli.data.datasets.folder import FolderDataset
from dinov2cli.data.datasets.sample_photos import SamplePhotos
from dinov2cli.errors import DataError


class DatasetKind(NamedTuple):
    build: Callable[..., ImageDataset]
    keys: tuple[str, ...]
    example: str


KINDS = {
    "Folder": DatasetKind(FolderDataset, ("root",), "Folder:root=/photos"),
    "SamplePhotos": DatasetKind(SamplePhotos, ("split",), "SamplePhotos:split=TRAIN"),
}


def make_dataset(dataset_string: str) -> ImageDataset:
    """The dataset that a string names: a folder of images, or `Name:key=value:key=value`.

    Raises:
        DataError: unknown name, key or split, or a dataset that cannot be read.
    """
    text = dataset_string.strip()
    if not text:
        raise DataError("the dataset is empty; give a folder of images or a dataset string", _known())
    name, _, rest = text.partition(":")
    if name not in KINDS:
        if Path(text).expanduser().is_dir():
            return FolderDataset(text)
        raise DataError(f"{text!r} is neither a folder nor a known dataset", _known())
    kind = KINDS[name]
    return kind.build(**_options(name, kind, rest))


def _options(name: str, kind: DatasetKind, text: str) -> dict[str, str]:
    options = {}
    for part in re.split(r":(?=\w+=)", text) if text else []:
        key, equals, value = part.partition("=")
        if not equals or key not in kind.keys:
            raise DataError(f"{name} has no key {key!r}; it has {', '.join(kind.keys)}", f"Example: {kind.example}")
        options[key] = value
    return options


def _known() -> str:
    return "Known datasets: " + ", ".join(kind.example for kind in KINDS.values())
