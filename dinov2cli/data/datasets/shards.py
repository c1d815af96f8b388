"""A folder of WebDataset shards (.tar), read by index without unpacking."""

import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2cli.console import logger, progress
from dinov2cli.data.datasets.base import UNLABELLED, ImageDataset, OpenFiles, require_images
from dinov2cli.data.datasets.listing import Arrays, PathTable, image_extensions, recall, remember
from dinov2cli.errors import DataError

INDEX_THREADS = 8


class ShardsDataset(ImageDataset):
    """The images in all `*.tar` of a folder, in any order, by position.

    A member `key.<image extension>` is an image; the whole number in `key.cls` beside it, if there is one, its class.
    The first use reads every tar's headers once and keeps the positions in the user's cache.

    Raises:
        DataError: no tar files, a compressed or damaged one, or none with images.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DataError(f"{self.root} is not a folder")
        self.shards = shards_in(self.root)
        if not self.shards:
            raise DataError(f"{self.root} holds no .tar files")
        index = _load_or_make_index(self.root, self.shards)
        self._shard, self._offset, self._size, self._class = index.shard, index.offset, index.size, index.label
        self._names = index.names
        require_images(len(self._size), f"the tar files of {self.root}")
        self.class_names = tuple(str(i) for i in range(int(self._class.max()) + 1))
        self._files = OpenFiles()

    def __len__(self) -> int:
        return len(self._size)

    def encoded(self, index: int) -> bytes:
        self._check_index(index)
        shard = str(self.root / self.shards[self._shard[index]])
        return self._files.read(shard, int(self._offset[index]), int(self._size[index]))

    def path(self, index: int) -> str:
        self._check_index(index)
        return f"{self.root / self.shards[self._shard[index]]}:{self._names[index]}"

    def file_size(self, index: int) -> int:
        return int(self._size[index])

    def targets(self) -> np.ndarray:
        return self._class.astype(np.int64)

    def describe(self) -> str:
        classes = f"{len(self.class_names)} classes" if self.class_names else "no labels"
        return f"{len(self.shards)} shards in {self.root}: {len(self)} images, {classes}"


def shards_in(folder: Path) -> list[str]:
    """Names of the tar files directly in `folder`, sorted."""
    return sorted(name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith("."))


class _Index(NamedTuple):
    """Where the images lie. N images; offset and size of the content in bytes, int64 [N]."""

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    names: PathTable


def _load_or_make_index(root: Path, shards: list[str]) -> _Index:
    kind = ["shards", *shards]
    if (recalled := recall(root, kind)) is not None:
        arrays, _ = recalled
        names = PathTable(arrays.pop("blob"), arrays.pop("ends"))
        return _Index(**arrays, names=names)
    started = time.time_ns()
    modified = {name: os.stat(root / name).st_mtime_ns for name in shards}
    logger.info("reading the headers of %d tar files in %s, once", len(shards), root)
    with progress() as bar, ThreadPoolExecutor(INDEX_THREADS) as pool:
        members = list(bar.track(pool.map(_images_in, [root / name for name in shards]), total=len(shards)))
    places = np.array([place for in_shard in members for _, *place in in_shard], np.int64).reshape(-1, 3)
    columns: Arrays = {
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), [len(in_shard) for in_shard in members]),
        "offset": places[:, 0].copy(),
        "size": places[:, 1].copy(),
        "label": places[:, 2].astype(np.int32),
    }
    names = PathTable.of(name for in_shard in members for name, *_ in in_shard)
    remember(root, kind, {**columns, "blob": names.blob, "ends": names.ends}, (), modified, started)
    return _Index(**columns, names=names)


def _images_in(path: Path) -> list[tuple[str, int, int, int]]:
    """Name, offset and size in bytes, and label (-1: none) of the images in a tar."""
    images: list[tuple[str, str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                # WebDataset's key is the name up to the first dot of its last part.
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = f"{folder}/{stem}"
                if "." + extension.lower().rpartition(".")[2] in image_extensions():
                    images.append((key, member.name, member.offset_data, member.size))
                elif extension == "cls":
                    content = tar.extractfile(member)
                    labels[key] = int(content.read()) if content else UNLABELLED
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not an uncompressed tar file ({error})", "Shards are read by position: unpack "
                        ".tar.gz to .tar first.") from error  # fmt: skip
    except ValueError as error:
        raise DataError(f"{path}: a .cls member holds no whole number ({error})") from error
    return [(name, offset, size, labels.get(key, UNLABELLED)) for key, name, offset, size in images]
