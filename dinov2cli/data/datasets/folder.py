"""A folder of images, with class subfolders or without."""

import os
from pathlib import Path

from dinov2cli.console import counted, logger
from dinov2cli.data.datasets.base import UNLABELLED, require_images
from dinov2cli.data.datasets.listing import FilesDataset, list_images
from dinov2cli.errors import DataError
from dinov2cli.files import user_path

REMEDIES = {
    ".tar": "Give the folder in which the .tar files lie.",
    ".parquet": "Give the folder in which the .parquet files lie.",
    ".arrow": "Hugging Face's datasets keeps such files for itself: to_parquet(FILE) writes one that is read.",
    "": "Files are recognised by their extension (.jpg, .png, ...).",
}
_told: set[Path] = set()
"""Folders whose other files have been named."""


class FolderDataset(FilesDataset):
    """All images under `root`, sorted by path.

    The class of an image is the first folder below `root` on its path, however deep it lies; images directly in
    `root` have no label, and if all lie there the dataset has no classes. Hidden files and folders are ignored,
    symlinks are followed.

    Raises:
        DataError: `root` is not a folder or holds no image.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = user_path(root)
        if not os.path.isdir(self.root):
            raise DataError(f"{self.root} is not a folder", "Give a folder of images, or a dataset such as "
                            "ImageNet:split=TRAIN:root=<path>:extra=<path>")  # fmt: skip
        self._prefix = os.path.join(self.root, "")
        self._paths, self._classes, self.class_names, others = list_images(self.root)
        of_others = ", ".join(f"{count} {suffix}" for suffix, count in list(others.items())[:8])
        where = f"{self.root}; it holds {of_others}" if others else str(self.root)
        remedy = next((REMEDIES[suffix] for suffix in REMEDIES if suffix in others), REMEDIES[""])
        require_images(len(self._paths), where, remedy)
        if others and self.root not in _told:
            _told.add(self.root)
            passed_over = counted(sum(others.values()), "file")
            logger.info("%s: passed over %s of other types: %s", self.root, passed_over, of_others)

    def describe(self) -> str:
        classes = f", {len(self.class_names)} classes" if self.class_names else ", no labels"
        unlabelled = int((self._classes == UNLABELLED).sum())
        if self.class_names and unlabelled:
            classes += f" ({unlabelled} images directly in the folder have no label)"
        return f"folder {self.root}: {counted(len(self), 'image')}{classes}"
