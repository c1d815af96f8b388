"""Multi-crop augmentation (DINOv2 paper, section 4 and appendix): two global and several local views of an image."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2cli.config.images import Statistics
from dinov2cli.data import pixels
from dinov2cli.data.crop_parameters import Box, CropParameters, CropRecipe, Jitter, draw_crops
from dinov2cli.data.regions import LargeImage, power_of_two

GLOBAL_CROPS = 2


class Crops(NamedTuple):
    """Views of one image: arrays [S, S, C] of its dtype, larger S for the global ones.

    `gram_teacher_crops` are the global ones as a Gram teacher sees them; empty where it sees no others.
    """

    global_crops: list[np.ndarray]
    local_crops: list[np.ndarray]
    gram_teacher_crops: list[np.ndarray] = []  # noqa: RUF012  (never changed)


class MultiCropAugmentation:
    """The augmentation of DINOv2: random resized crop, flip, colour jitter, grayscale, blur, solarize.

    Images that are not RGB have a jitter of brightness and contrast, and may go without some channels.

    Args:
        recipes: one a view, the two global ones first. They differ in size, scale and the probabilities of blur
            and solarization; everything else is common to all views.
    """

    def __init__(self, recipes: tuple[CropRecipe, ...]) -> None:
        self.recipes = recipes

    @classmethod
    def from_config(cls, config: Any) -> "MultiCropAugmentation":
        """The recipes that `config.crops` describes, at its largest resolution; the second global view is solarized."""
        crops, resolution = config.crops, config.crops.largest()
        blur_global1, blur_global2, blur_local = crops.blur_prob
        images = config.images()
        colour = {
            "jitter": crops.color_jitter_prob,
            "grayscale": crops.grayscale_prob,
            "colors": images.are_rgb,
            "channel_dropout": crops.channel_dropout_prob,
            "means": images.statistics.mean,
        }
        global_ = CropRecipe(resolution.global_size, tuple(crops.global_crops_scale), blur_global1, **colour)
        local = CropRecipe(resolution.local_size, tuple(crops.local_crops_scale), blur_local, **colour)
        if resolution.gram_teacher_size:
            plain = crops.gram_teacher_no_distortions
            global_ = replace(global_, larger=resolution.gram_teacher_size, larger_is_plain=plain)
        second = replace(global_, blur=blur_global2, solarize=crops.solarize_prob)
        return cls((global_, second, *[local] * crops.local_crops_number))

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Crops:
        """Views of `image` (uint8, or float32 in 0..1, [H, W, C]); all that is random comes from `rng`."""
        height, width = image.shape[:2]
        return render_crops(image, self.draw(height, width, rng))

    def draw(self, height: int, width: int, rng: np.random.Generator) -> list[CropParameters]:
        """The decisions for an image of this size, one record a view."""
        return draw_crops(self.recipes, height, width, rng)


Step = Callable[[np.ndarray, CropParameters], np.ndarray]
GEOMETRIC_STEPS: dict[str, Step] = {
    "resized crop": lambda image, drawn: pixels.resized_crop(image, *drawn.box, drawn.taken_at),
    "flip": lambda crop, drawn: pixels.flip(crop) if drawn.flip else crop,
}
COLOR_STEPS: dict[str, Step] = {
    "color jitter": lambda crop, drawn: color_jitter(crop, drawn.jitter) if drawn.jitter else crop,
    "grayscale": lambda crop, drawn: pixels.grayscale(crop) if drawn.grayscale and crop.shape[2] > 1 else crop,
    "gaussian blur": lambda crop, drawn: pixels.gaussian_blur(crop, drawn.blur_sigma) if drawn.blur_sigma > 0 else crop,
    "solarize": lambda crop, drawn: pixels.solarize(crop) if drawn.solarize else crop,
    "channel dropout": lambda crop, drawn: pixels.without_channels(crop, drawn.dropped) if drawn.dropped else crop,
}
"""The recipe: every view goes through the geometric steps, then the colour steps, in this order.

