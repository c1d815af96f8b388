"""Operations on uint8 RGB images, [H, W, 3] -> [H, W, 3], with Pillow's arithmetic in OpenCV's and torch's kernels.

Results of those that torchvision has for Pillow images differ from them by less than a grey level on average.
"""

import math
from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MEAN, _STD = np.array(IMAGENET_MEAN, np.float32) * 255, np.array(IMAGENET_STD, np.float32) * 255
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
    # torch picks its vectorised kernel by the strides of a channels-last tensor, batch stride included.
    nchw = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(nchw, size=(height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)[0].numpy()


def resized_crop(image: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """The box of `image` at (top, left), resized to [size, size, 3]."""
    return resize(image[top : top + height, left : left + width], size, size)


def flip(image: np.ndarray) -> np.ndarray:
    """Mirrored left to right."""
    return cv2.flip(image, 1)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with black; 1 is the identity."""
    return cv2.convertScaleAbs(image, alpha=factor, beta=_TRUNCATE)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with its mean grey; 1 is the identity."""
    red, green, blue, _ = cv2.mean(image)
    mean = int(0.299 * red + 0.587 * green + 0.114 * blue + 0.5)
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean + _TRUNCATE)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with its grey version; 1 is the identity."""
    return cv2.transform(image, _GRAY + np.float32(factor) * _COLOR)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Hue turned by `shift` of the colour circle, -0.5..0.5."""
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
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def blur_radius(sigma: float) -> int:
    """Pixels either side that matter: at most 4, fewer where those beyond weigh less than exp(-10) of the centre."""
    return max(1, min(BLUR_KERNEL // 2, math.ceil(math.sqrt(20) * sigma) - 1))


def solarize(image: np.ndarray) -> np.ndarray:
    """Levels of 128 and above inverted."""
    return cv2.min(image, cv2.bitwise_not(image))


def normalize_image(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] with ImageNet's mean and standard deviation."""
    return torch.from_numpy(np.ascontiguousarray(((image - _MEAN) / _STD).transpose(2, 0, 1)))


@lru_cache
def _hue_bytes(width: int) -> np.ndarray:
    """1 where a row of `width` HSV pixels holds a hue, uint8 [3 * width]."""
    return np.tile(np.array([1, 0, 0], dtype=np.uint8), width)
