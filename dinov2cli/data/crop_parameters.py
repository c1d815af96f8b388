"""The random decisions of a crop, drawn before any pixel is touched, so that the CPU and the device act on the same."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

JITTER_PROBABILITY = 0.8
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
GRAYSCALE_PROBABILITY = 0.2
FLIP_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)
ASPECT_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10


@dataclass(frozen=True)
class CropRecipe:
    """What distinguishes the kinds of crop.

    Args:
        size: height and width of the crop, in pixels.
        scale: smallest and largest share of the image's area.
        blur: probability of a Gaussian blur.
        solarize: probability of solarization.
    """

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float = 0.0


class Box(NamedTuple):
    """A rectangle of the image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Jitter(NamedTuple):
    """Colour jitter: `order` is a permutation of (0 brightness, 1 contrast, 2 saturation, 3 hue)."""

    order: tuple[int, ...]
    brightness: float
    contrast: float
    saturation: float
    hue: float


class CropParameters(NamedTuple):
    """One crop's decisions. `jitter` None: none; `blur_sigma` 0: none."""

    box: Box
    size: int
    flip: bool
    jitter: Jitter | None
    grayscale: bool
    blur_sigma: float
    solarize: bool


def draw_crops(
    recipes: tuple[CropRecipe, ...], height: int, width: int, rng: np.random.Generator
) -> list[CropParameters]:
    """Decisions for one image of `height` x `width` pixels, one record a recipe, all from one call to `rng`."""
    return [
        draw_crop(recipe, height, width, numbers)
        for recipe, numbers in zip(recipes, rng.random((len(recipes), NUMBERS_PER_CROP)).tolist(), strict=True)
    ]


NUMBERS_PER_CROP = 2 * CROP_TRIES + 15


def draw_crop(recipe: CropRecipe, height: int, width: int, numbers: list[float]) -> CropParameters:
    """One crop's decisions from `NUMBERS_PER_CROP` uniform numbers in [0, 1).

    Every decision has numbers of its own, needed or not, so none depends on how another fell.
    """
    u = iter(numbers[2 * CROP_TRIES :])
    box = random_box(recipe.scale, height, width, numbers[: 2 * CROP_TRIES], next(u), next(u))
    flip = next(u) < FLIP_PROBABILITY
    jittered = next(u) < JITTER_PROBABILITY
    jitter = Jitter(
        order=_permutation(next(u), next(u), next(u)),
        brightness=_between(1 - BRIGHTNESS, 1 + BRIGHTNESS, next(u)),
        contrast=_between(1 - CONTRAST, 1 + CONTRAST, next(u)),
        saturation=_between(1 - SATURATION, 1 + SATURATION, next(u)),
        hue=_between(-HUE, HUE, next(u)),
    )
    grayscale = next(u) < GRAYSCALE_PROBABILITY
    blurred, sigma = next(u) < recipe.blur, _between(*BLUR_SIGMA, next(u))
    solarized = next(u) < recipe.solarize
    return CropParameters(
        box, recipe.size, flip, jitter if jittered else None, grayscale, sigma if blurred else 0.0, solarized
    )


def random_box(
    scale: tuple[float, float], height: int, width: int, tries: list[float], down: float, right: float
) -> Box:
    """A box of random area and aspect ratio inside the image; `tries` holds pairs of uniform numbers for both.

    The ratio is log-uniform in 3/4..4/3. If no pair gives a box that fits, the largest centred box with an allowed
    ratio is taken.
    """
    log_low, log_high = math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1])
    for area_number, ratio_number in zip(tries[::2], tries[1::2], strict=True):
        area = height * width * _between(*scale, area_number)
        ratio = math.exp(_between(log_low, log_high, ratio_number))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int((height - h + 1) * down), int((width - w + 1) * right), h, w)
    w, h = width, height
    if width / height < ASPECT_RATIO[0]:
        h = min(height, max(1, round(width / ASPECT_RATIO[0])))
    elif width / height > ASPECT_RATIO[1]:
        w = min(width, max(1, round(height * ASPECT_RATIO[1])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _between(low: float, high: float, number: float) -> float:
    return low + (high - low) * number


def _permutation(*numbers: float) -> tuple[int, ...]:
    """Uniform permutation of range(4) from three uniform numbers (Fisher and Yates)."""
    order = [0, 1, 2, 3]
    for last, number in zip((3, 2, 1), numbers, strict=True):
        other = int((last + 1) * number)
        order[last], order[other] = order[other], order[last]
    return tuple(order)
