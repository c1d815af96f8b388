"""The metadata files of ImageNet-1k: `entries-<SPLIT>.npy`, `class-ids-<SPLIT>.npy`, `class-names-<SPLIT>.npy`."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2cli.console import progress
from dinov2cli.data.datasets.imagenet import NO_CLASS, Split
from dinov2cli.data.prepare.labels import Labels
from dinov2cli.errors import DataError
from dinov2cli.files import write_array

SCAN_THREADS = 16


class ClassListing(NamedTuple):
    """One class folder (or the test folder, with an empty id): the images' numbers, by file name, and the rest."""

    class_id: str
    actual_indices: list[int]
    unexpected: list[str]


class SplitListing(NamedTuple):
    """What a split's folder holds."""

    split: Split
    classes: list[ClassListing]
    unexpected: list[str]  # paths relative to the root

    @property
    def images(self) -> int:
        return sum(len(listing.actual_indices) for listing in self.classes)


class Prepared(NamedTuple):
    """What became of a split. `written` false: its files were there already, `stale`: older than its folders."""

    split: Split
    images: int
    files: list[Path]
    written: bool
    stale: bool
    unexpected: list[str]


def prepare_split(root: Path, extra: Path, split: Split, labels: Labels, *, force: bool = False) -> Prepared:
    """Write a split's metadata files, unless they are there and not to be forced.

    Raises:
        DataError: no folder, no images, or a class that `labels` does not name.
    """
    files = metadata_files(extra, split)
    if not force and all(path.is_file() for path in files):
        images = len(np.load(files[0], mmap_mode="r"))
        return Prepared(split, images, files, written=False, stale=changed_since(root, extra, split), unexpected=[])
    listing = list_split(root, split)
    if listing.images == 0:
        seen = f"; it holds names such as {listing.unexpected[0]}" if listing.unexpected else ""
        hint = "Raw validation images are sorted with --val-labels." if split is Split.VAL else None
        raise DataError(f"{root / split.folder} holds no image of ImageNet's layout{seen}", hint)
    write_metadata(extra, split, entries_of(listing, labels))
    return Prepared(split, listing.images, files, written=True, stale=False, unexpected=listing.unexpected)


def list_split(root: Path, split: Split) -> SplitListing:
    """Find a split's images. Files whose name is not of the layout are left out and listed as unexpected.

    Raises:
        DataError: the split's folder is missing.
    """
    folder = root / split.folder
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; the layout is <root>/train/<class id>/<class id>_<n>.JPEG, "
                        "<root>/val/<class id>/ILSVRC2012_val_<8 digits>.JPEG, "
                        "<root>/test/ILSVRC2012_test_<8 digits>.JPEG")  # fmt: skip
    if split is Split.TEST:
        listings = [_list_class(folder, split, "")]
        loose: list[str] = []
    else:
        names = _names_in(folder)
        loose = [f"{split.folder}/{name}" for name, is_folder in names if not is_folder]
        class_ids = [name for name, is_folder in names if is_folder]
        with progress() as bar, ThreadPoolExecutor(SCAN_THREADS) as pool:
            found = pool.map(lambda class_id: _list_class(folder / class_id, split, class_id), class_ids)
            listings = list(bar.track(found, total=len(class_ids), description=f"Listing {split.folder}"))
    unexpected = [os.path.join(split.folder, c.class_id, name) for c in listings for name in c.unexpected]
    return SplitListing(split, listings, loose + unexpected)


def entries_of(listing: SplitListing, labels: Labels) -> np.ndarray:
    """Structured [actual_index <u4, class_index <u4, class_id U, class_name U], in the order of class and file name.

    Raises:
        DataError: a class folder that labels.txt does not name.
    """
    if unknown := [c.class_id for c in listing.classes if c.class_id and c.class_id not in labels.names]:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        folder = listing.split.folder
        raise DataError(f"labels.txt does not name {len(unknown)} of the class folders of {folder}/: {shown}")
    index_of = labels.class_index()
    with_images = [c for c in listing.classes if c.actual_indices]
    id_length = max((len(c.class_id) for c in with_images), default=0)
    name_length = max((len(labels.names.get(c.class_id, "")) for c in with_images), default=0)
    columns = {
        "actual_index": "<u4",
        "class_index": "<u4",
        "class_id": f"U{id_length}",
        "class_name": f"U{name_length}",
    }
    entries = np.empty(listing.images, dtype=np.dtype(list(columns.items())))
    start = 0
    for found in with_images:
        part = entries[start : start + len(found.actual_indices)]
        part["actual_index"] = found.actual_indices
        part["class_index"] = index_of[found.class_id] if found.class_id else NO_CLASS
        part["class_id"] = found.class_id
        part["class_name"] = labels.names.get(found.class_id, "")
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
        times = [entry.stat().st_mtime for entry in entries if entry.is_dir()] if split is not Split.TEST else []
    return max([folder.stat().st_mtime, *times]) > written


def _list_class(folder: Path, split: Split, class_id: str) -> ClassListing:
    number = {Split.TRAIN: r"(0|[1-9]\d*)", Split.VAL: r"(\d{8})", Split.TEST: r"(\d{8})"}[split]
    prefix = {Split.TRAIN: re.escape(class_id), Split.VAL: "ILSVRC2012_val", Split.TEST: "ILSVRC2012_test"}[split]
    pattern = re.compile(rf"{prefix}_{number}\.JPEG")
    actual_indices, unexpected = [], []
    for name, is_folder in _names_in(folder):
        found = pattern.fullmatch(name)
        if found and not is_folder:
            actual_indices.append(int(found[1]))
        else:
            unexpected.append(name)
    return ClassListing(class_id, actual_indices, unexpected)


def _names_in(folder: Path) -> list[tuple[str, bool]]:
    """What is in a folder and not hidden, sorted, and whether it is a folder."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
