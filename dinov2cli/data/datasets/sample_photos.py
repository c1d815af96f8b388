"""Twelve real photos that scikit-image ships, cut into a small labelled dataset: nothing to download."""

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from dinov2cli.data.datasets.base import ImageDataset, LazyImage
from dinov2cli.data.decoding import decode_image
from dinov2cli.data.randomness import Stream, keyed_rng
from dinov2cli.errors import DataError, EnvironmentProblem

PHOTOS = (
    "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SPLITS = {"TRAIN": 100, "VAL": 25}
"""Crops of each photo."""
TRAIN_SHARE = 0.6
"""TRAIN sees this share of a photo's width, from the left; VAL the rest. They share no pixel."""
SIDE_RANGE = (0.35, 0.9)
"""Sides of a crop as a share of the sides of its part of the photo."""
SIZE = 160
"""Height and width of every image, in pixels."""


class SamplePhotos(ImageDataset):
    """Deterministic random crops, a class per photo.

    Args:
        split: TRAIN (1200 images) or VAL (300).

    Raises:
        DataError: unknown split.
        EnvironmentProblem: scikit-image is not installed.
    """

    class_names = tuple(name.partition(".")[0] for name in PHOTOS)

    def __init__(self, split: str = "TRAIN") -> None:
        if split not in SPLITS:
            raise DataError(f"SamplePhotos has no split {split!r}; it has {' and '.join(SPLITS)}")
        self.split = split
        self.per_class = SPLITS[split]
        self.parts = [_part_of(photo, split) for photo in _load_photos()]

    def __len__(self) -> int:
        return len(PHOTOS) * self.per_class

    def image(self, index: int) -> np.ndarray:
        self._check_index(index)
        part = self.parts[index // self.per_class]
        height, width = part.shape[:2]
        rng = keyed_rng(0, Stream.SAMPLE_PHOTOS, index, list(SPLITS).index(self.split))
        side, down, right = rng.random(3)
        share = SIDE_RANGE[0] + (SIDE_RANGE[1] - SIDE_RANGE[0]) * side
        h, w = int(height * share), int(width * share)
        top, left = int((height - h) * down), int((width - w) * right)
        return cv2.resize(part[top : top + h, left : left + w], (SIZE, SIZE), interpolation=cv2.INTER_AREA)

    def open(self, index: int) -> LazyImage:
        return _Pixels(self.image(index))

    def encoded(self, index: int) -> bytes:
        return cv2.imencode(".png", cv2.cvtColor(self.image(index), cv2.COLOR_RGB2BGR))[1].tobytes()

    def path(self, index: int) -> str:
        return f"SamplePhotos:split={self.split}#{index} ({self.class_names[index // self.per_class]})"

    def targets(self) -> np.ndarray:
        return np.repeat(np.arange(len(PHOTOS)), self.per_class)

    def describe(self) -> str:
        return f"SamplePhotos {self.split}: {len(self)} crops of {len(PHOTOS)} photos"


class _Pixels(LazyImage):
    """Pixels that were never a file of their own."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self._header = None


def _part_of(photo: np.ndarray, split: str) -> np.ndarray:
    cut = int(photo.shape[1] * TRAIN_SHARE)
    return photo[:, :cut] if split == "TRAIN" else photo[:, cut:]


def _load_photos() -> list[np.ndarray]:
    spec = find_spec("skimage")  # found, not imported: only its files are needed
    if spec is None or spec.origin is None:
        raise EnvironmentProblem(
            "SamplePhotos uses the photos of scikit-image, which is not installed", "pip install 'dinov2cli[demo]'"
        )
    folder = Path(spec.origin).parent / "data"
    missing = [name for name in PHOTOS if not (folder / name).is_file()]
    if missing:
        raise EnvironmentProblem(
            f"this scikit-image does not ship {', '.join(missing)} in {folder}", "pip install 'dinov2cli[demo]'"
        )
    return [decode_image((folder / name).read_bytes(), str(folder / name)) for name in PHOTOS]
