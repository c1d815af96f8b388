"""Finds the images below a folder, and remembers large findings."""

import os
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2cli.data.datasets import listing_cache
from dinov2cli.data.datasets.base import UNLABELLED
from dinov2cli.data.datasets.path_table import PathTable

CACHE_FROM = 20_000
"""Folders with at least so many images are remembered; smaller ones are read faster than checked."""
SCAN_THREADS = 16
"""Folders are read side by side: on network file systems the wait is for the server."""

# Registered with Pillow, but only to be written, identified or handed to another program.
_NOT_PICTURES = {"PDF", "EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF", "PALM", "XVTHUMB"}


class Listing(NamedTuple):
    """Images below a folder.

    paths: relative to it, sorted. classes: int32 [N], -1 for images directly in the folder.
    """

    paths: PathTable
    classes: np.ndarray
    class_names: tuple[str, ...]


def list_images(root: Path) -> Listing:
    """The images below `root`, sorted by path; the first folder on an image's path is its class.

    A folder with many images is listed once: the listing is kept in the user's cache and read again in milliseconds
    as long as no folder below `root` has changed.
    """
    remembered = listing_cache.load(root, sorted(image_extensions()))
    if remembered is not None:
        arrays, names = remembered
        return Listing(PathTable(arrays["blob"], arrays["ends"]), arrays["classes"], names)
    started = time.time_ns()
    top = _read_folder(str(root), "", frozenset())
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        branches = list(pool.map(lambda name: _scan(str(root), f"{name}/", top.parents), top.folders))
    found = _Found()
    found.add_folder("", top)
    class_names: list[str] = []
    counts = [len(found.ends)]
    for name, branch in zip(top.folders, branches, strict=True):
        found.append(branch)
        if len(branch.ends):
            class_names.append(name)
            counts.append(len(branch.ends))
    listing = Listing(
        PathTable(np.frombuffer(found.blob, np.uint8), np.frombuffer(found.ends, np.int64)),
        np.repeat(np.arange(UNLABELLED, len(class_names), dtype=np.int32), counts),
        tuple(class_names),
    )
    if len(listing.paths) >= CACHE_FROM:
        arrays = {"blob": listing.paths.blob, "ends": listing.paths.ends, "classes": listing.classes}
        listing_cache.save(root, sorted(image_extensions()), arrays, listing.class_names, found.modified, started)
    return listing


class _Folder(NamedTuple):
    """One folder's content, sorted by name."""

    files: list[str]
    folders: list[str]
    modified: int
    parents: frozenset[tuple[int, int]]  # this folder and those above it, by device and inode


class _Found:
    """Paths of images and times of folders, in flat buffers: a Python string a path would take gigabytes."""

    def __init__(self) -> None:
        self.blob = bytearray()
        self.ends = array("q")
        self.modified: dict[str, int] = {}

    def add_folder(self, prefix: str, folder: _Folder) -> None:
        self.modified[prefix] = folder.modified
        for name in folder.files:
            self.blob += f"{prefix}{name}".encode(errors="surrogateescape")
            self.ends.append(len(self.blob))

    def append(self, other: "_Found") -> None:
        start = len(self.blob)
        self.blob += other.blob
        self.ends.frombytes((np.frombuffer(other.ends, np.int64) + start).tobytes())
        self.modified |= other.modified


def _scan(root: str, prefix: str, parents: frozenset[tuple[int, int]]) -> _Found:
    found = _Found()
    for where, folder in _walk(root, prefix, parents):
        found.add_folder(where, folder)
    return found


def _walk(root: str, prefix: str, parents: frozenset[tuple[int, int]]) -> Iterator[tuple[str, _Folder]]:
    """A folder and those below it, each before its subfolders."""
    folder = _read_folder(root, prefix, parents)
    yield prefix, folder
    for name in folder.folders:
        yield from _walk(root, f"{prefix}{name}/", folder.parents)


def _read_folder(root: str, prefix: str, parents: frozenset[tuple[int, int]]) -> _Folder:
    here = os.path.join(root, prefix)
    status = os.stat(here)
    identity = (status.st_dev, status.st_ino)
    files: list[str] = []
    folders: list[str] = []
    if identity not in parents:  # else a symlink to a folder that it lies in
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif os.path.splitext(entry.name)[1].lower() in image_extensions():
                    files.append(entry.name)
    return _Folder(sorted(files), sorted(folders), status.st_mtime_ns, parents | {identity})


@cache
def image_extensions() -> frozenset[str]:
    """Extensions, in lower case with the dot, of the file types that Pillow opens as pictures."""
    from PIL import Image

    Image.init()
    return frozenset(
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NOT_PICTURES
    )
