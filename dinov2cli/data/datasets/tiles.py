"""Images cut into tiles, each of which counts as an image."""

import numpy as np

from dinov2cli.console import progress
from dinov2cli.data.crop_parameters import Box
from dinov2cli.data.datasets.base import ImageDataset, PerProcess
from dinov2cli.data.datasets.joined import RowsDataset
from dinov2cli.data.decoding import USUAL, LazyImage, Reading, UnreadableImage
from dinov2cli.data.regions import LargeImage


class TiledDataset(RowsDataset):
    """The tiles of all images of a dataset, image by image, row by row.

    Tiles are `size` x `size` pixels; the last of a row or column ends at the image's edge, and lies over the one before
    it more than others do. An image smaller than a tile is one tile.

    Args:
        overlap: pixels that neighbours share.
    """

    def __init__(self, images: ImageDataset, size: int, overlap: int = 0, reading: Reading = USUAL) -> None:
        self.base, self.size, self.overlap = images, size, overlap
        self._opened = PerProcess(images.open)  # the last one: tiles of an image follow each other
        boxes: list[Box] = []
        counts = np.empty(len(images), np.int64)
        with progress() as bar:
            for i in bar.track(range(len(images)), description="Sizes of images"):
                before = len(boxes)
                try:
                    height, width = self._opened(i, reading).size
                    boxes += [
                        Box(top, left, min(size, height), min(size, width))
                        for top in starts(height, size, overlap)
                        for left in starts(width, size, overlap)
                    ]
                except UnreadableImage:
                    boxes.append(Box(0, 0, 0, 0))  # it will be named when it is read
                counts[i] = len(boxes) - before
        self.boxes = np.array(boxes, np.int64).reshape(-1, 4)
        """Top, left, height, width: int64 [N, 4]; zeros for an image that cannot be read."""
        super().__init__(images, np.repeat(np.arange(len(images)), counts))

    def image(self, index: int, reading: Reading = USUAL) -> np.ndarray:
        self._check_index(index)
        box = Box(*self.boxes[index].tolist())
        image = self._opened(int(self.rows[index]), reading)
        if isinstance(image, LargeImage):
            return image.region(box)
        return image.pixels()[box.top : box.top + box.height, box.left : box.left + box.width]

    def open(self, index: int, reading: Reading = USUAL) -> LazyImage:
        raise NotImplementedError("tiles are for features, not for training")

    def describe(self) -> str:
        shared = f" that share {self.overlap}" if self.overlap else ""
        return f"{len(self)} tiles of {self.size} pixels{shared}: {self.base.describe()}"


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles begin on a side of `length` pixels."""
    return [*range(0, length - size, size - overlap), max(0, length - size)]
