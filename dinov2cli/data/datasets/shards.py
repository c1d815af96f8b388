"""Images in tar and zip files, read by index without unpacking: a folder of WebDataset shards, or one archive."""

import os
import re
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2cli.console import counted, in_threads, logger
from dinov2cli.data.datasets.base import UNLABELLED, ImageDataset, OpenFiles, classes_of, require_images
from dinov2cli.data.datasets.listing import PathTable, image_extensions, recall, remember
from dinov2cli.data.decoding import UnreadableImage
from dinov2cli.errors import DataError
from dinov2cli.files import user_path

INDEX_THREADS = 8
LARGEST = 1 << 30
"""Bytes of an image in a zip: it is decompressed in one piece."""
MOST_CLASSES = 1_000_000
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
"""What cannot be read by position."""
_HIDDEN = re.compile(r"(?:^|/)\.(?!/|\./)")  # a file, or a folder on the way to it, as in a folder of images


class ShardsDataset(ImageDataset):
    """The images in all `*.tar` of a folder, in any order, by position.

    A member `key.<image extension>` is an image; the whole number in `key.cls` beside it, if there is one, its class.
    The first use reads every tar's headers once and keeps the positions in the user's cache.

    Raises:
        DataError: no tar files, a compressed or damaged one, or none with images.
    """

    def __init__(self, root: str | Path) -> None:
        folder = user_path(root)
        if not os.path.isdir(folder):
            raise DataError(f"{folder} is not a folder")
        with os.scandir(folder) as entries:
            tars = [entry.name for entry in entries if entry.name.lower().endswith(".tar") and entry.is_file()]
        if not (shards := sorted(name for name in tars if not name.startswith("."))):
            raise DataError(f"{folder} holds no .tar files")
        self._open(folder, shards)

    def _open(self, folder: Path, shards: list[str]) -> None:
        self.root, self.shards = folder, shards
        places, self._names = _load_or_make_index(folder, shards)
        self._shard, self._offset, self._size, self._inflated, self._classes = places.T
        require_images(len(self._size), ", ".join(shards[:3]) + f" in {folder}")
        self._files = OpenFiles()
        self.class_names = tuple(map(str, range(int(self._classes.max()) + 1)))

    def __len__(self) -> int:
        return len(self._size)

    def encoded(self, index: int) -> bytes:
        self._check_index(index)
        shard = str(self.root / self.shards[self._shard[index]])
        data = self._files.read(shard, int(self._offset[index]), int(self._size[index]))
        if not self._inflated[index]:
            return data
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, int(self._inflated[index]))
        except zlib.error as error:
            raise UnreadableImage(self.path(index), f"damaged in the archive ({error})") from error

    def path(self, index: int) -> str:
        self._check_index(index)
        return f"{self.root / self.shards[self._shard[index]]}:{self._names[index]}"

    def container(self, index: int) -> str:
        return str(self.root / self.shards[self._shard[index]])

    def file_size(self, index: int) -> int:
        return int(self._inflated[index] or self._size[index])

    def describe(self) -> str:
        held = f"{counted(len(self), 'image')}, {self._classes_in_words}"
        return f"{counted(len(self.shards), 'shard')} in {self.root}: {held}"


class ArchiveDataset(ShardsDataset):
    """The images in one .tar or .zip, without unpacking, by position.

    The class of an image is the first folder on its path below those that all images share; where members `key.cls`
    give whole numbers, they are the classes, as in shards.

    Raises:
        DataError: no such file, one that cannot be read by position, or none with images.
    """

    def __init__(self, file: str | Path) -> None:
        path = user_path(file)
        if path.name.lower().endswith(COMPRESSED):
            raise DataError(f"{path}: a compressed tar has to be read from its start to reach an image",
                            "Unpack it, or undo its compression (gunzip): a plain .tar is read as it is.")  # fmt: skip
        if not os.path.isfile(path):
            raise DataError(f"{path} is not a file")
        self._open(path.parent, [path.name])
        if self.class_names:
            return
        folders = [[part for part in name.split("/")[:-1] if part not in ("", ".", "..")] for name in self._names]
        ends = zip_longest(min(folders), max(folders))
        shared = next((depth for depth, (a, b) in enumerate(ends) if a != b), len(folders[0]))
        first = [parts[shared] if len(parts) > shared else None for parts in folders]
        self.class_names, self._classes = classes_of(first)

    def describe(self) -> str:
        return f"archive {self.root / self.shards[0]}: {counted(len(self), 'image')}, {self._classes_in_words}"


