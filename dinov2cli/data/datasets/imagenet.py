"""ImageNet-1k by its prepared metadata."""

from enum import Enum
from functools import cached_property
from pathlib import Path

import numpy as np

from dinov2cli.data.datasets.base import UNLABELLED, ImageDataset, RecordFile
from dinov2cli.data.decoding import read_file
from dinov2cli.errors import DataError

NO_CLASS = 2**32 - 1
"""`class_index` of entries without a label, in the metadata files."""


class Split(Enum):
    """A part of ImageNet-1k: its folder, its full number of images, and where in the folder an image lies."""

    TRAIN = ("train", 1_281_167, "{class_id}/{class_id}_{number}.JPEG")
    VAL = ("val", 50_000, "{class_id}/ILSVRC2012_val_{number:08d}.JPEG")
    TEST = ("test", 100_000, "ILSVRC2012_test_{number:08d}.JPEG")

    def __init__(self, folder: str, full_size: int, layout: str) -> None:
        self.folder, self.full_size, self.layout = folder, full_size, layout

    def image_path(self, class_id: str, actual_index: int) -> str:
        """Path of an image relative to the dataset's root."""
        return f"{self.folder}/{self.layout.format(class_id=class_id, number=actual_index)}"


class ImageNet(ImageDataset):
    """ImageNet-1k, or any subset of it in its layout, through the files that `dino2 prepare-imagenet` writes.

    Args:
        split: TRAIN, VAL or TEST.
        root: the folder that holds train/, val/, test/.
        extra: the folder of the metadata files; by default `root`.

    Raises:
        DataError: unknown split, or no metadata.
    """

    def __init__(self, split: str, root: str, extra: str | None = None) -> None:
        if split not in Split.__members__:
            raise DataError(f"ImageNet has no split {split!r}; it has TRAIN, VAL and TEST")
        self.split = Split[split]
        self.root = Path(root).expanduser()
        self.extra = Path(extra).expanduser() if extra else self.root
        entries = self.extra / f"entries-{split}.npy"
        if not entries.is_file():
            remedy = f"dino2 prepare-imagenet --root {self.root} --extra {self.extra} --split {split}"
            raise DataError(f"{entries} does not exist: this ImageNet has not been prepared", remedy)
        self._entries = RecordFile(entries)

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]  # read when asked for
        names = self.extra / f"class-names-{self.split.name}.npy"
        return tuple(str(name) for name in np.load(names)) if names.is_file() else ()

    def __len__(self) -> int:
        return len(self._entries)

    def encoded(self, index: int) -> bytes:
        return read_file(self.path(index))

    def path(self, index: int) -> str:
        entry = self._entries[index]
        return str(self.root / self.split.image_path(str(entry["class_id"]), int(entry["actual_index"])))

    def target(self, index: int) -> int:
        class_index = int(self._entries[index]["class_index"])
        return UNLABELLED if class_index == NO_CLASS else class_index

    def targets(self) -> np.ndarray:
        classes = self._entries.column("class_index")
        return np.where(classes == NO_CLASS, UNLABELLED, classes.astype(np.int64))

    def describe(self) -> str:
        part = "" if len(self) == self.split.full_size else f" of {self.split.full_size}"
        return f"ImageNet {self.split.name} in {self.root}: {len(self)}{part} images, {len(self.class_names)} classes"
