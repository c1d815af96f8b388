"""The photometric half of the augmentation, batched on any device: the same decisions and nearly the same pixels.

Levels are float32 in 0..255 here. Of bytes, every operation ends on whole levels, as in the workers, so that the
paths do not drift apart over a chain of operations; what remains is the hue's 8-bit arithmetic.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.config.images import IMAGENET, Statistics
from dinov2cli.data.augmentations import mean_and_std
from dinov2cli.data.crop_parameters import CropParameters
from dinov2cli.data.pixels import BLUR_KERNEL

LUMA = (0.299, 0.587, 0.114)


# Columns of a decision table: operation at each of the jitter's four places (see `jitter`; -1 none), the five
# operations' factors, flags, the blur's sigma; then the rows that are blurred, in a column that means nothing else; and
# where channels are left out, for each channel its new level (-1: it stays).
ORDER, FACTORS, GRAY, SOLARIZE, SIGMA, BLURRED, COLUMNS = 0, 4, 9, 10, 11, 12, 13
HUE, CHANNEL_CONTRAST = 3, 4


@dataclass(frozen=True)
class ColorDecisions:
    """The colour decisions of n crops.

    Args:
        table: float32 [n, COLUMNS] or [n, COLUMNS + C]; one array, so that one copy takes it to a device. In a worker
            it is an array of numpy's: a few bytes of the worker's message instead of a file in shared memory.
        blurred: how many crops are blurred; the device is never asked for it.
        colors: whether the channels are red, green and blue.
    """

    table: np.ndarray | Tensor
    blurred: int
    colors: bool = True

    @classmethod
    def of(cls, crops: list[CropParameters]) -> "ColorDecisions":
        left_out = max((channel + 1 for crop in crops for channel, _ in crop.dropped), default=0)
        table = np.zeros((len(crops), COLUMNS + left_out), dtype=np.float32)
        table[:, ORDER:FACTORS] = table[:, COLUMNS:] = -1
        for row, crop in zip(table, crops, strict=True):
            if crop.jitter:
                order, factors = crop.jitter
                row[ORDER : ORDER + len(order)], row[FACTORS : FACTORS + len(factors)] = order, factors
            for channel, level in crop.dropped:
                row[COLUMNS + channel] = level
            row[GRAY], row[SOLARIZE], row[SIGMA] = crop.grayscale, crop.solarize, max(crop.blur_sigma, 0)
        rows = table[:, SIGMA].nonzero()[0]
        table[: len(rows), BLURRED] = rows
        colors = not any(crop.jitter and CHANNEL_CONTRAST in crop.jitter.order for crop in crops)
        return cls(table, len(rows), colors)

    def pin_memory(self) -> "ColorDecisions":
        """The same in page-locked memory."""
        return replace(self, table=torch.as_tensor(self.table).pin_memory())


def color_crops(crops: Tensor, decisions: ColorDecisions, *, compiled: bool = False) -> Tensor:
    """Jitter, grayscale, blur, solarize, channel dropout, in this order: [n, H, W, C] -> levels, float32 [n, C, H, W].

    Crops are uint8, or float32 in 0..1, whose levels do not end whole.

    Nothing here depends on numbers that are on the device, so that nobody waits for it. `compiled` puts jitter and
    grayscale through torch.compile.
    """
    table = torch.as_tensor(decisions.table).to(crops.device, non_blocking=True)
    whole = crops.dtype == torch.uint8
    levels = (_compiled_jitter() if compiled else jitter_and_gray)(crops, table[:, :COLUMNS], decisions.colors)
    if decisions.blurred:
        rows = table[: decisions.blurred, BLURRED].long()
        blurred = gaussian_blur(levels.index_select(0, rows), table[:, SIGMA].index_select(0, rows), whole)
        levels.index_copy_(0, rows, blurred)
    levels = torch.where(_column(table, SOLARIZE) > 0, torch.minimum(levels, 255 - levels), levels)
    if (left_out := table.shape[1] - COLUMNS) > 0:
        new = table[:, COLUMNS:, None, None]
        kept = levels[:, :left_out]
        levels[:, :left_out] = torch.where(new < 0, kept, (255 * new).round() if whole else 255 * new)
    return levels


def jitter_and_gray(crops: Tensor, table: Tensor, colors: bool = True) -> Tensor:
    """[n, H, W, C] and decisions [n, COLUMNS] -> levels, float32 [n, C, H, W]."""
    levels = crops.permute(0, 3, 1, 2).float().contiguous()
    if crops.dtype != torch.uint8:
        levels = 255 * levels
    step = jitter if colors else jitter_channels
    for place in range(FACTORS - ORDER):
        operation = _column(table, ORDER + place)
        factor = table.gather(1, FACTORS + table[:, ORDER + place, None].clamp(min=0).long())[..., None, None]
        levels = step(levels, operation, factor, whole=crops.dtype == torch.uint8)
    if not colors:
        return levels
    return torch.where(_column(table, GRAY) > 0, _luma(levels, whole=crops.dtype == torch.uint8), levels)


@lru_cache
def _compiled_jitter() -> Callable[[Tensor, Tensor, bool], Tensor]:
    """`jitter_and_gray` in a few kernels instead of some two hundred."""
    compiled: Callable[[Tensor, Tensor, bool], Tensor] = torch.compile(jitter_and_gray)
    return compiled


def jitter(levels: Tensor, operation: Tensor, factor: Tensor, *, whole: bool = True) -> Tensor:
    """One operation a crop: 0 brightness, 1 contrast, 2 saturation, 3 hue, -1 none.

    The first three blend with black, with the mean grey and with the grey version. All crops go through all of it,
    whatever their operation: so shapes do not depend on the draws.

    Args:
        levels: float32 [n, 3, H, W].
        operation, factor: float32 [n, 1, 1, 1].
        whole: end on whole levels.
    """
    gray = _luma(levels, whole)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True)
    mean = (mean + 0.5).floor() if whole else mean
    base = torch.where(operation == 1, mean, torch.where(operation == 2, gray, 0))
    blended = _truncated(base + (levels - base) * torch.where(operation < 0, 1, factor), whole)
    return torch.where(operation == HUE, adjust_hue(levels, factor, whole), blended)


def jitter_channels(levels: Tensor, operation: Tensor, factor: Tensor, *, whole: bool = True) -> Tensor:
    """Of channels [n, C, H, W] that are no colours: 0 brightness, 4 contrast to each one's own mean, -1 none."""
    mean = levels.mean(dim=(2, 3), keepdim=True)
    mean = (mean + 0.5).floor() if whole else mean
    base = torch.where(operation == CHANNEL_CONTRAST, mean, 0)
    return _truncated(base + (levels - base) * torch.where(operation < 0, 1, factor), whole)


