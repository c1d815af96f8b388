"""Operations on images, uint8 or float32 in 0..1, [H, W, C] -> [H, W, C]; those of colour, on three channels.

On uint8 they have Pillow's arithmetic, in OpenCV's and torch's kernels: results of those that torchvision has for
Pillow images differ from them by less than a grey level on average.
"""

import math
import warnings
from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from dinov2cli.config.images import IMAGENET, Statistics

BLUR_KERNEL = 9
"""Width in pixels of the Gaussian blur of the crops."""

_BYTES = np.dtype(np.uint8)  # compared several times a crop, to which a type would be made anew
_TRUNCATE = -0.4999  # Pillow truncates what it blends, OpenCV rounds
# [3, 4] matrices of colour: saturation f is _GRAY + f * _COLOR.
_GRAY = np.array([[0.299, 0.587, 0.114, _TRUNCATE]] * 3, dtype=np.float32)
_COLOR = np.eye(3, 4, dtype=np.float32) - np.array([0.299, 0.587, 0.114, 0], dtype=np.float32)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing (a = -0.5, support grown with the scale), as Pillow's `resize`."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    are_bytes = image.dtype == _BYTES
    if not are_bytes and torch.backends.mkl.is_available():
        return _resize_floats(image, height, width)
    if are_bytes and image.shape[2] not in (3, 4):
        return _resize_in_threes(image, height, width)
    # torch picks its vectorised kernel by the strides of a channels-last tensor, batch stride included.
    nchw = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    size = height if height == width else (height, width)  # torch looks at each number of a pair, at some length
    resized = F.interpolate(nchw, size=size, mode="bicubic", antialias=True)
    if not are_bytes:
        resized.clamp_(0, 1)  # as bytes are
    return resized.permute(0, 2, 3, 1)[0].numpy()


