"""ImageNet-22k as released: a tar file a class, read by block without unpacking."""

import gzip
import os
from functools import cached_property

import numpy as np

from dinov2cli.data.datasets.base import ImageDataset, OpenFiles, RecordFile, read_texts
from dinov2cli.data.decoding import UnreadableImage
from dinov2cli.errors import DataError
from dinov2cli.files import user_path

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
