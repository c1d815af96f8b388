"""Multi-crop augmentation (DINOv2 paper, section 4 and appendix): two global and several local views of an image."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2cli.data import pixels
from dinov2cli.data.crop_parameters import Box, CropParameters, CropRecipe, Jitter, draw_crops

GLOBAL_CROPS = 2


class Crops(NamedTuple):
    """Views of one image: uint8 arrays [S, S, 3], larger S for the global ones."""

    global_crops: list[np.ndarray]
    local_crops: list[np.ndarray]


class MultiCropAugmentation:
    """The augmentation of DINOv2: random resized crop, flip, colour jitter, grayscale, blur, solarize.

    Args:
        recipes: one a view, the two global ones first. They differ in size, scale and the probabilities of blur
            and solarization; everything else is common to all views.
    """

    def __init__(self, recipes: tuple[CropRecipe, ...]) -> None:
        self.recipes = recipes

    @classmethod
    def from_config(cls, config: Any) -> "MultiCropAugmentation":
        """The recipes that `config.crops` describes; solarization is for the second global view alone."""
        crops = config.crops
        blur_global1, blur_global2, blur_local = crops.blur_prob
        colour = {"jitter": crops.color_jitter_prob, "grayscale": crops.grayscale_prob}
        global_ = CropRecipe(crops.global_crops_size, tuple(crops.global_crops_scale), blur_global1, **colour)
        local = CropRecipe(crops.local_crops_size, tuple(crops.local_crops_scale), blur_local, **colour)
        second = replace(global_, blur=blur_global2, solarize=crops.solarize_prob)
        return cls((global_, second, *[local] * crops.local_crops_number))

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Crops:
        """Views of `image` (uint8 [H, W, 3]); all that is random comes from `rng`."""
        height, width = image.shape[:2]
        return render_crops(image, self.draw(height, width, rng))

    def draw(self, height: int, width: int, rng: np.random.Generator) -> list[CropParameters]:
        """The decisions for an image of this size, one record a view."""
        return draw_crops(self.recipes, height, width, rng)


Step = Callable[[np.ndarray, CropParameters], np.ndarray]
GEOMETRIC_STEPS: dict[str, Step] = {
    "resized crop": lambda image, drawn: pixels.resized_crop(image, *drawn.box, drawn.size),
    "flip": lambda crop, drawn: pixels.flip(crop) if drawn.flip else crop,
}
COLOR_STEPS: dict[str, Step] = {
    "color jitter": lambda crop, drawn: color_jitter(crop, drawn.jitter) if drawn.jitter else crop,
    "grayscale": lambda crop, drawn: pixels.grayscale(crop) if drawn.grayscale else crop,
    "gaussian blur": lambda crop, drawn: pixels.gaussian_blur(crop, drawn.blur_sigma) if drawn.blur_sigma > 0 else crop,
    "solarize": lambda crop, drawn: pixels.solarize(crop) if drawn.solarize else crop,
}
"""The recipe: every view goes through the geometric steps, then the colour steps, in this order.

`device_augment.color_crops` does the colour steps on a device.
"""


def render_crops(image: np.ndarray, drawn: list[CropParameters], *, color: bool = True) -> Crops:
    """The views of `image` that were drawn; without `color`, only the geometric steps.

    All views take a step before any takes the next: the step's code and tables stay in the processor's cache.
    """
    views = [image] * len(drawn)
    for step in (*GEOMETRIC_STEPS.values(), *(COLOR_STEPS.values() if color else ())):
        views = [step(view, decisions) for view, decisions in zip(views, drawn, strict=True)]
    return Crops(views[:GLOBAL_CROPS], views[GLOBAL_CROPS:])


def color_jitter(image: np.ndarray, jitter: Jitter) -> np.ndarray:
    """Brightness, contrast, saturation and hue, in the order drawn."""
    for operation in jitter.order:
        image = _JITTER_STEPS[operation](image, jitter.factors[operation])
    return image


_JITTER_STEPS = (pixels.adjust_brightness, pixels.adjust_contrast, pixels.adjust_saturation, pixels.adjust_hue)


def normalize(crops: Tensor) -> Tensor:
    """Crops as a network takes them: float32 [N, 3, H, W] with ImageNet's mean and standard deviation.

    Args:
        crops: uint8 [N, H, W, 3], on any device; or float [N, 3, H, W], normalised already and passed through.
    """
    if crops.dtype != torch.uint8:
        return crops
    mean, std = mean_and_std(crops.device)
    return ((crops.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


@lru_cache  # made anew in every step, they would each time be copied to a GPU, and waited for
def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's, of levels 0 to 255, each float32 [3]."""
    mean, std = (torch.tensor(levels, device=device) * 255 for levels in (pixels.IMAGENET_MEAN, pixels.IMAGENET_STD))
    return mean, std


def shrink_for(parameters: list[CropParameters]) -> int:
    """How much smaller, 1, 2, 4 or 8 times, an image can be decoded with every crop still being reduced in size."""
    reduction = min(min(p.box.height, p.box.width) / p.size for p in parameters)
    return max(shrink for shrink in (1, 2, 4, 8) if shrink == 1 or shrink <= reduction)


def shrunk(parameters: CropParameters, shrink: int, height: int, width: int) -> CropParameters:
    """The same crop of an image that was decoded `shrink` times smaller, to `height` x `width` pixels."""
    top, left, h, w = (round(side / shrink) for side in parameters.box)
    top, left = min(top, height - 1), min(left, width - 1)
    return parameters._replace(box=Box(top, left, max(1, min(h, height - top)), max(1, min(w, width - left))))