def _resize_in_threes(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bytes of any number of channels: torch's fast kernel, ten times as fast as the other, takes three or four."""
    channels = image.shape[2]
    resized = np.empty((height, width, channels), np.uint8)
    for first in range(0, channels, 3):
        places = range(first, min(first + 3, channels))
        three = np.zeros((*image.shape[:2], 3), np.uint8)
        cv2.mixChannels([image], [three], [place for i, channel in enumerate(places) for place in (channel, i)])
        part = resize(three, height, width)
        cv2.mixChannels([part], [resized], [place for i, channel in enumerate(places) for place in (i, channel)])
    return resized


def _resize_floats(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Two products with sparse matrices, of rows and then of columns: a quarter of what torch's own kernel takes.

    What lies along the other axis is one line, in whatever order, so that two plain transpositions are enough.
    """
    rows, columns, channels = image.shape
    lines = torch.from_numpy(image).flatten(1)  # of a part of an image still a view
    upright = cv2.transpose((_bicubic(rows, height) @ lines).numpy())  # [columns * C, height]
    across = _bicubic(columns, width) @ torch.from_numpy(upright).view(columns, channels * height)
    resized = cv2.transpose(across.clamp_(0, 1).view(width * channels, height).numpy())  # clamped as bytes are
    return resized.reshape(height, width, channels)


@lru_cache(maxsize=1024)
def _bicubic(size: int, new_size: int) -> torch.Tensor:
    """Weights of the antialiased bicubic filter, sparse [new_size, size]."""
    scale = size / new_size
    support = 2 * max(scale, 1.0)
    centers = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + support + 0.5).astype(np.int64), size)
    places = first[:, None] + np.arange((end - first).max())
    inside = places < end[:, None]
    x = np.abs(places - centers[:, None] + 0.5) / max(scale, 1.0)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))
    weights *= inside
    weights /= weights.sum(1, keepdims=True)
    starts = np.concatenate([[0], inside.sum(1).cumsum()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse matrices new
        return torch.sparse_csr_tensor(
            torch.from_numpy(starts),
            torch.from_numpy(places[inside]),
            torch.from_numpy(weights[inside].astype(np.float32)),
            size=(new_size, size),
        )


def resized_crop(image: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """The box of `image` at (top, left), resized to [size, size, C]."""
    return resize(image[top : top + height, left : left + width], size, size)


def flip(image: np.ndarray) -> np.ndarray:
    """Mirrored left to right."""
    if image.shape[2] in (1, 3):
        return cv2.flip(image, 1).reshape(image.shape)
    pixels = np.ascontiguousarray(image).view(np.dtype((np.void, image.itemsize * image.shape[2])))
    return np.ascontiguousarray(pixels[:, ::-1]).view(image.dtype).reshape(image.shape)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with black; 1 is the identity."""
    if image.dtype != _BYTES:
        return _clipped(cv2.addWeighted(image, factor, image, 0, 0)).reshape(image.shape)
    return cv2.convertScaleAbs(image, alpha=factor, beta=_TRUNCATE).reshape(image.shape)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with its mean grey; 1 is the identity."""
    red, green, blue, _ = cv2.mean(image)
    luma = red if image.shape[2] == 1 else 0.299 * red + 0.587 * green + 0.114 * blue
    if image.dtype != _BYTES:
        return _clipped(cv2.addWeighted(image, factor, image, 0, (1 - factor) * luma)).reshape(image.shape)
    mean = int(luma + 0.5)
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean + _TRUNCATE)


def adjust_channel_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Each channel blended with its own mean, for channels that are no colours; 1 is the identity."""
    height, width, channels = image.shape
    lines = image.reshape(height, width * channels)  # OpenCV and numpy are slow along a few channels
    total = cv2.reduce(lines, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S if image.dtype == _BYTES else cv2.CV_32F)
    mean = total.reshape(width, channels).sum(0, dtype=np.float64) / (height * width)
    if image.dtype != _BYTES:
        grey = torch.from_numpy(np.tile((1 - factor) * mean, width).astype(np.float32))
        return _clipped(torch.add(grey, torch.from_numpy(lines), alpha=factor).numpy()).reshape(image.shape)
    levels = np.arange(256)[:, None] * factor + (1 - factor) * np.floor(mean + 0.5) + 1e-3
    return cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8)[None]).reshape(image.shape)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with its grey version; 1 is the identity."""
    if image.dtype != _BYTES:
        matrix = (_GRAY + np.float32(factor) * _COLOR)[:, :3]
        return _clipped(cv2.transform(image, matrix))
    return cv2.transform(image, _GRAY + np.float32(factor) * _COLOR)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Hue turned by `shift` of the colour circle, -0.5..0.5."""
    if image.dtype != _BYTES:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hues = hsv[..., 0]
        np.add(hues, np.float32(360 * (shift % 1)), out=hues)  # OpenCV takes hues above 360 as what is left of them
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
    inverted = cv2.bitwise_not(image) if image.dtype == _BYTES else 1 - image
    return cv2.min(image, inverted).reshape(image.shape)


def without_channels(image: np.ndarray, levels: tuple[tuple[int, float], ...]) -> np.ndarray:
    """With some channels, by number, set to a level from 0 to 1."""
    image = image.copy()
    for channel, level in levels:
        image[..., channel] = round(level * 255) if image.dtype == _BYTES else level
    return image


def normalize_image(image: np.ndarray, statistics: Statistics = IMAGENET) -> torch.Tensor:
    """[H, W, C] -> float32 [C, H, W] with this mean and standard deviation."""
    mean, std = _levels(statistics, image.dtype == _BYTES)
    return torch.from_numpy(np.ascontiguousarray(((image - mean) / std).transpose(2, 0, 1)))


@lru_cache
def _levels(statistics: Statistics, of_bytes: bool) -> tuple[np.ndarray, np.ndarray]:
    mean, std = (np.array(levels, np.float32) * (255 if of_bytes else 1) for levels in statistics)
    return mean, std


def _clipped(image: np.ndarray) -> np.ndarray:
    clipped: np.ndarray = torch.from_numpy(image).clamp_(0, 1).numpy()
    return clipped


@lru_cache
def _hue_bytes(width: int) -> np.ndarray:
    """1 where a row of `width` HSV pixels holds a hue, uint8 [3 * width]."""
    return np.tile(np.array([1, 0, 0], dtype=np.uint8), width)
