"""Dataset strings as text: `/photos`, `SamplePhotos:split=TRAIN`, `ImageNet:split=TRAIN:root=/data`, joined by +.

Grammar: `[weight*]dataset + [weight*]dataset ...` where a dataset is a path, `folder:PATH`, `csv:PATH` or the like,
`cells.h5::/images`, or `Name:key=value:key=value`. A value or path may hold ':' '=' and '+'; where that could be read
in two ways, put it in quotes. ImageNet without a root, and names of one's own, are looked up in the site's file
(`dinov2cli.site`). Imports no torch.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from dinov2cli.errors import DataError
from dinov2cli.site import Place, Site, read_site, shown

EXAMPLES = {
    "Archive": "Archive:file=/photos.zip",
    "Arrays": "Arrays:file=/cells.h5:path=/images:label=/labels:axes=NHWC",
    "Folder": "Folder:root=/photos",
    "ImageNet": "ImageNet:split=TRAIN:root=/imagenet:extra=/imagenet-extra",
    "ImageNet22k": "ImageNet22k:root=/imagenet22k:extra=/imagenet22k-extra",
    "List": "List:file=/chosen.txt",
    "Parquet": "Parquet:root=/export:split=train",
    "SamplePhotos": "SamplePhotos:split=TRAIN",
    "Shards": "Shards:root=/shards",
    "Table": "Table:file=/photos.csv:path=image:label=species",
}
"""The datasets there are by name (`data.datasets.strings.KINDS`)."""
KNOWN = "Known datasets: a folder, " + ", ".join(EXAMPLES.values())
EXAMPLES |= {  # with labels for every pixel
    "ADE20k": "ADE20k:root=/ade:split=TRAIN",
    "Cityscapes": "Cityscapes:root=/cityscapes:split=TRAIN",
    "Depths": "Depths:images=/room/images:depths=/room/depth:scale=1000",
    "KITTI": "KITTI:root=/kitti:split=TRAIN",
    "Masks": "Masks:images=/cells/images:masks=/cells/masks:classes=4",
    "NYUd": "NYUd:root=/nyu:split=TRAIN",
    "VOC": "VOC:root=/VOC2012:split=TRAIN",
}
SHORT = {
    "folder": "Folder", "archive": "Archive", "csv": "Table", "list": "List", "parquet": "Parquet", "shards": "Shards"
}  # fmt: skip
"""`name:PATH`, for what a path is to be taken for, whatever it looks like."""
PLACES = ("root", "extra", "file", "images", "masks", "depths", "names")
"""Keys whose values are paths."""
IMAGENETS = {"ImageNet": ("split", "root", "extra"), "ImageNet22k": ("root", "extra")}
"""Those that `dino2 prepare-imagenet` makes known, with their keys."""

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".h5ad", ".he5", ".nxs")
ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")
"""One of these lies in a folder that Zarr has made."""

_INSIDE = re.compile(r"(?P<file>.+?)::(?P<path>[^\[\]]*)(\[(?P<image>\d+)\])?")
# A quoted piece starts where a value can start and ends where one can end, so a path may hold an apostrophe.
_QUOTED = re.compile(r"""(?<![^\s=*+])("[^"]*"|'[^']*')(?=$|[\s:+])""")
_PLUS = re.compile(rf"\s+\+\s+|\+(?=(?:[\d.]+\s*\*\s*)?(?:{'|'.join((*EXAMPLES, *SHORT))})(?:[:\s+]|$))")
_WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+)\s*\*\s*")


def complete(dataset_string: str, split: str | None = None) -> str:
    """The string with the places of known datasets written out, so that it means the same on every machine.

    Args:
        split: that of an ImageNet for which none is said.

    Raises:
        DataError: an ImageNet whose root is neither said nor known, or gone; a name that is a folder here, too.
        ConfigError: the site's file is wrong.
    """
    text = dataset_string.strip()
    if "\0" in text:
        raise DataError(f"{text!r}: no folder or dataset has a NUL in its name", KNOWN)
    if not text:
        raise DataError("the dataset is empty; give a folder of images or a dataset string", KNOWN)
    site, parts = read_site(), []
    if text not in site.settings.datasets and os.path.exists(os.path.expanduser(text)):
        return text  # whatever its name holds
    for weight, part in joined(text):
        parts.append(("" if weight is None else f"{weight}*") + _complete_one(part, split, site))
    return " + ".join(parts)