def _load_or_make_index(root: Path, shards: list[str]) -> tuple[np.ndarray, PathTable]:
    """Where the images lie, int64 [N, 5]: number of the shard, offset and size of the content in bytes, its size once
    decompressed (0 for what is stored as it is), and label (-1: none); and their names."""
    kind = ["archives, nothing hidden, one table", *shards]
    if (recalled := recall(root, kind)) is not None:
        arrays, _ = recalled
        return arrays["places"], PathTable(arrays["blob"], arrays["ends"])
    started = time.time_ns()
    modified = {name: os.stat(root / name).st_mtime_ns for name in shards}
    logger.info("reading the headers of %s in %s, once", f"{len(shards)} files" if shards[1:] else shards[0], root)
    members = in_threads(_images_in, [root / name for name in shards], "Working...", INDEX_THREADS)
    rows = [(number, *place) for number, in_shard in enumerate(members) for _, *place in in_shard]
    places, names = np.array(rows, np.int64).reshape(-1, 5), PathTable.of(name for each in members for name, *_ in each)
    remember(root, kind, {"places": places, "blob": names.blob, "ends": names.ends}, (), modified, started)
    return places, names


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    inflated: int
    text: bytes  # of a member `key.cls`


def _images_in(path: Path) -> list[tuple[str, int, int, int, int]]:
    """Name, offset, size, inflated size, and label (-1: none) of the images in an archive."""
    images: list[tuple[str, _Member]] = []
    labels: dict[str, int] = {}
    try:
        for member in (_zip_members if path.suffix.lower() == ".zip" else _tar_members)(path):
            # WebDataset's key is the name up to the first dot of its last part.
            folder, _, file = member.name.rpartition("/")
            stem, _, extension = file.partition(".")
            if _HIDDEN.search(member.name) or folder.startswith("__MACOSX"):  # what macOS keeps beside each file
                continue
            if "." + extension.lower().rpartition(".")[2] in image_extensions():
                images.append((f"{folder}/{stem}", member))
            elif extension == "cls":
                labels[f"{folder}/{stem}"] = _label(member.text)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not an uncompressed tar file ({error})", "Shards are read by position: unpack "
                        ".tar.gz to .tar first.") from error  # fmt: skip
    except (zipfile.BadZipFile, NotImplementedError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: not a zip file that can be read by position ({error})") from error
    except ValueError as error:
        raise DataError(f"{path}: a .cls member holds no whole number ({error})") from error
    return [(m.name, m.offset, m.size, m.inflated, labels.get(key, UNLABELLED)) for key, m in images]


def _tar_members(path: Path) -> Iterator[_Member]:
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isfile():
                if not 0 <= member.size < 1 << 62:
                    raise tarfile.TarError(f"{member.name!r} would have {member.size} bytes")
                content = tar.extractfile(member) if member.name.endswith(".cls") else None
                yield _Member(member.name, member.offset_data, member.size, 0, content.read(64) if content else b"")


def _zip_members(path: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1:
                raise NotImplementedError(f"{info.filename} is encrypted")
            if info.file_size > LARGEST:
                raise NotImplementedError(f"{info.filename} has {info.file_size} bytes, more than {LARGEST}")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise NotImplementedError(f"{info.filename} is compressed in a way other than deflate")
            file.seek(info.header_offset + 26)
            offset = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            inflated = info.file_size if info.compress_type else 0
            text = archive.open(info).read(64) if info.filename.endswith(".cls") else b""
            # Some programs of Windows write its own separator, which Python's zipfile leaves.
            name = info.filename if "/" in info.filename else info.filename.replace("\\", "/")
            yield _Member(name, offset, info.compress_size, inflated, text)


def _label(text: bytes) -> int:
    """The class in a `.cls` member; ValueError if it is none."""
    label = int(text)
    if not UNLABELLED <= label < MOST_CLASSES:  # each class has a name in memory
        raise ValueError(f"class {label}; classes are 0 to {MOST_CLASSES - 1:,}")
    return label
