"""Finds the images below a folder, and remembers large findings."""

import json
import os
import secrets
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2cli.console import logger
from dinov2cli.data.datasets.base import UNLABELLED, ImageDataset
from dinov2cli.data.regions import OTHER_SLIDES, SLIDES
from dinov2cli.files import digest, write_text
from dinov2cli.site import cache_folder

Arrays = dict[str, np.ndarray]
CACHE_FROM = 20_000
"""Folders with at least so many images are remembered; smaller ones are read faster than checked."""
SCAN_THREADS = 16
"""Folders are read side by side: on network file systems the wait is for the server."""

_SETTLED_NS = 2_000_000_000  # a folder changed within 2 s of its reading may change again within its clock's tick

FURTHER_EXTENSIONS = frozenset(
    [".npy", ".npz", ".dcm", ".pam", ".pfm", ".btf", ".tf8", ".lsm", ".heic", ".heif", *SLIDES, *OTHER_SLIDES]
)
"""Of files that are images beside those that Pillow registers."""
# Registered with Pillow, but only to be written, identified or handed to another program.
_NOT_PICTURES = {"PDF", "EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF", "PALM", "XVTHUMB"}


class PathTable:
    """An immutable sequence of paths.

    Args:
        blob: the paths' bytes one after another, uint8 [total bytes].
        ends: where each path ends in `blob`, int64 [N].
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self.blob = blob
        self.ends = ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> "PathTable":
        blob, ends = bytearray(), array("q")
        for path in paths:
            blob += path.encode(errors="surrogateescape")
            ends.append(len(blob))
        return cls(np.frombuffer(blob, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index > 0 else 0
        return bytes(self.blob[start : int(self.ends[index])]).decode(errors="surrogateescape")


class FilesDataset(ImageDataset):
    """Image files by their paths, which a subclass keeps as `_paths`; relative ones begin at its `_prefix`."""

    _paths: PathTable
    _prefix = ""

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        self._check_index(index)
        return os.path.join(self._prefix, self._paths[index])  # pathlib would take longer than reading a small image


class Listing(NamedTuple):
    """Images below a folder.

    paths: relative to it, sorted. classes: int32 [N], -1 for images directly in the folder. others: numbers of files of
    other types, by suffix.
    """

    paths: PathTable
    classes: np.ndarray
    class_names: tuple[str, ...]
    others: dict[str, int]


def list_images(root: Path) -> Listing:
    """The images below `root`, sorted by path; the first folder on an image's path is its class.

    A folder with many images is listed once: the listing is kept in the user's cache and read again in milliseconds
    as long as no folder below `root` has changed.
    """
    kind = ["with others", *sorted(image_extensions())]
    if (recalled := recall(root, kind)) is not None:
        arrays, names = recalled
        others = dict(zip(arrays["others"].tolist(), arrays["counts"].tolist(), strict=True))
        return Listing(PathTable(arrays["blob"], arrays["ends"]), arrays["classes"], names, others)
    started = time.time_ns()
    found = _Found()
    folders, itself = found.read(str(root), "", frozenset())
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        branches = list(pool.map(lambda name: _Found().scan(str(root), f"{name}/", itself), folders))
    class_names: list[str] = []
    counts = [len(found.ends)]
    for name, branch in zip(folders, branches, strict=True):
        found.append(branch)
        if len(branch.ends):
            class_names.append(name)
            counts.append(len(branch.ends))
    listing = Listing(
        PathTable(np.frombuffer(found.blob, np.uint8), np.frombuffer(found.ends, np.int64)),
        np.repeat(np.arange(UNLABELLED, len(class_names), dtype=np.int32), counts),
        tuple(class_names),
        dict(found.others.most_common()),
    )
    if len(listing.paths) >= CACHE_FROM:
        arrays = {"blob": listing.paths.blob, "ends": listing.paths.ends, "classes": listing.classes}
        arrays |= {"others": np.array([*listing.others], "U"), "counts": np.array([*listing.others.values()], np.int64)}
        remember(root, kind, arrays, listing.class_names, found.modified, started)
    return listing


Inodes = frozenset[tuple[int, int]]
"""Folders, by device and inode."""


class _Found:
    """Paths of images and times of folders, in flat buffers: a Python string a path would take gigabytes."""

    def __init__(self) -> None:
        self.blob = bytearray()
        self.ends = array("q")
        self.modified: dict[str, int] = {}
        self.others: Counter[str] = Counter()

    def read(self, root: str, prefix: str, above: Inodes) -> tuple[list[str], Inodes]:
        """Add the images of one folder; the names of the folders in it, and `above` with itself."""
        here = os.path.join(root, prefix)
        status = os.stat(here)
        identity = (status.st_dev, status.st_ino)
        self.modified[prefix] = status.st_mtime_ns
        files: list[str] = []
        folders: list[str] = []
        if identity not in above:  # else a symlink to a folder that it lies in
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if is_folder(entry):
                        folders.append(entry.name)
                    elif _blocks(entry):
                        self.others["pipes or devices"] += 1
                    elif (suffix := os.path.splitext(entry.name)[1].lower()) in image_extensions():
                        files.append(entry.name)
                    else:
                        self.others[suffix or "without suffix"] += 1
        for name in sorted(files):
            self.blob += f"{prefix}{name}".encode(errors="surrogateescape")
            self.ends.append(len(self.blob))
        return sorted(folders), above | {identity}

    def append(self, other: "_Found") -> None:
        start = len(self.blob)
        self.blob += other.blob
        self.ends.frombytes((np.frombuffer(other.ends, np.int64) + start).tobytes())
        self.modified |= other.modified
        self.others += other.others

    def scan(self, root: str, prefix: str, above: Inodes) -> "_Found":
        """Add a folder and then those below it."""
        folders, above = self.read(root, prefix, above)
        for name in folders:
            self.scan(root, f"{prefix}{name}/", above)
        return self


def is_folder(entry: os.DirEntry[str]) -> bool:
    """As `entry.is_dir()`, which raises OSError for a link that leads to itself."""
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def _blocks(entry: os.DirEntry[str]) -> bool:
    """Whether it is a pipe, socket or device, to which reading may never end; a link to nothing is a damaged file."""
    is_file = os.path.isfile(entry) if entry.is_symlink() else entry.is_file()
    return not is_file and os.path.exists(entry)


@cache
def image_extensions() -> frozenset[str]:
    """Extensions, in lower case with the dot, of the file types that are read as pictures."""
    from PIL import Image

    Image.init()
    kinds = Image.OPEN.keys() - _NOT_PICTURES
    pillows = {extension for extension, kind in Image.registered_extensions().items() if kind in kinds}
    return frozenset(pillows | FURTHER_EXTENSIONS)


def recall(root: Path, kind: list[str]) -> tuple[Arrays, tuple[str, ...]] | None:
    """The arrays and class names remembered for (root, kind), or None if there are none or something changed since.

    A finding holds while every folder or file that it was made from has the modification time it had then.
    """
    index = _index_path(root, kind)
    try:
        saved = json.loads(index.read_text())
        for name, modified in saved["modified"].items():
            if os.stat(os.path.join(root, name)).st_mtime_ns != modified:
                return None
        arrays = {
            name: np.load(index.with_name(f"{index.stem}-{saved['nonce']}.{name}.npy"), mmap_mode="r")
            for name in saved["arrays"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: it will be made anew
    return arrays, tuple(saved["class_names"])


def remember(
    root: Path, kind: list[str], arrays: Arrays, class_names: tuple[str, ...], modified: dict[str, int], started_ns: int
) -> None:
    """Keep a finding about `root` that was begun at `started_ns`. A cache that cannot be written is done without.

    Args:
        modified: what the finding was made from, as paths relative to `root`, with their times in nanoseconds.
    """
    if any(time > started_ns - _SETTLED_NS for time in modified.values()):
        return
    index = _index_path(root, kind)
    nonce = secrets.token_hex(4)
    content = {"nonce": nonce, "arrays": sorted(arrays), "class_names": class_names, "modified": modified}
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        earlier = list(index.parent.glob(f"{index.stem}-*.npy"))
        for name, values in arrays.items():
            np.save(index.with_name(f"{index.stem}-{nonce}.{name}.npy"), values)
        write_text(index, json.dumps({"root": str(root), **content}))
        for path in earlier:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.info("the listing of %s is not kept in %s (%s)", root, index.parent, error)


def _index_path(root: Path, kind: list[str]) -> Path:
    return cache_folder("listings") / f"{digest(chr(0).join([os.path.abspath(root), *kind]))[:20]}.json"
