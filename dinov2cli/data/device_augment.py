"""The photometric half of the augmentation, batched on any device: the same decisions and nearly the same pixels.

Levels are float32 in 0..255 here. Every operation ends on whole levels, as uint8 does in the workers, so that the
paths do not drift apart over a chain of operations; what remains is the hue's 8-bit arithmetic.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.data.crop_parameters import CropParameters
from dinov2cli.data.pixels import BLUR_KERNEL, IMAGENET_MEAN, IMAGENET_STD

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ColorDecisions:
    """The colour decisions of n crops, by operation.

    operations[place][operation]: int64 indices of the crops whose `place`-th jitter step is that operation
    (0 brightness, 1 contrast, 2 saturation, 3 hue). factors: float32 [n, 4]. gray, solarize: int64 indices.
    blur: int64 indices, with sigmas float32. Arrays, not tensors: on the way from a worker they are a few bytes of
    its message instead of a shared-memory file each.
    """

    operations: list[list[np.ndarray]]
    factors: np.ndarray
    gray: np.ndarray
    blur: np.ndarray
    sigmas: np.ndarray
    solarize: np.ndarray

    @classmethod
    def of(cls, crops: list[CropParameters]) -> "ColorDecisions":
        places: list[list[list[int]]] = [[[] for _ in range(4)] for _ in range(4)]
        for i, crop in enumerate(crops):
            for place, operation in enumerate(crop.jitter.order if crop.jitter else ()):
                places[place][operation].append(i)
        blurred = [i for i, crop in enumerate(crops) if crop.blur_sigma > 0]
        return cls(
            operations=[[_indices(group) for group in groups] for groups in places],
            factors=np.array(
                [crop.jitter.factors if crop.jitter else (1.0, 1.0, 1.0, 0.0) for crop in crops], dtype=np.float32
            ),
            gray=_indices([i for i, crop in enumerate(crops) if crop.grayscale]),
            blur=_indices(blurred),
            sigmas=np.array([crops[i].blur_sigma for i in blurred], dtype=np.float32),
            solarize=_indices([i for i, crop in enumerate(crops) if crop.solarize]),
        )


def color_crops(crops: Tensor, decisions: ColorDecisions) -> Tensor:
    """Jitter, grayscale, blur and solarize, in this order: uint8 [n, H, W, 3] -> levels, float32 [n, 3, H, W]."""
    levels = crops.permute(0, 3, 1, 2).float().contiguous()

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(levels.device, non_blocking=True)

    for groups in decisions.operations:
        for column, (operation, group) in enumerate(zip(_OPERATIONS, groups, strict=True)):
            if len(group):
                chosen, factors = on_device(group), on_device(decisions.factors[group, column])
                levels[chosen] = operation(levels[chosen], factors[:, None, None, None])
    if len(decisions.gray):
        chosen = on_device(decisions.gray)
        levels[chosen] = _luma(levels[chosen]).expand(-1, 3, -1, -1)
    if len(decisions.blur):
        chosen = on_device(decisions.blur)
        levels[chosen] = gaussian_blur(levels[chosen], on_device(decisions.sigmas))
    if len(decisions.solarize):
        chosen = on_device(decisions.solarize)
        levels[chosen] = torch.minimum(levels[chosen], 255 - levels[chosen])
    return levels


def normalize_levels(levels: Tensor) -> Tensor:
    """Levels [n, 3, H, W] with ImageNet's mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=levels.device)[:, None, None] * 255
    std = torch.tensor(IMAGENET_STD, device=levels.device)[:, None, None] * 255
    return (levels - mean) / std


def adjust_brightness(levels: Tensor, factors: Tensor) -> Tensor:
    """Blended with black. `factors`: [n, 1, 1, 1], here and below."""
    return _truncated(levels * factors)


def adjust_contrast(levels: Tensor, factors: Tensor) -> Tensor:
    """Blended with the mean grey."""
    mean = (_luma(levels).mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
    return _truncated(mean + (levels - mean) * factors)


def adjust_saturation(levels: Tensor, factors: Tensor) -> Tensor:
    """Blended with the grey version."""
    gray = _luma(levels)
    return _truncated(gray + (levels - gray) * factors)


def adjust_hue(levels: Tensor, shifts: Tensor) -> Tensor:
    """Hue turned by `shifts` of the colour circle, in 1/255 steps as 8-bit hues are."""
    value, largest = levels.max(dim=1, keepdim=True)
    chroma = value - levels.amin(dim=1, keepdim=True)
    red, green, blue = levels.split(1, dim=1)
    safe = chroma.clamp(min=1e-6)
    sixths = torch.where(
        largest == 0,
        (green - blue) / safe,
        torch.where(largest == 1, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * (shifts * 255).trunc() / 256
    # The channel k sixths away from the hue: value - chroma * clamp(min(k, 4 - k), 0, 1), the HSV to RGB formula.
    offsets = torch.tensor([5.0, 3.0, 1.0], device=levels.device)[:, None, None]
    k = (offsets + sixths) % 6
    return (value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)).round()


def gaussian_blur(levels: Tensor, sigmas: Tensor) -> Tensor:
    """Gaussian of 9 x 9 pixels with a sigma a crop, mirrored at the border."""
    n, channels, height, width = levels.shape
    radius = BLUR_KERNEL // 2
    offsets = torch.arange(-radius, radius + 1, device=levels.device)
    kernels = torch.exp(-(offsets**2) / (2 * sigmas[:, None] ** 2))
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    planes = levels.reshape(1, n * channels, height, width)
    planes = F.pad(planes, (radius, radius, radius, radius), mode="reflect")
    planes = F.conv2d(planes, kernels[:, None, :, None], groups=n * channels)
    planes = F.conv2d(planes, kernels[:, None, None, :], groups=n * channels)
    return planes.reshape(n, channels, height, width).round()


_OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def _luma(levels: Tensor) -> Tensor:
    weights = torch.tensor(LUMA, device=levels.device)[:, None, None]
    return (levels * weights).sum(dim=1, keepdim=True).round()


def _truncated(levels: Tensor) -> Tensor:
    # The small term undoes float32's error just below a whole level.
    return (levels + 1e-3).clamp(0, 255).floor()


def _indices(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)