def normalize_levels(levels: Tensor, statistics: Statistics = IMAGENET) -> Tensor:
    """Levels [n, C, H, W] with this mean and standard deviation."""
    mean, std = mean_and_std(statistics, levels.device)
    return (levels - mean[:, None, None]) / std[:, None, None]


def adjust_hue(levels: Tensor, shifts: Tensor, whole: bool = True) -> Tensor:
    """Hue turned by `shifts` [n, 1, 1, 1] of the colour circle; of whole levels in 1/255 steps, as 8-bit hues are."""
    value, smallest = levels.amax(dim=1, keepdim=True), levels.amin(dim=1, keepdim=True)
    chroma = value - smallest
    red, green, blue = levels.split(1, dim=1)
    safe = chroma.clamp(min=1e-6)
    sixths = torch.where(
        red == value,
        (green - blue) / safe,
        torch.where(green == value, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * ((shifts * 255).trunc() / 256 if whole else shifts)
    # The channel k sixths away from the hue: value - chroma * clamp(min(k, 4 - k), 0, 1), the HSV to RGB formula.
    turned = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + sixths) % 6
        turned.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    turned_levels = torch.cat(turned, dim=1)
    return turned_levels.round() if whole else turned_levels


def gaussian_blur(levels: Tensor, sigmas: Tensor, whole: bool = True) -> Tensor:
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
    planes = planes.reshape(n, channels, height, width)
    return planes.round() if whole else planes


def _column(table: Tensor, column: int) -> Tensor:
    return table[:, column, None, None, None]


def _luma(levels: Tensor, whole: bool) -> Tensor:
    red, green, blue = levels.split(1, dim=1)
    luma: Tensor = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]
    return luma.round() if whole else luma


def _truncated(levels: Tensor, whole: bool) -> Tensor:
    # The small term undoes float32's error just below a whole level.
    return (levels + 1e-3).clamp(0, 255).floor() if whole else levels.clamp(0, 255)
