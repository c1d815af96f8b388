"""Operations on images, uint8 or float32 in 0..1, [H, W, C] -> [H, W, C]; those of colour, on three channels.

On uint8 they have Pillow's arithmetic, in OpenCV's and torch's kernels: results of those that torchvision has for
Pillow images differ from them by less than a grey level on average.
"""

import math
from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from dinov2cli.config.images import IMAGENET, Statistics

BLUR_KERNEL = 9
"""Width in pixels of the Gaussian blur of the crops."""

_TRUNCATE = -0.4999  # Pillow truncates what it blends, OpenCV rounds
# [3, 4] matrices of colour: saturation f is _GRAY + f * _COLOR.
_GRAY = np.array([[0.299, 0.587, 0.114, _TRUNCATE]] * 3, dtype=np.float32)
_COLOR = np.eye(3, 4, dtype=np.float32) - np.array([0.299, 0.587, 0.114, 0], dtype=np.float32)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing (a = -0.5, support grown with the scale), as Pillow's `resize`."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    if image.dtype == np.uint8 and (channels := image.shape[2]) not in (3, 4):
        # torch's vectorised kernel for bytes is for three or four channels, and ten times as fast as the other.
        threes = [image[..., first : first + 3] for first in range(0, channels, 3)]
        threes[-1] = np.pad(threes[-1], ((0, 0), (0, 0), (0, -channels % 3)))
        parts = [resize(np.ascontiguousarray(three), height, width) for three in threes]
        return np.ascontiguousarray(np.concatenate(parts, axis=2)[..., :channels])
    # torch picks its vectorised kernel by the strides of a channels-last tensor, batch stride included.
    nchw = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(nchw, size=(height, width), mode="bicubic", antialias=True)
    if image.dtype != np.uint8:
        resized.clamp_(0, 1)  # as bytes are
    return resized.permute(0, 2, 3, 1)[0].numpy()


def resized_crop(image: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """The box of `image` at (top, left), resized to [size, size, C]."""
    return resize(image[top : top + height, left : left + width], size, size)


def flip(image: np.ndarray) -> np.ndarray:
    """Mirrored left to right."""
    return cv2.flip(image, 1).reshape(image.shape)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with black; 1 is the identity."""
    if image.dtype != np.uint8:
        return _clipped(image * np.float32(factor))
    return cv2.convertScaleAbs(image, alpha=factor, beta=_TRUNCATE).reshape(image.shape)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with its mean grey; 1 is the identity."""
    red, green, blue, _ = cv2.mean(image)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    if image.dtype != np.uint8:
        return _clipped(image * np.float32(factor) + np.float32((1 - factor) * luma))
    mean = int(luma + 0.5)
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean + _TRUNCATE)


def adjust_channel_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Each channel blended with its own mean, for channels that are no colours; 1 is the identity."""
    mean = image.mean(axis=(0, 1), dtype=np.float32)
    if image.dtype != np.uint8:
        return _clipped(image * np.float32(factor) + np.float32(1 - factor) * mean)
    blended = image * np.float32(factor) + (np.float32(1 - factor) * np.floor(mean + np.float32(0.5)) + 1e-3)
    whole: np.ndarray = np.clip(blended, 0, 255).astype(np.uint8)
    return whole


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with its grey version; 1 is the identity."""
    if image.dtype != np.uint8:
        matrix = (_GRAY + np.float32(factor) * _COLOR)[:, :3]
        return _clipped(cv2.transform(image, matrix))
    return cv2.transform(image, _GRAY + np.float32(factor) * _COLOR)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Hue turned by `shift` of the colour circle, -0.5..0.5."""
    if image.dtype != np.uint8:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + np.float32(360 * shift)) % 360
        return _clipped(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(len(hsv), -1)
    rows += _hue_bytes(hsv.shape[1]) * np.uint8(int(shift * 255) % 256)  # a byte wraps as the circle does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian of 9 x 9 pixels, mirrored at the border; `sigma` above 0."""
    kernel = cv2.getGaussianKernel(2 * blur_radius(sigma) + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101).reshape(image.shape)


def blur_radius(sigma: float) -> int:
    """Pixels either side that matter: at most 4, fewer where those beyond weigh less than exp(-10) of the centre."""
    return max(1, min(BLUR_KERNEL // 2, math.ceil(math.sqrt(20) * sigma) - 1))


def solarize(image: np.ndarray) -> np.ndarray:
    """Levels of 128 (of 0..1, a half) and above inverted."""
    inverted = cv2.bitwise_not(image) if image.dtype == np.uint8 else 1 - image
    return cv2.min(image, inverted).reshape(image.shape)


def without_channels(image: np.ndarray, levels: tuple[tuple[int, float], ...]) -> np.ndarray:
    """With some channels, by number, set to a level from 0 to 1."""
    image = image.copy()
    for channel, level in levels:
        image[..., channel] = round(level * 255) if image.dtype == np.uint8 else level
    return image


def normalize_image(image: np.ndarray, statistics: Statistics = IMAGENET) -> torch.Tensor:
    """[H, W, C] -> float32 [C, H, W] with this mean and standard deviation."""
    mean, std = _levels(statistics, image.dtype == np.uint8)
    return torch.from_numpy(np.ascontiguousarray(((image - mean) / std).transpose(2, 0, 1)))


@lru_cache
def _levels(statistics: Statistics, of_bytes: bool) -> tuple[np.ndarray, np.ndarray]:
    mean, std = (np.array(levels, np.float32) * (255 if of_bytes else 1) for levels in statistics)
    return mean, std


def _clipped(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 1, out=image)


@lru_cache
def _hue_bytes(width: int) -> np.ndarray:
    """1 where a row of `width` HSV pixels holds a hue, uint8 [3 * width]."""
    return np.tile(np.array([1, 0, 0], dtype=np.uint8), width)
