"""Image transforms of the evaluations."""

from typing import Any

import numpy as np
from torch import Tensor

from dinov2cli.config.images import IMAGENET, RGB, Images, Statistics
from dinov2cli.config.library import LibraryConfig
from dinov2cli.config.vit import ViTConfig
from dinov2cli.data import pixels
from dinov2cli.data.crop_parameters import CROP_TRIES, random_box

STANDARD_SIZE = 224
RESIZE_RATIO = 256 / 224


def usual_size(config: ViTConfig | LibraryConfig) -> int:
    """Side in pixels at which a model is evaluated by default: its own, at most 224.

    Models with position embeddings for 518 pixels are evaluated at 224, as in the paper.
    """
    return min(config.img_size, max(STANDARD_SIZE // config.patch_size, 1) * config.patch_size)


class EvalTransform:
    """Resize the short side to `resize` (bicubic, antialiased), cut the central `crop` x `crop` square, normalise."""

    def __init__(self, resize: int = 256, crop: int = 224, images: Images = RGB) -> None:
        self.resize, self.crop, self.images = resize, crop, images

    @classmethod
    def at(cls, size: int, images: Images = RGB) -> "EvalTransform":
        """That of k-NN, linear probes and `dino2 embed` for features at `size` pixels."""
        return cls(round(size * RESIZE_RATIO), size, images)

    def as_dict(self) -> dict[str, Any]:
        """All that it does, for files that are used without this package."""
        special = self.images.beside_weights()
        reading = self.images.model_dump(mode="json", include={"exif_orientation", "background", "value_range"})
        return {
            **reading,
            "color": "RGB" if self.images.are_rgb else f"{self.images.in_chans} channels",
            "resize_shorter_side": self.resize,
            "interpolation": "bicubic",
            "antialias": True,
            "center_crop": self.crop,
            "rescale_factor": 1 / 255,
            "mean": list(self.images.statistics.mean),
            "std": list(self.images.statistics.std),
            **({"images": special} if special else {}),
        }

    def __call__(self, image: np.ndarray) -> Tensor:
        """uint8, or float32 in 0..1, [H, W, C] -> float32 [C, crop, crop]. A side shorter is padded with black."""
        height, width = image.shape[:2]
        short = min(height, width)
        image = pixels.resize(image, int(self.resize * height / short), int(self.resize * width / short))
        return pixels.normalize_image(_center_crop(image, self.crop), self.images.statistics)


class WholeTransform(EvalTransform):
    """Resize the long side to `crop` (bicubic, antialiased), pad the other with black to a square, normalise."""

    def __call__(self, image: np.ndarray) -> Tensor:
        """As `EvalTransform`."""
        height, width = image.shape[:2]
        scale = self.crop / max(height, width)
        image = pixels.resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
        return pixels.normalize_image(_center_crop(image, self.crop), self.images.statistics)


class RandomResizedCrop:
    """Augmentation of linear probing: a random box of 8 to 100 % of the area resized to `size`, flip, normalise."""

    def __init__(self, size: int = 224, statistics: Statistics = IMAGENET) -> None:
        self.size, self.statistics = size, statistics

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Tensor:
        """uint8, or float32 in 0..1, [H, W, C] -> float32 [C, size, size]."""
        *tries, down, right, mirror = rng.random(2 * CROP_TRIES + 3).tolist()
        height, width = image.shape[:2]
        box = random_box((0.08, 1.0), height, width, tries, down, right)
        crop = pixels.resized_crop(image, *box, self.size)
        return pixels.normalize_image(pixels.flip(crop) if mirror < 0.5 else crop, self.statistics)


def _center_crop(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    if height < size or width < size:
        down, right = max(0, size - height), max(0, size - width)
        image = np.pad(image, ((down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0)))
        height, width = image.shape[:2]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]