`device_augment.color_crops` does the colour steps on a device.
"""


def render_crops(image: np.ndarray, drawn: list[CropParameters], *, color: bool = True) -> Crops:
    """The views of `image` that were drawn; without `color`, only the geometric steps.

    All views take a step before any takes the next: the step's code and tables stay in the processor's cache.
    """
    once = _one_channel_if_gray(image, drawn)
    views = _taken([once] * len(drawn), drawn, GEOMETRIC_STEPS)
    plain = in_their_sizes(views, drawn) if drawn[0].larger_is_plain else None
    if plain is not None:
        views = [*plain.global_crops, *plain.local_crops]
    if color:
        views = _taken(views, drawn, COLOR_STEPS)
    crops = in_their_sizes(views, drawn)
    crops = crops if plain is None else crops._replace(gram_teacher_crops=plain.gram_teacher_crops)
    if once is image:
        return crops
    return Crops(*([np.broadcast_to(view, (*view.shape[:2], 3)) for view in part] for part in crops))


def _one_channel_if_gray(image: np.ndarray, drawn: list[CropParameters]) -> np.ndarray:
    """Of a float image whose colours are gray, one channel: what is done to it is done once.

    Of bytes all three are kept, as their arithmetic truncates and so colours gray a little.
    """
    if image.dtype == np.uint8 or image.shape[2] != 3 or any(p.dropped for p in drawn):
        return image
    red, green, blue = (image[..., channel] for channel in range(3))
    is_gray = bool((red[0] == green[0]).all() and (red == green).all() and (red == blue).all())
    return np.ascontiguousarray(image[..., :1]) if is_gray else image


def _taken(views: list[np.ndarray], drawn: list[CropParameters], steps: dict[str, Step]) -> list[np.ndarray]:
    dropout = any(p.dropped for p in drawn)
    for name, step in steps.items():
        if name == "channel dropout" and not dropout:
            continue
        views = [step(view, decisions) for view, decisions in zip(views, drawn, strict=True)]
    return views


def in_their_sizes(views: list[np.ndarray], drawn: list[CropParameters]) -> Crops:
    """All views as crops; those that were taken larger are kept so, and resized."""
    larger = [view for view, p in zip(views, drawn, strict=True) if p.larger]
    if larger:
        views = [pixels.resize(v, p.size, p.size) if p.larger else v for v, p in zip(views, drawn, strict=True)]
    return Crops(views[:GLOBAL_CROPS], views[GLOBAL_CROPS:], larger)


def render_regions(image: LargeImage, drawn: list[CropParameters], *, color: bool = True) -> Crops:
    """The views that were drawn, as `render_crops` makes them, of what they need of a large image.

    Each is read by itself, or, where they lie over each other, all at once.
    """
    top, left = min(p.box.top for p in drawn), min(p.box.left for p in drawn)
    bottom = max(p.box.top + p.box.height for p in drawn)
    right = max(p.box.left + p.box.width for p in drawn)
    together = Box(top, left, bottom - top, right - left)
    if sum(p.box.height * p.box.width for p in drawn) >= together.height * together.width:
        return render_crops(*_part(image, together, drawn), color=color)
    alone = [render_crops(*_part(image, p.box, [p]), color=color) for p in drawn]
    views, larger = (
        [each.global_crops[0] for each in alone],
        [view for each in alone for view in each.gram_teacher_crops],
    )
    return Crops(views[:GLOBAL_CROPS], views[GLOBAL_CROPS:], larger)


def _part(image: LargeImage, box: Box, drawn: list[CropParameters]) -> tuple[np.ndarray, list[CropParameters]]:
    # Twice the crops' own size at least: a box is rounded to whole pixels of what is read.
    shrink = power_of_two(min(min(p.box.height, p.box.width) / p.taken_at for p in drawn) / 2)
    pixels = image.region(box, shrink)
    moved = [p._replace(box=p.box._replace(top=p.box.top - box.top, left=p.box.left - box.left)) for p in drawn]
    return pixels, [shrunk(p, shrink, *pixels.shape[:2]) for p in moved]


def color_jitter(image: np.ndarray, jitter: Jitter) -> np.ndarray:
    """Brightness, contrast, saturation and hue, or what there is of them, in the order drawn."""
    for operation in jitter.order:
        if image.shape[2] > 1 or operation not in _NOTHING_TO_GRAY:
            image = _JITTER_STEPS[operation](image, jitter.factors[operation])
    return image


_JITTER_STEPS = (
    pixels.adjust_brightness,
    pixels.adjust_contrast,
    pixels.adjust_saturation,
    pixels.adjust_hue,
    pixels.adjust_channel_contrast,
)
_NOTHING_TO_GRAY = (2, 3)


def normalize_pixels(images: Tensor, statistics: Statistics) -> Tensor:
    """uint8, or float32 in 0..1, [N, H, W, C] -> float32 [N, C, H, W] with this mean and standard deviation."""
    mean, std = mean_and_std(statistics, images.device)
    levels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if images.dtype != torch.uint8:
        levels.mul_(255)
    return levels.sub_(mean[:, None, None]).div_(std[:, None, None])


@lru_cache  # made anew in every step, they would each time be copied to a GPU, and waited for
def mean_and_std(statistics: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """These, of levels 0 to 255, each float32 [C]."""
    mean, std = (torch.tensor(levels, device=device) * 255 for levels in statistics)
    return mean, std


def shrink_for(parameters: list[CropParameters]) -> int:
    """How much smaller, 1, 2, 4 or 8 times, an image can be decoded with every crop still being reduced in size."""
    reduction = min(min(p.box.height, p.box.width) / p.taken_at for p in parameters)
    return max(shrink for shrink in (1, 2, 4, 8) if shrink == 1 or shrink <= reduction)


def shrunk(parameters: CropParameters, shrink: int, height: int, width: int) -> CropParameters:
    """The same crop of an image that was decoded `shrink` times smaller, to `height` x `width` pixels."""
    top, left, h, w = (round(side / shrink) for side in parameters.box)
    top, left = min(top, height - 1), min(left, width - 1)
    return parameters._replace(box=Box(top, left, max(1, min(h, height - top)), max(1, min(w, width - left))))