def _complete_one(text: str, split: str | None, site: Site) -> str:
    name, _, rest = text.partition(":")
    known, file = site.settings.datasets.get(name), site.sources.get(f"datasets.{name}")
    if name not in IMAGENETS:
        if known is None:
            return text
        if rest or isinstance(known, Place):
            raise DataError(f"{text}: {name}, as {shown(file or '')} knows it, takes no keys", f"It is {known}.")
        if os.path.isdir(folder := Path(text)) and folder.absolute() != Path(known):
            problem = f"{name} is a folder here, and in {shown(file or '')} the name of {known}"
            raise DataError(problem, f"Write ./{name} or {known}.")
        if Path(known).is_absolute() and not os.path.exists(known):
            raise gone(name, known, file)
        return known
    options = options_of(name, rest, IMAGENETS[name], EXAMPLES[name])
    lacks_split = split and "split" in IMAGENETS[name] and not options.get("split")
    if options.get("root") and not lacks_split:
        return text
    if lacks_split:
        options["split"] = str(split)
    if not options.get("root"):
        if not isinstance(known, Place):
            raise _unknown(name, site)
        if not os.path.isdir(known.root):
            raise gone(name, known.root, file)
        options = {**known.model_dump(exclude_none=True), **options}
    given = (f"{key}={quoted(options[key])}" for key in IMAGENETS[name] if key in options)
    return ":".join((name, *given))


def absolute(text: str) -> str:
    """The string with its paths from the root on, so that it means the same in every working folder."""
    if os.path.exists(path := os.path.expanduser(text)):
        return os.path.abspath(path)
    return " + ".join(("" if weight is None else f"{weight}*") + _absolute_one(part) for weight, part in joined(text))


def _absolute_one(text: str) -> str:
    def placed(value: str) -> str:
        path = os.path.expanduser(unquoted(value))
        return quoted(os.path.abspath(path)) if os.path.exists(path) else value

    name, _, rest = text.partition(":")
    if name in SHORT and rest:
        return f"{name}:{placed(rest)}"
    if name not in EXAMPLES:
        file, colons, path = unquoted(text).partition("::")
        return f"{unquoted(placed(file))}::{path}" if colons and inside(unquoted(text)) else placed(text)
    parts = [part.partition("=") for part in _split(rest, re.compile(r":(?=\w+=)"))] if rest else []
    given = [f"{key}={placed(value) if key in PLACES else value}" for key, _, value in parts]
    return ":".join((name, *given))


class Inside(NamedTuple):
    """Where an array lies: in which file, at which path, and which of a stack's images is meant."""

    file: str
    path: str
    image: int | None


def inside(text: str) -> Inside | None:
    """What `FILE::PATH` or `FILE::PATH[IMAGE]` names; None for another text."""
    if (found := _INSIDE.fullmatch(text)) is None or not holds_arrays(found["file"]):
        return None
    return Inside(found["file"], found["path"].strip("/"), int(found["image"]) if found["image"] else None)


def holds_arrays(file: str) -> bool:
    """Whether a file, or a folder of Zarr's, holds arrays by path; by its name, where it is not there."""
    file = os.path.expanduser(file)
    if file.lower().endswith((*HDF5_SUFFIXES, ".zarr")):
        return True
    return any(os.path.isfile(os.path.join(file, name)) for name in ZARR_FILES)


def gone(name: str, place: str, file: Path | None) -> DataError:
    """The error of a known dataset that is not where it was."""
    return DataError(
        f"{name}: {place}, where it lies by {shown(file or '')}, is not there",
        f"Mount it; or dino2 datasets add {name} FOLDER --overwrite, or dino2 datasets remove {name}.",
    )


def _unknown(name: str, site: Site) -> DataError:
    variant = " --variant 22k" if name == "ImageNet22k" else ""
    remedy = f"dino2 prepare-imagenet{variant} --root ROOT makes it known; or write {name}:root=ROOT:extra=EXTRA."
    other = site.settings.datasets.get("ImageNet")
    if variant and isinstance(other, Place):
        remedy = f"To train on the ImageNet-1k in {other.root}: --data ImageNet\nElse {remedy}"
    return DataError(f"{name} needs root=...: where it lies is not known here", remedy)


def joined(text: str) -> list[tuple[str | None, str]]:
    """The datasets that are joined by `+`, each after its weight, if it has one."""
    found = [(_WEIGHT.match(part), part) for part in _split(text, _PLUS)]
    return [(weight[1], part[weight.end() :]) if weight else (None, part) for weight, part in found]


def options_of(name: str, text: str, keys: Collection[str], example: str) -> dict[str, str]:
    """`key=value:key=value` by key; DataError for a key that the dataset has not, or one that is given twice."""
    example = f"Example: {example}"
    options: dict[str, str] = {}
    for part in _split(text, re.compile(rf":(?=(?:{'|'.join(keys)})=)")) if text else []:
        key, equals, value = part.partition("=")
        if not equals or key not in keys:
            raise DataError(f"{name} has no key {key!r}; it has {', '.join(keys)}", example)
        if key in options:
            raise DataError(f"{name}: {key} is given twice", example)
        options[key] = unquoted(value)
    return options


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Pieces of `text` between separators that are not quoted, stripped."""
    masked = _QUOTED.sub(lambda quoted: "_" * len(quoted[0]), text)
    edges = [0, *(edge for found in separator.finditer(masked) for edge in found.span()), len(text)]
    return [text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True)]


def unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def quoted(value: str) -> str:
    """A value or path as it stands in a dataset string, in quotes where it could be read in two ways."""
    return f'"{value}"' if set(value) & set(" :=+") else value
