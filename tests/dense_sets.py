"""Small sets with labels for every pixel, in the layouts that are known."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([(220, 40, 40), (40, 220, 40), (40, 40, 220)], np.uint8)


def pair(rng: np.random.Generator, height: int = 32, width: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """An image, and masks of three classes that its colours tell, with some noise."""
    classes = np.full((height, width), rng.integers(3), np.uint8)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    classes[top : top + height // 2, left : left + width // 2] = rng.integers(3)
    image = COLOURS[classes].astype(np.int64) + rng.integers(-30, 31, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), classes


def write_masks(root: Path, train: int = 8, val: int = 4) -> Path:
    """images/ and masks/, each with train/ and val/; 255 along the upper edge of masks."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for folder in ("images", "masks"):
            (root / folder / part).mkdir(parents=True)
        for i in range(count):
            image, classes = pair(rng)
            classes[0] = 255
            Image.fromarray(image).save(root / "images" / part / f"{i}.png")
            Image.fromarray(classes).save(root / "masks" / part / f"{i}.png")
    return root


def write_depths(root: Path, train: int = 8, val: int = 4) -> Path:
    """images/ and depth/, each with train/ and val/: 1, 2 and 4 m by colour, unknown along the upper edge."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for folder in ("images", "depth"):
            (root / folder / part).mkdir(parents=True)
        for i in range(count):
            image, classes = pair(rng)
            metres = np.array([1.0, 2.0, 4.0])[classes]
            metres[0] = 0
            Image.fromarray(image).save(root / "images" / part / f"{i}.png")
            Image.fromarray((1000 * metres).astype(np.uint16)).save(root / "depth" / part / f"{i}.png")
    return root
