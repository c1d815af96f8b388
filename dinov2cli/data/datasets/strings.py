"""Dataset strings: `/photos`, `SamplePhotos:split=TRAIN`, `ImageNet:split=TRAIN:root=/data:extra=/data`, joined by +.

Grammar: `[weight*]dataset + [weight*]dataset ...` where a dataset is a path, `folder:PATH`, `csv:PATH` or the like, or
`Name:key=value:key=value`. A value or path may hold ':' '=' and '+'; where that could be read in two ways, put it in
quotes.
"""

import inspect
import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from dinov2cli.data.datasets.base import ImageDataset
from dinov2cli.data.datasets.folder import FolderDataset
from dinov2cli.data.datasets.imagenet import ImageNet
from dinov2cli.data.datasets.imagenet22k import ImageNet22k
from dinov2cli.data.datasets.joined import JoinedDataset
from dinov2cli.data.datasets.parquet import ParquetDataset
from dinov2cli.data.datasets.recognise import recognise
from dinov2cli.data.datasets.sample_photos import SamplePhotos
from dinov2cli.data.datasets.shards import ArchiveDataset, ShardsDataset
from dinov2cli.data.datasets.table import TableDataset
from dinov2cli.errors import DataError


class DatasetKind(NamedTuple):
    """A dataset by name; its constructor's parameters are its keys."""

    build: Callable[..., ImageDataset]
    example: str


KINDS = {
    "Archive": DatasetKind(ArchiveDataset, "Archive:file=/photos.zip"),
    "Folder": DatasetKind(FolderDataset, "Folder:root=/photos"),
    "ImageNet": DatasetKind(ImageNet, "ImageNet:split=TRAIN:root=/imagenet:extra=/imagenet-extra"),
    "ImageNet22k": DatasetKind(ImageNet22k, "ImageNet22k:root=/imagenet22k:extra=/imagenet22k-extra"),
    "Parquet": DatasetKind(ParquetDataset, "Parquet:root=/export:split=train"),
    "SamplePhotos": DatasetKind(SamplePhotos, "SamplePhotos:split=TRAIN"),
    "Shards": DatasetKind(ShardsDataset, "Shards:root=/shards"),
    "Table": DatasetKind(TableDataset, "Table:file=/photos.csv:path=image:label=species"),
}
SHORT = {"folder": "Folder", "archive": "Archive", "csv": "Table", "parquet": "Parquet", "shards": "Shards"}
"""`name:PATH`, for what a path is to be taken for, whatever it looks like."""

_KNOWN = "Known datasets: a folder, " + ", ".join(kind.example for kind in KINDS.values())

# A quoted piece starts where a value can start and ends where one can end, so a path may hold an apostrophe.
_QUOTED = re.compile(r"""(?<![^\s=*+])("[^"]*"|'[^']*')(?=$|[\s:+])""")
_PLUS = re.compile(rf"\s+\+\s+|\+(?=(?:[\d.]+\s*\*\s*)?(?:{'|'.join((*KINDS, *SHORT))})(?:[:\s+]|$))")
_WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+)\s*\*\s*")


def make_dataset(dataset_string: str) -> ImageDataset:
    """The dataset that a string names.

    A path, of which `recognise` tells what it holds, `folder:PATH` and its like (`SHORT`), or
    `Name:key=value:key=value`; several of these joined by `+`, each with an optional weight `2*`.

    Raises:
        DataError: unknown name, key or split, or a dataset that cannot be read.
    """
    text = dataset_string.strip()
    if not text:
        raise DataError("the dataset is empty; give a folder of images or a dataset string", _KNOWN)
    if os.path.exists(path := os.path.expanduser(text)):
        return recognise(Path(path))
    parts, weights = [], []
    for part in _split(text, _PLUS):
        weight = _WEIGHT.match(part)
        weights.append(float(weight[1]) if weight else 1.0)
        parts.append(_one_dataset(part[weight.end() :] if weight else part))
    if min(weights) <= 0:
        raise DataError(f"{text!r}: weights are above 0")
    return parts[0] if len(parts) == 1 else JoinedDataset(parts, weights)


def _one_dataset(text: str) -> ImageDataset:
    name, _, rest = text.partition(":")
    if name in KINDS:
        kind = KINDS[name]
        return kind.build(**_options(name, kind, rest))
    if name in SHORT and rest:
        kind = KINDS[SHORT[name]]
        first, *_ = inspect.signature(kind.build).parameters
        return kind.build(**_options(SHORT[name], kind, f"{first}={rest}"))
    if os.path.exists(path := os.path.expanduser(_unquoted(text))):
        return recognise(Path(path))
    close = get_close_matches(name, KINDS, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise DataError(f"{_unquoted(text)!r} is neither a folder nor a known dataset{meant}", _KNOWN)


def _options(name: str, kind: DatasetKind, text: str) -> dict[str, str]:
    parameters = inspect.signature(kind.build).parameters
    example = f"Example: {kind.example}"
    options: dict[str, str] = {}
    for part in _split(text, re.compile(rf":(?=(?:{'|'.join(parameters)})=)")) if text else []:
        key, equals, value = part.partition("=")
        if not equals or key not in parameters:
            raise DataError(f"{name} has no key {key!r}; it has {', '.join(parameters)}", example)
        if key in options:
            raise DataError(f"{name}: {key} is given twice", example)
        options[key] = _unquoted(value)
    missing = [key for key, p in parameters.items() if p.default is p.empty and not options.get(key)]
    if missing:
        raise DataError(f"{name} needs {' and '.join(f'{key}=...' for key in missing)}", example)
    return options


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Pieces of `text` between separators that are not quoted, stripped."""
    masked = _QUOTED.sub(lambda quoted: "_" * len(quoted[0]), text)
    edges = [0, *(edge for found in separator.finditer(masked) for edge in found.span()), len(text)]
    return [text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
