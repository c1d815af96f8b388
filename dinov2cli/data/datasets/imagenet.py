"""ImageNet by its prepared metadata: 1k, and 22k as released, a tar file a class, read by block without unpacking."""

import gzip
import os
from enum import Enum
from functools import cached_property
from pathlib import Path

import numpy as np

from dinov2cli.data.datasets.base import UNLABELLED, ImageDataset, OpenFiles, RecordFile, read_texts
from dinov2cli.data.decoding import UnreadableImage
from dinov2cli.errors import DataError
from dinov2cli.files import user_path

NO_CLASS = 2**32 - 1
"""`class_index` of entries without a label, in the metadata files."""


FLAT_VAL = "ILSVRC2012_val_{number:08d}.JPEG"
"""Where a validation image lies as downloaded, from Kaggle or image-net.org: its class is told elsewhere."""


class Split(Enum):
    """A part of ImageNet-1k: its folder, its full number of images, and where in the folder an image lies.

    The first layout is the reference implementation's; those whose names end in the class are Hugging Face's.
    """

    TRAIN = ("train", 1_281_167, "{class_id}/{class_id}_{number}.JPEG",
             "{class_id}/{class_id}_{number}_{class_id}.JPEG", "{class_id}_{number}_{class_id}.JPEG")  # fmt: skip
    VAL = ("val", 50_000, "{class_id}/ILSVRC2012_val_{number:08d}.JPEG",
           "{class_id}/ILSVRC2012_val_{number:08d}_{class_id}.JPEG", "ILSVRC2012_val_{number:08d}_{class_id}.JPEG",
           FLAT_VAL)  # fmt: skip
    TEST = ("test", 100_000, "ILSVRC2012_test_{number:08d}.JPEG")

    def __init__(self, folder: str, full_size: int, *layouts: str) -> None:
        self.folder, self.full_size, self.layouts = folder, full_size, layouts

    def image_path(self, class_id: str, actual_index: int, layout: str | None = None) -> str:
        """Path of an image relative to the dataset's root."""
        return f"{self.folder}/{(layout or self.layouts[0]).format(class_id=class_id, number=actual_index)}"


def data_root(root: Path) -> Path:
    """The folder of train/, val/ and test/: `root`, or where Kaggle's download has them below it."""
    places = (root, *(root / below for below in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")))
    return next((place for place in places if any(os.path.isdir(place / split.folder) for split in Split)), root)


class ImageNet(ImageDataset):
    """ImageNet-1k, or any subset of it in its layout, through the files that `dino2 prepare-imagenet` writes.

    Args:
        split: TRAIN, VAL or TEST.
        root: the folder that holds train/, val/, test/, or Kaggle's download, which has them in ILSVRC/Data/CLS-LOC.
        extra: the folder of the metadata files; by default `root`.

    Raises:
        DataError: unknown split, or no metadata.
    """

    def __init__(self, split: str, root: str, extra: str | None = None) -> None:
        if split not in Split.__members__:
            raise DataError(f"ImageNet has no split {split!r}; it has TRAIN, VAL and TEST")
        self.split = Split[split]
        given = user_path(root)
        self.root, self.extra = data_root(given), user_path(extra) if extra else given
        entries = self.extra / f"entries-{split}.npy"
        if not os.path.isfile(entries):
            remedy = f"dino2 prepare-imagenet --root {given} --extra {self.extra} --split {split}"
            raise DataError(f"{entries} does not exist: this ImageNet has not been prepared", remedy)
        self._entries = RecordFile(entries, "actual_index", "class_index", "class_id")

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]  # read when asked for
        names = self.extra / f"class-names-{self.split.name}.npy"
        return read_texts(names) if names.is_file() else ()

    def __len__(self) -> int:
        return len(self._entries)

    def path(self, index: int) -> str:
        return self._path(index, self._layout)

    def _path(self, index: int, layout: str) -> str:
        entry = self._entries[index]
        return str(self.root / self.split.image_path(str(entry["class_id"]), int(entry["actual_index"]), layout))

    @cached_property
    def _layout(self) -> str:
        """The one in which the first image, or one of the others, is there."""
        looked_at = dict.fromkeys((0, len(self) // 2, len(self) - 1)) if len(self) else ()
        there = (layout for i in looked_at for layout in self.split.layouts if Path(self._path(i, layout)).is_file())
        return next(there, self.split.layouts[0])

    def target(self, index: int) -> int:
        class_index = int(self._entries[index]["class_index"])
        return UNLABELLED if class_index == NO_CLASS else class_index

    def targets(self) -> np.ndarray:
        classes = self._entries.column("class_index")
        return np.where(classes == NO_CLASS, UNLABELLED, classes.astype(np.int64))

    def describe(self) -> str:
        part = "" if len(self) == self.split.full_size else f" of {self.split.full_size}"
        return f"ImageNet {self.split.name} in {self.root}: {len(self)}{part} images, {len(self.class_names)} classes"


BLOCK = 512
"""Bytes of a tar block; a member is one header block and its content, padded to whole blocks."""


class ImageNet22k(ImageDataset):
    """All images of `<root>/<wnid>.tar` through the entries that `dino2 prepare-imagenet --variant 22k` writes.

    Args:
        root: the folder of the tar files.
        extra: the folder of entries.npy and class-ids.npy; by default `root`.

    Raises:
        DataError: no metadata.
    """

    def __init__(self, root: str, extra: str | None = None) -> None:
        self.root = user_path(root)
        self.extra = user_path(extra) if extra else self.root
        for file in (self.extra / "entries.npy", self.extra / "class-ids.npy"):
            if not os.path.isfile(file):
                remedy = f"dino2 prepare-imagenet --variant 22k --root {self.root} --extra {self.extra}"
                raise DataError(f"{file} does not exist: this ImageNet-22k has not been prepared", remedy)
        self._entries = RecordFile(
            self.extra / "entries.npy", "class_index", "class_id", "start_offset", "end_offset", "filename"
        )
        self._files = OpenFiles()

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]  # read when asked for
        return read_texts(self.extra / "class-ids.npy")

    def __len__(self) -> int:
        return len(self._entries)

    def encoded(self, index: int) -> bytes:
        entry = self._entries[index]
        start, end = int(entry["start_offset"]), int(entry["end_offset"])
        data = self._files.read(str(self.root / f"{entry['class_id']}.tar"), start, end - start)
        return unpack_member(data, self.path(index))

    def path(self, index: int) -> str:
        entry = self._entries[index]
        return f"{self.root / str(entry['class_id'])}.tar:{entry['filename']}"

    def container(self, index: int) -> str:
        return str(self.root / f"{self._entries[index]['class_id']}.tar")

    def target(self, index: int) -> int:
        return int(self._entries[index]["class_index"])

    def targets(self) -> np.ndarray:
        return self._entries.column("class_index").astype(np.int64)

    def describe(self) -> str:
        return f"ImageNet-22k in {self.root}: {len(self)} images, {len(self.class_names)} classes"


def unpack_member(blocks: bytes, path: str) -> bytes:
    """Content of a tar member, given its header and content blocks; a gzipped one (some of ImageNet-22k are) unpacked.

    Raises:
        UnreadableImage: no tar header, or damaged gzip data.
    """
    try:
        size = int(blocks[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise UnreadableImage(path, "its position in the tar holds no member; prepare the dataset again") from None
    content = blocks[BLOCK : BLOCK + size]
    if content[:2] == b"\x1f\x8b":
        try:
            return gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise UnreadableImage(path, f"damaged gzip data ({error})") from error
    return content
