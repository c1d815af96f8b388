"""Maps of images larger than what a network is shown at once: by windows that overlap, at several scales, mirrored.

Each takes any function of normalised images [B, C, h, w] that gives maps [B, K, h, w], so that it serves evaluations
and pictures.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

Maps = Callable[[Tensor], Tensor]
"""[B, C, h, w] -> [B, K, h, w]."""


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover `size` pixels: `stride` apart, the last one moved back to end with the image."""
    count = max(size - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, size) - window, 0) for i in range(count)]


def sliding(maps: Maps, images: Tensor, window: int, stride: int, at_once: int = 8, cell: int = 1) -> Tensor:
    """The mean of the maps of all windows that show a pixel: [B, C, H, W] -> float32 [B, K, H, W].

    Args:
        window, stride: in pixels; an image with a side below `window` has windows that are smaller.
        at_once: windows in a batch.
        cell: side in pixels of what has a place in the maps, which are [B, K, H / cell, W / cell]; all sizes are
            multiples of it.
    """
    height, width = images.shape[-2:]
    places = [(y, x) for y in window_starts(height, window, stride) for x in window_starts(width, window, stride)]
    boxes = [(slice(y, y + window), slice(x, x + window)) for y, x in places]
    total: Tensor | None = None
    shown = images.new_zeros((1, 1, height // cell, width // cell), dtype=torch.float32)
    for first in range(0, len(boxes), at_once):
        some = boxes[first : first + at_once]
        found = maps(torch.cat([images[:, :, rows, columns] for rows, columns in some])).float()
        if total is None:
            total = found.new_zeros((len(images), found.shape[1], height // cell, width // cell))
        for sides, each in zip(some, found.split(len(images)), strict=True):
            rows, columns = (slice(side.start // cell, side.stop // cell) for side in sides)
            total[:, :, rows, columns] += each
            shown[:, :, rows, columns] += 1
    assert total is not None
    return total.div_(shown)


def mirrored_mean(maps: Maps, images: Tensor) -> Tensor:
    """The mean of the maps of images and of the mirrored ones, these mirrored back: [B, K, H, W]."""
    return (maps(images) + maps(images.flip(-1)).flip(-1)) / 2


def multi_scale(maps: Maps, scaled: Iterable[Tensor], size: tuple[int, int], classes: int) -> Tensor:
    """The mean probability of each class over scales and flips.

    Args:
        maps: gives logits.
        scaled: the images at each scale, [B, C, h, w].
        size: height and width of what is returned.
        classes: K of one head; the logits of several may lie side by side.

    Returns:
        float32 [B, K, H, W], or of several heads [B, heads * K, H, W].
    """
    total, count = torch.zeros(()), 0
    for images in scaled:
        for flipped in (False, True):
            logits = maps(images.flip(-1) if flipped else images)
            logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
            chances = logits.unflatten(1, (-1, classes)).softmax(2).flatten(1, 2)
            total = total.to(chances.device) + (chances.flip(-1) if flipped else chances)
            count += 1
    return total / count
