"""Which preset fits a set of images and a machine, where nobody names one."""

import math
from typing import NamedTuple


class Recipe(NamedTuple):
    """A preset, and where it fits: the first of `RECIPES` that does is taken.

    Args:
        side: pixels of the shorter side of the median image, at most.
        images: at most.
        gpus: at least.
        gb: memory of each of these, at least: what the preset is expected to need, and a tenth.
    """

    preset: str
    reason: str
    side: float = math.inf
    images: float = math.inf
    gpus: int = 0
    gb: float = 0.0


RECIPES = (
    Recipe("small_pictures", "patches of 7 and no blur, as there are so few pixels", side=64),
    Recipe("small_1k", "up to 3,000 images", images=3_000),
    Recipe("small_10k", "up to 30,000 images", images=30_000),
    Recipe("small_100k", "up to 300,000 images, on a GPU", images=300_000, gpus=1, gb=13),
    Recipe("vitb14", "many images, and GPUs for a ViT-B", gpus=8, gb=46),
    Recipe("vits14", "many images, and GPUs for a ViT-S", gpus=8, gb=29),
    Recipe("single_gpu", "many images, and a GPU for a ViT-S", gpus=1, gb=12.5),
    Recipe("small_10k", "larger ones would take this machine weeks"),
)
CONTINUING = Recipe("continue_from_weights", "for weights to start from")
UNKNOWN_GB = 24.0
"""What a GPU is taken to have of which nothing is known, as those of a job."""


class Machine(NamedTuple):
    """What there is to train on; `gb` is the memory of the smallest GPU, None where it is not known."""

    cores: int
    gpus: int = 0
    gb: float | None = None

    def __str__(self) -> str:
        if not self.gpus:
            return f"no GPU, {self.cores} CPU core{'s' if self.cores > 1 else ''}"
        memory = f"taken to have {UNKNOWN_GB:g} GB" if self.gb is None else f"of {self.gb:.0f} GB"
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} {memory}"


def choose(images: int, side: int | None, machine: Machine) -> Recipe:
    """The first of `RECIPES` that fits.

    Args:
        side: None where no image could be read.
    """
    gb = UNKNOWN_GB if machine.gb is None else machine.gb
    return next(
        recipe
        for recipe in RECIPES
        if images <= recipe.images
        and (math.inf if side is None else side) <= recipe.side
        and (not recipe.gpus or (machine.gpus >= recipe.gpus and gb >= recipe.gb))
    )
