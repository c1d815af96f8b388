"""The metadata files of ImageNet-1k: `entries-<SPLIT>.npy`, `class-ids-<SPLIT>.npy`, `class-names-<SPLIT>.npy`."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2cli.console import few, progress
from dinov2cli.data.datasets.imagenet import FLAT_VAL, NO_CLASS, Split
from dinov2cli.data.datasets.listing import is_folder
from dinov2cli.data.prepare.labels import SOLUTION, Labels
from dinov2cli.errors import DataError
from dinov2cli.files import write_array

SCAN_THREADS = 16


class SplitListing(NamedTuple):
    """What a split's folder holds.

    layout: of the split's layouts the one that most names are of. classes: the images' numbers, by class id (that of
    the test images is empty) and file name. without_images: class folders. unexpected: paths relative to the root.
    """

    split: Split
    layout: str
    classes: dict[str, list[int]]
    without_images: list[str]
    unexpected: list[str]

    @property
    def images(self) -> int:
        return sum(map(len, self.classes.values()))


def list_split(root: Path, split: Split, val_labels: Mapping[int, str] | None = None) -> SplitListing:
    """Find a split's images. Files whose name is not of the layout are left out and listed as unexpected.

    Args:
        val_labels: class id by number, for validation images whose class is in neither their folder nor their name.

    Raises:
        DataError: the split's folder is missing, has no image, or has validation images without a class.
    """
    folder = root / split.folder
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; the layout is <root>/train/<class id>/<class id>_<n>.JPEG, "
                        "<root>/val/<class id>/ILSVRC2012_val_<8 digits>.JPEG, "
                        "<root>/test/ILSVRC2012_test_<8 digits>.JPEG")  # fmt: skip
    names = _names_in(folder)
    folders = [] if split is Split.TEST else [name for name in names if name.endswith("/")]
    with progress() as bar, ThreadPoolExecutor(SCAN_THREADS) as pool:
        found = pool.map(lambda name: [name + inside for inside in _names_in(folder / name)], folders)
        inside = list(bar.track(found, total=len(folders), description=f"Listing {split.folder}"))
    read = frozenset(folders)
    loose = [name for name in names if name not in read]
    paths = [*loose, *(path for listed in inside for path in listed)]
    listing = max((_sort_out(split, layout, paths) for layout in split.layouts), key=lambda found: found.images)
    if listing.layout == FLAT_VAL and listing.images:
        listing = listing._replace(classes=_by_labels(folder, listing.classes[""], val_labels))
    elif split is Split.VAL:  # files that stay where they were, with a link from the class folder
        linked = {f"val/{FLAT_VAL.format(number=n)}" for numbers in listing.classes.values() for n in numbers}
        listing = listing._replace(unexpected=[path for path in listing.unexpected if path not in linked])
    return listing._replace(without_images=[n[:-1] for n in folders if n[:-1] not in listing.classes])


def entries_of(listing: SplitListing, labels: Labels) -> np.ndarray:
    """Structured [actual_index <u4, class_index <u4, class_id U, class_name U], in the order of class and file name.

    Raises:
        DataError: no images, or a class folder that labels.txt does not name.
    """
    split = listing.split
    if listing.images == 0:
        seen = f"; it holds names such as {listing.unexpected[0]}" if listing.unexpected else ""
        raise DataError(f"{split.folder}/ holds no image of ImageNet's layout{seen}")
    named = [*listing.classes, *listing.without_images]
    if unknown := [class_id for class_id in named if class_id and class_id not in labels.names]:
        raise DataError(
            f"labels.txt does not name {len(unknown)} of the class folders of {split.folder}/: {few(unknown)}"
        )
    index_of = labels.class_index()
    columns = {
        "actual_index": "<u4",
        "class_index": "<u4",
        "class_id": f"U{max(map(len, listing.classes))}",
        "class_name": f"U{max(len(labels.names.get(class_id, '')) for class_id in listing.classes)}",
    }
    entries = np.empty(listing.images, dtype=np.dtype(list(columns.items())))
    start = 0
    for class_id, numbers in listing.classes.items():
        part = entries[start : start + len(numbers)]
        part["actual_index"] = numbers
        part["class_index"] = index_of[class_id] if class_id else NO_CLASS
        part["class_id"] = class_id
        part["class_name"] = labels.names.get(class_id, "")
        start += len(part)
    return entries


def metadata_files(extra: Path, split: Split) -> list[Path]:
    """The files of a split: its entries and, but for TEST, its class ids and names."""
    kinds = ["entries"] if split is Split.TEST else ["entries", "class-ids", "class-names"]
    return [extra / f"{kind}-{split.name}.npy" for kind in kinds]


def write_metadata(extra: Path, split: Split, entries: np.ndarray) -> None:
    """Write a split's files; the entries last, so that whoever finds them finds all.

    Ids and names are by class index, unicode, and empty for classes without an image.
    """
    indices, first = np.unique(entries["class_index"], return_index=True)
    for kind, column in (("class-ids", "class_id"), ("class-names", "class_name")) if split is not Split.TEST else ():
        table = np.zeros(int(indices.max()) + 1, dtype=entries[column].dtype)
        table[indices] = entries[column][first]
        write_array(extra / f"{kind}-{split.name}.npy", table)
    write_array(extra / f"entries-{split.name}.npy", entries)


def changed_since(root: Path, extra: Path, split: Split) -> bool:
    """Whether a folder of the split was changed after its metadata was written."""
    written = min(path.stat().st_mtime for path in metadata_files(extra, split))
    folder = root / split.folder
    with os.scandir(folder) as entries:
        times = [entry.stat().st_mtime for entry in entries if is_folder(entry)] if split is not Split.TEST else []
    return max([folder.stat().st_mtime, *times]) > written


def _sort_out(split: Split, layout: str, paths: list[str]) -> SplitListing:
    """Which paths, relative to the split's folder, are of a layout, and which are not."""
    number = r"(?P<number>0|[1-9]\d*)" if split is Split.TRAIN else r"(?P<number>\d{8})"
    text = re.sub(r"\\\{number[^}]*\}", lambda _: number, re.escape(layout))
    text = text.replace(r"\{class_id\}", "(?P<class_id>[^/]+)", 1).replace(r"\{class_id\}", "(?P=class_id)")
    pattern, classes, unexpected = re.compile(text), defaultdict[str, list[int]](list), []
    for path in paths:
        if found := pattern.fullmatch(path):
            classes[found.groupdict().get("class_id", "")].append(int(found["number"]))
        else:
            unexpected.append(f"{split.folder}/{path}")
    return SplitListing(split, layout, dict(sorted(classes.items())), [], unexpected)


def _by_labels(val: Path, numbers: list[int], labels: Mapping[int, str] | None) -> dict[str, list[int]]:
    if labels is None:
        raise DataError(f"{val}: the images lie in no class folders, and their names do not tell the class",
                        "--val-labels FILE sorts them; --split TRAIN prepares the others without them.")  # fmt: skip
    if unknown := [number for number in numbers if number not in labels]:
        first = FLAT_VAL.format(number=unknown[0])
        raise DataError(f"{SOLUTION} has no label for {len(unknown)} images of {val}, the first {first}")
    classes: dict[str, list[int]] = {}
    for number in sorted(numbers):
        classes.setdefault(labels[number], []).append(number)
    return dict(sorted(classes.items()))


def _names_in(folder: Path) -> list[str]:
    """What is in a folder and not hidden, sorted; folders end with a slash."""
    with os.scandir(folder) as entries:
        names = [entry.name + "/" * is_folder(entry) for entry in entries if not entry.name.startswith(".")]
    return sorted(names)
