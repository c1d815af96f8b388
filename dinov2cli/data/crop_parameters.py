"""The random decisions of a crop, drawn before any pixel is touched, so that the CPU and the device act on the same."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

JITTER_FACTORS = ((1 - 0.4, 1 + 0.4), (1 - 0.4, 1 + 0.4), (1 - 0.2, 1 + 0.2), (-0.1, 0.1))
"""Ranges of brightness, contrast, saturation and hue."""
FLIP_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)
ASPECT_RATIO = (3 / 4, 4 / 3)
LOG_ASPECT_RATIO = (math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1]))
CROP_TRIES = 10
_JITTER_SPANS = tuple((low, high - low) for low, high in JITTER_FACTORS)


@dataclass(frozen=True)
class CropRecipe:
    """What distinguishes the kinds of crop.

    Args:
        size: height and width of the crop, in pixels.
        scale: smallest and largest share of the image's area.
        blur: probability of a Gaussian blur.
        solarize: probability of solarization.
        jitter: probability of a colour jitter.
        grayscale: probability of a loss of all colour.
        colors: whether the channels are red, green and blue; others have brightness and contrast alone.
        channel_dropout: probability with which a channel is left out.
        means: of the channels, in 0..1, which are then put there; one a channel.
        larger: height and width at which the crop is taken, to be kept like this, too, before it gets its size; 0: it
            is taken at its size.
        larger_is_plain: what is kept has no changes of colour.
    """

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float = 0.0
    jitter: float = 0.8
    grayscale: float = 0.2
    colors: bool = True
    channel_dropout: float = 0.0
    means: tuple[float, ...] = ()
    larger: int = 0
    larger_is_plain: bool = False


class Box(NamedTuple):
    """A rectangle of the image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Jitter(NamedTuple):
    """Colour jitter: `order` says which operations follow each other, each with its factor at its place in `factors`.

    0 brightness, 1 contrast, 2 saturation, 3 hue; for channels that are no colours, 0 and 4, the contrast of each.
    """

    order: tuple[int, ...]
    factors: tuple[float, ...]


class CropParameters(NamedTuple):
    """One crop's decisions. `jitter` None: none; `blur_sigma` 0: none; `dropped`: channels with their new levels."""

    box: Box
    size: int
    flip: bool
    jitter: Jitter | None
    grayscale: bool
    blur_sigma: float
    solarize: bool
    dropped: tuple[tuple[int, float], ...] = ()
    larger: int = 0
    larger_is_plain: bool = False

    @property
    def taken_at(self) -> int:
        """Height and width to which the box is resized first."""
        return self.larger or self.size


def draw_crops(
    recipes: tuple[CropRecipe, ...], height: int, width: int, rng: np.random.Generator
) -> list[CropParameters]:
    """Decisions for one image of `height` x `width` pixels, one record a recipe, all from one call to `rng`.

    A second one, where channels are left out, so that all else falls as it does without.
    """
    drawn = [
        draw_crop(recipe, height, width, numbers)
        for recipe, numbers in zip(recipes, rng.random((len(recipes), NUMBERS_PER_CROP)).tolist(), strict=True)
    ]
    if not recipes[0].channel_dropout:
        return drawn
    numbers = rng.random((len(recipes), len(recipes[0].means)))
    return [crop._replace(dropped=_dropped(*of)) for crop, *of in zip(drawn, recipes, numbers, strict=True)]


def _dropped(recipe: CropRecipe, numbers: np.ndarray) -> tuple[tuple[int, float], ...]:
    chosen = numbers < recipe.channel_dropout
    chosen[numbers.argmax()] = False  # one stays
    return tuple((int(channel), recipe.means[channel]) for channel in chosen.nonzero()[0])


NUMBERS_PER_CROP = 2 * CROP_TRIES + 15


def draw_crop(recipe: CropRecipe, height: int, width: int, numbers: list[float]) -> CropParameters:
    """One crop's decisions from `NUMBERS_PER_CROP` uniform numbers in [0, 1).

    Every decision has numbers of its own, needed or not, so none depends on how another fell.
    """
    tries, (smallest, largest) = numbers[: 2 * CROP_TRIES], BLUR_SIGMA
    down, right, flip, jitter, third, second, first, *factors, gray, blur, sigma, solarize = numbers[2 * CROP_TRIES :]
    return CropParameters(
        box=random_box(recipe.scale, height, width, tries, down, right),
        size=recipe.size,
        flip=flip < FLIP_PROBABILITY,
        jitter=_jitter((third, second, first), factors, recipe.colors) if jitter < recipe.jitter else None,
        grayscale=gray < recipe.grayscale and recipe.colors,
        blur_sigma=smallest + (largest - smallest) * sigma if blur < recipe.blur else 0.0,
        solarize=solarize < recipe.solarize,
        larger=recipe.larger,
        larger_is_plain=recipe.larger_is_plain,
    )


def random_box(
    scale: tuple[float, float], height: int, width: int, tries: list[float], down: float, right: float
) -> Box:
    """A box of random area and aspect ratio inside the image; `tries` holds pairs of uniform numbers for both.

    The ratio is log-uniform in 3/4..4/3. If no pair gives a box that fits, the largest centred box with an allowed
    ratio is taken.
    """
    (smallest, largest), (lowest, highest) = scale, LOG_ASPECT_RATIO
    for i in range(0, len(tries), 2):
        area = height * width * (smallest + (largest - smallest) * tries[i])
        ratio = math.exp(lowest + (highest - lowest) * tries[i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int((height - h + 1) * down), int((width - w + 1) * right), h, w)
    w, h = width, height
    if width / height < ASPECT_RATIO[0]:
        h = min(height, max(1, round(width / ASPECT_RATIO[0])))
    elif width / height > ASPECT_RATIO[1]:
        w = min(width, max(1, round(height * ASPECT_RATIO[1])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _jitter(order_numbers: tuple[float, float, float], numbers: list[float], colors: bool) -> Jitter:
    order = [0, 1, 2, 3]
    for last, number in zip((3, 2, 1), order_numbers, strict=True):  # a uniform permutation (Fisher and Yates)
        other = int((last + 1) * number)
        order[last], order[other] = order[other], order[last]
    factors = tuple([low + span * n for (low, span), n in zip(_JITTER_SPANS, numbers, strict=True)])
    if colors:
        return Jitter(tuple(order), factors)
    return Jitter(tuple(4 * operation for operation in order if operation < 2), (*factors, factors[1]))
