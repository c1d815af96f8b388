"""Two small sets with labels for every pixel, made of the built-in photos: nothing to download.

    python examples/dense_sets.py FOLDER [IMAGES FOR TRAINING] [FOR MEASURING]

FOLDER/shapes: photos with shapes cut out of others; a pixel's class is the photo that it is of. Colours do not tell.
FOLDER/rooms: a floor and a wall covered with photos, and how far away they are,
in millimetres; finer structure is farther.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from dinov2cli.data.datasets.sample_photos import PHOTOS, SIZE, SamplePhotos

PARTS = {"train": "TRAIN", "val": "VAL"}
EYES, FOCAL, FINER = 1.5, 80.0, 4  # metres above the floor, pixels, times as many pixels while a room is drawn


def shape(rng: np.random.Generator) -> np.ndarray:
    """A disc, a rectangle or a triangle, bool [SIZE, SIZE]."""
    mask, middle = np.zeros((SIZE, SIZE), np.uint8), rng.integers(16, SIZE - 16, 2)
    if (kind := rng.integers(3)) == 0:
        cv2.circle(mask, middle.tolist(), int(rng.integers(16, 30)), 1, -1)
    else:
        angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(5 - kind) / (5 - kind)
        corners = middle + rng.integers(20, 38) * np.stack([np.cos(angles), np.sin(angles)], 1)
        cv2.fillPoly(mask, [corners.astype(np.int32)], 1)
    return mask.astype(bool)


def shapes(photos: SamplePhotos, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [SIZE, SIZE, 3], and its classes, uint8 [SIZE, SIZE]."""
    image, classes = whole(photos, rng)
    for _ in range(rng.integers(1, 4)):
        other, its = whole(photos, rng)
        inside = shape(rng)
        image[inside], classes[inside] = other[inside], its[inside]
    return image, classes


def whole(photos: SamplePhotos, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A photo's crop and its class at every pixel."""
    image, label = photos[int(rng.integers(len(photos)))]
    return image.copy(), np.full((SIZE, SIZE), label, np.uint8)


def room(photos: SamplePhotos, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [SIZE, SIZE, 3], and millimetres, uint16 [SIZE, SIZE]."""
    side, focal, wall = SIZE * FINER, FOCAL * FINER, rng.uniform(2, 9)
    horizon = side * rng.uniform(0.2, 0.5)
    across, down = np.meshgrid(np.arange(side) - side / 2, np.arange(side) - horizon)
    floor = EYES * focal / np.maximum(down, 1e-3)
    depth = np.minimum(floor, wall)
    surface = np.where(floor < wall, depth, down * depth / focal)  # metres along the floor, or up the wall
    image = np.empty((side, side, 3), np.uint8)
    for part in (floor < wall, floor >= wall):
        photo = np.tile(whole(photos, rng)[0], (2, 2, 1))
        photo[SIZE:], photo[:, SIZE:] = photo[SIZE - 1 :: -1], photo[:, SIZE - 1 :: -1]  # mirrored, so that it repeats
        start = rng.uniform(0, 2 * SIZE, 2)
        x, y = (start[0] + across * depth / focal * SIZE) % (2 * SIZE), (start[1] + surface * SIZE) % (2 * SIZE)
        seen = cv2.remap(
            photo, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
        )
        image[part] = seen[part]
    small = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return small, np.rint(1000 * depth[FINER // 2 :: FINER, FINER // 2 :: FINER]).astype(np.uint16)


def main(folder: Path, train: int = 400, val: int = 100) -> None:
    for number, (part, split) in enumerate(PARTS.items()):
        photos, rng = SamplePhotos(split), np.random.default_rng(number)
        for name, make, labels in (("shapes", shapes, "masks"), ("rooms", room, "depth")):
            places = [folder / name / kind / part for kind in ("images", labels)]
            for place in places:
                place.mkdir(parents=True, exist_ok=True)
            for i in range((train, val)[number]):
                image, label = make(photos, rng)
                cv2.imwrite(str(places[0] / f"{i:04d}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
                cv2.imwrite(str(places[1] / f"{i:04d}.png"), label)
    names = "".join(f"{name.partition('.')[0]}\n" for name in PHOTOS)
    (folder / "shapes" / "classes.txt").write_text(names)
    print(f"{folder / 'shapes'} and {folder / 'rooms'}: {train} images to train on, {val} to measure on")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
