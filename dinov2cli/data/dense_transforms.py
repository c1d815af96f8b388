"""Transforms of images and of the labels of their pixels, together.

The steps and their numbers are those of mmsegmentation and of the Monocular-Depth-Estimation-Toolbox, with which the
DINOv2 paper's heads were trained: bilinear without antialiasing for images, nearest for labels.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from dinov2cli.config.images import IMAGENET, Statistics
from dinov2cli.data import pixels
from dinov2cli.data.datasets.dense import IGNORED
from dinov2cli.data.datasets.dense_layouts import DepthProtocol

LONGEST = 4
"""An image is not enlarged until its longer side is more than so many times the short side that is wanted."""
CROP_TRIES = 10
LARGEST_SHARE = 0.75
"""Of one class in a crop, while another can be found."""
DEGREES = 2.5
NYU_BOX = (slice(45, 472), slice(43, 608))
"""Rows and columns of NYU's images within their white frame."""
EIGEN = (slice(45, 471), slice(41, 601))
"""Rows and columns of 480 x 640 that are measured (Eigen et al. 2014)."""
GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
"""Top, bottom, left and right of what is measured, as shares of the sides (Garg et al. 2016)."""
KITTI_SIZE = (352, 1216)
"""Height and width at the bottom of the middle of KITTI's images."""


class DenseSample(NamedTuple):
    """A normalised image, float32 [C, H, W], and its labels [H, W]: uint8 classes, or float32 metres."""

    image: Tensor
    labels: Tensor


def size_for(image: np.ndarray, short_side: float) -> tuple[int, int]:
    """Height and width of an image [H, W, C] with that short side, the proportions kept."""
    height, width = image.shape[:2]
    scale = min(short_side / min(height, width), LONGEST * short_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, [H, W, C] of bytes or floats."""
    if image.shape[:2] == (height, width):
        return image
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return resized.reshape(height, width, image.shape[2])


def resize_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The nearest, [H, W]."""
    if labels.shape == (height, width):
        return labels
    return np.asarray(cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST))


class SegmentationCrop:
    """Resize to a random scale, cut a crop, flip, distort the colours, normalise, fill up.

    Args:
        short_side: in pixels, before the random factor.
        crop: side of the crop.
        factors: between which the scale is drawn.
    """

    def __init__(
        self,
        short_side: int,
        crop: int,
        factors: tuple[float, float] = (0.5, 2.0),
        statistics: Statistics = IMAGENET,
    ) -> None:
        self.short_side, self.crop, self.factors, self.statistics = short_side, crop, factors, statistics

    def __call__(self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> DenseSample:
        height, width = size_for(image, self.short_side * rng.uniform(*self.factors))
        places, mirror = rng.random((CROP_TRIES, 2)), rng.random() < 0.5
        classes = resize_labels(labels, height, width)
        box = self._box(classes, places)
        cut, classes = resize(image, height, width)[box], classes[box]
        if mirror:
            cut, classes = pixels.flip(cut), classes[:, ::-1]
        return filled_up(distorted(cut, rng), np.ascontiguousarray(classes), self.crop, self.crop, self.statistics)

    def _box(self, classes: np.ndarray, places: np.ndarray) -> tuple[slice, slice]:
        """The first of the random boxes in which no class has more than three quarters of the pixels, else the last."""
        height, width = classes.shape
        for down, right in places:
            top = int(max(height - self.crop, 0) * down + 0.5)
            left = int(max(width - self.crop, 0) * right + 0.5)
            box = slice(top, top + self.crop), slice(left, left + self.crop)
            counts = np.bincount(classes[box].ravel(), minlength=IGNORED + 1)[:IGNORED]
            if (counts > 0).sum() > 1 and counts.max() < LARGEST_SHARE * counts.sum():
                break
        return box


class CentreCrop:
    """Without chance: resize the short side, cut the middle, normalise, fill up. For masks."""

    def __init__(self, short_side: int, crop: int, statistics: Statistics = IMAGENET) -> None:
        self.short_side, self.crop, self.statistics = short_side, crop, statistics

    def __call__(self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator | None = None) -> DenseSample:
        height, width = size_for(image, self.short_side)
        top, left = max(height - self.crop, 0) // 2, max(width - self.crop, 0) // 2
        box = slice(top, top + self.crop), slice(left, left + self.crop)
        cut, classes = resize(image, height, width)[box], resize_labels(labels, height, width)[box]
        return filled_up(cut, np.ascontiguousarray(classes), self.crop, self.crop, self.statistics)


class DepthCrop:
    """Turn a little, flip, cut a crop, change the colours, normalise, fill up.

    Args:
        protocol: what part of an image is used, the size of the crop and how much colours change.
        short_side: to which images are resized first; None: they are not.
        fixed: without chance: the middle, as it is.
    """

    def __init__(
        self,
        protocol: DepthProtocol,
        short_side: int | None = None,
        statistics: Statistics = IMAGENET,
        *,
        fixed: bool = False,
    ) -> None:
        self.protocol, self.short_side, self.statistics, self.fixed = protocol, short_side, statistics, fixed

    def __call__(self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> DenseSample:
        image, labels = used_part(image, labels, self.protocol, trains=True)
        if self.short_side is not None:
            size = size_for(image, self.short_side)
            image, labels = resize(image, *size), resize_labels(labels, *size)
        turns, degrees, mirror, down, right = rng.random(5).tolist()
        if self.fixed:
            turns, mirror, down, right = 1.0, 1.0, 0.5, 0.5
        if turns < 0.5:
            image, labels = rotated(image, labels, DEGREES * (2 * degrees - 1))
        if mirror < 0.5:
            image, labels = pixels.flip(image), labels[:, ::-1]
        height, width = self.protocol.crop
        top = int(max(image.shape[0] - height, 0) * down + 0.5)
        left = int(max(image.shape[1] - width, 0) * right + 0.5)
        box = slice(top, top + height), slice(left, left + width)
        cut = image[box]
        if not self.fixed and rng.random() < 0.5:
            cut = coloured(cut, rng, self.protocol.brightness)
        return filled_up(cut, np.ascontiguousarray(labels[box]), height, width, self.statistics, 0)


def used_part(
    image: np.ndarray, labels: np.ndarray, protocol: DepthProtocol, *, trains: bool
) -> tuple[np.ndarray, np.ndarray]:
    """An image and its labels, without what the benchmark leaves out: in training and, of KITTI, also in measuring."""
    if protocol.cut == "nyu" and trains:
        return np.ascontiguousarray(image[NYU_BOX]), labels[NYU_BOX]
    if protocol.cut == "kitti":
        height, width = KITTI_SIZE
        top, left = max(image.shape[0] - height, 0), max(image.shape[1] - width, 0) // 2
        box = slice(top, top + height), slice(left, left + width)
        return np.ascontiguousarray(image[box]), labels[box]
    return image, labels


def counted_part(height: int, width: int, protocol: DepthProtocol) -> tuple[slice, slice]:
    """Rows and columns of a map of that size that are measured."""
    if protocol.counted == "eigen" and (height, width) == (480, 640):
        return EIGEN
    if protocol.counted == "garg":
        top, bottom, left, right = GARG
        return slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width))
    return slice(0, height), slice(0, width)


