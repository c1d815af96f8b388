"""Operations on uint8 RGB images, [H, W, 3] -> [H, W, 3], with Pillow's arithmetic in OpenCV's and torch's kernels.

Results of those that torchvision has for Pillow images differ from them by less than a grey level on average.
"""

from functools import lru_cache

import cv2
import numpy as np
import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BLUR_KERNEL = 9
"""Width in pixels of the Gaussian blur of the crops."""

_LEVELS = np.arange(256, dtype=np.float32)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing (a = -0.5, support grown with the scale), as Pillow's `resize`."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    # torch picks its vectorised kernel by the strides of a channels-last tensor, batch stride included.
    nchw = torch.from_numpy(np.ascontiguousarray(image)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = torch._C._nn._upsample_bicubic2d_aa(nchw, (height, width), False, None, None)
    return resized.permute(0, 2, 3, 1)[0].numpy()


def resized_crop(image: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """The box of `image` at (top, left), resized to [size, size, 3]."""
    return resize(image[top : top + height, left : left + width], size, size)


def flip(image: np.ndarray) -> np.ndarray:
    """Mirrored left to right."""
    return cv2.flip(image, 1)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with black; 1 is the identity."""
    return cv2.LUT(image, _blend_table(0, factor))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with its mean grey; 1 is the identity."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.LUT(image, _blend_table(mean, factor))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blended with its grey version; 1 is the identity."""
    matrix = np.empty((3, 4), dtype=np.float32)
    matrix[:, :3] = np.eye(3) * factor + (1 - factor) * _LUMA
    matrix[:, 3] = -0.5  # Pillow truncates where OpenCV rounds
    return cv2.transform(image, matrix)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Hue turned by `shift` of the colour circle, -0.5..0.5."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    turn = np.uint8(round(shift * 255) % 256)
    hsv[..., 0] += turn  # wraps at 256, as the circle does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian of 9 x 9 pixels, mirrored at the border."""
    return cv2.GaussianBlur(image, (BLUR_KERNEL, BLUR_KERNEL), sigma, borderType=cv2.BORDER_REFLECT_101)


def solarize(image: np.ndarray, threshold: int = 128) -> np.ndarray:
    """Levels at or above `threshold` inverted."""
    return cv2.LUT(image, _solarize_table(threshold))


def normalize_image(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] with ImageNet's mean and standard deviation."""
    mean, std = np.float32(IMAGENET_MEAN) * 255, np.float32(IMAGENET_STD) * 255
    return torch.from_numpy(np.ascontiguousarray(((image - mean) / std).transpose(2, 0, 1)))


def _blend_table(base: float, factor: float) -> np.ndarray:
    # Pillow truncates what it blends.
    return np.clip(base + np.float32(factor) * (_LEVELS - base), 0, 255).astype(np.uint8)


@lru_cache
def _solarize_table(threshold: int) -> np.ndarray:
    levels = np.arange(256)
    return np.where(levels < threshold, levels, 255 - levels).astype(np.uint8)
