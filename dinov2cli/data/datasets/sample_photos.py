"""Twelve real photos that scikit-image ships, cut into a small labelled dataset: nothing to download.

Which photo a crop is of cannot be told from its colours or its brightness, as it could in nearly all cases (a histogram
of colours named 93 % of the crops of held-out parts): a network that knows the answer has learned to see structure.
"""

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from dinov2cli.data.datasets.base import ImageDataset
from dinov2cli.data.decoding import USUAL, LazyImage, Reading, StoredImage, decode_image
from dinov2cli.data.formats.stored import Stored
from dinov2cli.data.randomness import Stream, keyed_rng
from dinov2cli.errors import DataError, EnvironmentProblem

PHOTOS = (
    "astronaut.png", "brick.png", "chelsea.png", "page.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SPLITS = {"TRAIN": 100, "VAL": 25}
"""Crops of each photo."""
GRID = 5
"""A photo is cut into GRID x GRID tiles: three of five, in diagonals, are TRAIN's, the others VAL's. They share no
pixel, and both see every part of the scene (a left and a right half often show different things)."""
TRAIN_DIAGONALS = (0, 1, 3)
SIDE_RANGE = (0.6, 1.0)
"""Side of a square crop as a share of its tile's shorter side."""
SIZE = 96
"""Height and width of every image, in pixels."""
CAST, BEND = 0.05, 1.4
"""How far the darkest and the lightest shade lie from black and white, at most, in each channel; the largest gamma."""


class SamplePhotos(ImageDataset):
    """Deterministic random crops, a class per photo, in shades between two random colours.

    Every crop's grey levels are spread evenly over all values (histogram equalisation), bent by a random gamma and
    given two random colours for dark and light. All of it depends on the split and the index alone.

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
        photos = (decode_image(file.read_bytes(), str(file)) for file in photo_files(*PHOTOS))
        self.tiles = [_tiles_of(photo, split) for photo in photos]

    def __len__(self) -> int:
        return len(PHOTOS) * self.per_class

    def open(self, index: int, reading: Reading = USUAL) -> LazyImage:
        self._check_index(index)
        tiles = self.tiles[index // self.per_class]
        rng = keyed_rng(0, Stream.SAMPLE_PHOTOS, index, list(SPLITS).index(self.split))
        tile = tiles[int(rng.integers(len(tiles)))]
        share, down, right = rng.random(3)
        side = int(min(tile.shape[:2]) * (SIDE_RANGE[0] + (SIDE_RANGE[1] - SIDE_RANGE[0]) * share))
        top, left = int((tile.shape[0] - side) * down), int((tile.shape[1] - side) * right)
        crop = tile[top : top + side, left : left + side]
        crop = cv2.resize(crop, (SIZE, SIZE), interpolation=cv2.INTER_AREA if side > SIZE else cv2.INTER_CUBIC)
        return StoredImage(Stored(_tinted(crop, rng), "PNG", (0, 255), rgb=True), self.path(index), reading)

    def encoded(self, index: int) -> bytes:
        return cv2.imencode(".png", cv2.cvtColor(self.image(index), cv2.COLOR_RGB2BGR))[1].tobytes()

    def path(self, index: int) -> str:
        return f"SamplePhotos:split={self.split}#{index} ({self.class_names[index // self.per_class]})"

    def targets(self) -> np.ndarray:
        return np.repeat(np.arange(len(PHOTOS)), self.per_class)

    def describe(self) -> str:
        return f"SamplePhotos {self.split}: {len(self)} crops of {len(PHOTOS)} photos"


def _tiles_of(photo: np.ndarray, split: str) -> list[np.ndarray]:
    height, width = (side // GRID for side in photo.shape[:2])
    return [
        photo[row * height : (row + 1) * height, column * width : (column + 1) * width]
        for row in range(GRID)
        for column in range(GRID)
        if ((row * 2 + column) % GRID in TRAIN_DIAGONALS) == (split == "TRAIN")
    ]


def _tinted(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grey = cv2.equalizeHist(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))
    dark, light = CAST * rng.random(3), 1 - CAST * rng.random(3)
    share_of_light = np.linspace(0, 1, 256)[:, None] ** BEND ** rng.uniform(-1, 1)
    shades = np.rint(255 * (dark + (light - dark) * share_of_light)).astype(np.uint8)
    tinted: np.ndarray = shades[grey]
    return tinted


def photo_files(*names: str) -> list[Path]:
    """Files of photos that scikit-image ships, such as `chelsea.png`.

    Raises:
        EnvironmentProblem: scikit-image is not installed, or ships them no longer.
    """
    spec, remedy = find_spec("skimage"), "pip install 'dinov2cli[demo]'"  # found, not imported: its files are all
    if spec is None or spec.origin is None:
        raise EnvironmentProblem("SamplePhotos uses the photos of scikit-image, which is not installed", remedy)
    folder = Path(spec.origin).parent / "data"
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise EnvironmentProblem(f"this scikit-image does not ship {', '.join(missing)} in {folder}", remedy)
    return [folder / name for name in names]
