"""Finds the images below a folder."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2cli.data.datasets.base import UNLABELLED
from dinov2cli.data.datasets.path_table import PathTable

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
    """The images below `root`, sorted by path; the first folder on an image's path is its class."""
    paths: list[str] = []
    classes: list[int] = []
    class_names: list[str] = []
    for relative in _walk(str(root), "", frozenset()):
        first, slash, _ = relative.partition("/")
        if slash and (not class_names or class_names[-1] != first):
            class_names.append(first)
        classes.append(len(class_names) - 1 if slash else UNLABELLED)
        paths.append(relative)
    return Listing(PathTable.of(paths), np.array(classes, dtype=np.int32), tuple(class_names))


def _walk(root: str, folder: str, parents: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Relative paths of images: a folder's own files first, then its subfolders, each sorted by name."""
    here = os.path.join(root, folder)
    status = os.stat(here)
    identity = (status.st_dev, status.st_ino)
    if identity in parents:  # a symlink to a folder that it lies in
        return
    files, folders = [], []
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in image_extensions():
                files.append(entry.name)
    for name in sorted(files):
        yield f"{folder}{name}"
    for name in sorted(folders):
        yield from _walk(root, f"{folder}{name}/", parents | {identity})


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