def rotated(image: np.ndarray, labels: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """About the middle; black, and no labels, where nothing was."""
    height, width = labels.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    size, labels = (width, height), np.ascontiguousarray(labels)
    turned = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR).reshape(image.shape)
    return turned, np.asarray(cv2.warpAffine(labels, matrix, size, flags=cv2.INTER_NEAREST))


def distorted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """mmsegmentation's photometric distortion: brightness, contrast before or after saturation and hue, each half the
    time. [H, W, C] of bytes or 0..1 -> float32 in 0..1; of channels that are no colours, brightness and contrast."""
    chances = rng.random(5) < 0.5
    brightness, contrast, saturation, hue = rng.uniform((-32 / 255, 0.5, 0.5, -0.1), (32 / 255, 1.5, 1.5, 0.1))
    shown = as_floats(image)
    if chances[0]:
        shown = np.clip(shown + np.float32(brightness), 0, 1)
    if chances[1] and chances[2]:
        shown = np.clip(shown * np.float32(contrast), 0, 1)
    if image.shape[2] == 3:
        if chances[3]:
            hsv = cv2.cvtColor(shown, cv2.COLOR_RGB2HSV)
            hsv[..., 1] = np.clip(hsv[..., 1] * np.float32(saturation), 0, 1)
            shown = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if chances[4]:
            shown = pixels.adjust_hue(shown, float(hue))
    if chances[1] and not chances[2]:
        shown = np.clip(shown * np.float32(contrast), 0, 1)
    return shown


def coloured(image: np.ndarray, rng: np.random.Generator, brightness: tuple[float, float]) -> np.ndarray:
    """A power, a factor, and a factor for each channel: [H, W, C] -> float32 in 0..1."""
    power, factor = rng.uniform(0.9, 1.1), rng.uniform(*brightness)
    factors = np.asarray(rng.uniform(0.9, 1.1, image.shape[2]) * factor, np.float32)
    return np.asarray(np.clip(as_floats(image) ** np.float32(power) * factors, 0, 1))


def as_floats(image: np.ndarray) -> np.ndarray:
    """In 0..1."""
    return image.astype(np.float32) / np.float32(255) if image.dtype == np.uint8 else image.astype(np.float32)


def filled_up(
    image: np.ndarray, labels: np.ndarray, height: int, width: int, statistics: Statistics, nothing: Any = IGNORED
) -> DenseSample:
    """Normalised, and of at least that size: zeros to the right and below, where the labels are `nothing`."""
    down, right = max(height - image.shape[0], 0), max(width - image.shape[1], 0)
    normalised = pixels.normalize_image(image, statistics)
    return DenseSample(
        torch.nn.functional.pad(normalised, (0, right, 0, down)),
        torch.from_numpy(np.pad(labels, ((0, down), (0, right)), constant_values=nothing)),
    )
