"""Two small sets with labels for every pixel, made of the built-in photos: nothing to download.

    python examples/dense_sets.py FOLDER [IMAGES FOR TRAINING] [FOR MEASURING]

FOLDER/shapes: photos with shapes cut out of others; a pixel's class is the photo that it is of. Colours do not tell.
FOLDER/things: the same, of things whose size is known; how far away each is, in millimetres,
follows from what it is (the larger, the farther away it fills a photo) and how small it is shown.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from dinov2cli.data.datasets.sample_photos import PHOTOS, SIZE, SamplePhotos

Make = Callable[[SamplePhotos, np.random.Generator], tuple[np.ndarray, np.ndarray]]
PARTS = {"train": "TRAIN", "val": "VAL"}
BY_SIZE = ("coins", "page", "grass", "brick", "moon", "hubble_deep_field")
"""Photos of things, the smallest first."""
NEAREST, FARTHEST, SMALLEST = 1.0, 5.0, 1.5
"""Metres at which the smallest and the largest of them fill an image, and how much smaller they are shown, at most."""


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


def pieces(make: Make, least: int, photos: SamplePhotos, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [SIZE, SIZE, 3], and labels [SIZE, SIZE], with shapes of `least` to `least` + 2 others."""
    image, labels = make(photos, rng)
    for _ in range(rng.integers(least, least + 3)):
        other, its = make(photos, rng)
        inside = shape(rng)
        image[inside], labels[inside] = other[inside], its[inside]
    return image, labels


def whole(photos: SamplePhotos, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A photo's crop and its class at every pixel, uint8."""
    image, label = photos[int(rng.integers(len(photos)))]
    return image.copy(), np.full((SIZE, SIZE), label, np.uint8)


def thing(photos: SamplePhotos, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A photo's crop, made smaller and seen several times, mirrored, and how far away that is: millimetres, uint16."""
    kind = int(rng.integers(len(BY_SIZE)))
    of_it = photos.per_class * photos.class_names.index(BY_SIZE[kind])
    crop, _ = photos[of_it + int(rng.integers(photos.per_class))]
    smaller = SMALLEST ** rng.random()
    side = round(SIZE / smaller)
    tile = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)
    tile = np.concatenate([tile, tile[::-1]])
    tile = np.concatenate([tile, tile[:, ::-1]], axis=1)
    top, left = rng.integers(0, 2 * side, 2)
    away = (np.arange(SIZE)[:, None] + top) % (2 * side), (np.arange(SIZE) + left) % (2 * side)
    metres = NEAREST * (FARTHEST / NEAREST) ** (kind / (len(BY_SIZE) - 1)) * smaller
    return tile[away], np.full((SIZE, SIZE), round(1000 * metres), np.uint16)


def main(folder: Path, train: int = 400, val: int = 100) -> None:
    for number, (part, split) in enumerate(PARTS.items()):
        photos, rng = SamplePhotos(split), np.random.default_rng(number)
        for name, make, labels in (("shapes", whole, "masks"), ("things", thing, "depth")):
            places = [folder / name / kind / part for kind in ("images", labels)]
            for place in places:
                place.mkdir(parents=True, exist_ok=True)
            for i in range((train, val)[number]):
                image, label = pieces(make, int(labels == "masks"), photos, rng)
                cv2.imwrite(str(places[0] / f"{i:04d}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
                cv2.imwrite(str(places[1] / f"{i:04d}.png"), label)
    names = "".join(f"{name.partition('.')[0]}\n" for name in PHOTOS)
    (folder / "shapes" / "classes.txt").write_text(names)
    print(f"{folder / 'shapes'} and {folder / 'things'}: {train} images to train on, {val} to measure on")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
