"""Block masks of patches for masked image modelling (BEiT's blocks, as DINOv2 uses them for iBOT)."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from dinov2cli.config import Config

MIN_PATCHES = 4
"""Smallest area that a block is drawn with."""
MIN_ASPECT = 0.3
TRIES = 10


class MaskingGenerator:
    """Draws masks made of rectangular blocks.

    Args:
        height: of the image, in patches.
        width: likewise.
        max_patches: largest area of a block, as `max_block_patches` gives.
    """

    def __init__(self, height: int, width: int, max_patches: int) -> None:
        self.height = height
        self.width = width
        self.max_patches = max_patches

    def __call__(self, wanted: int, rng: np.random.Generator) -> np.ndarray:
        """A mask, bool [height, width], of at most `wanted` patches.

        Blocks are added until `wanted` is reached or ten tries in a row fit no further block, so a mask may fall a
        little short, as in the reference implementation.
        """
        mask = np.zeros((self.height, self.width), dtype=bool)
        masked = 0
        while masked < wanted:
            added = self._add_block(mask, min(wanted - masked, self.max_patches), rng)
            if added == 0:
                break
            masked += added
        return mask

    def _add_block(self, mask: np.ndarray, most: int, rng: np.random.Generator) -> int:
        """Mask one block that adds 1 to `most` patches, in place; the number added, 0 if no try fitted."""
        for _ in range(TRIES):
            area_number, aspect_number, down, right = rng.random(4).tolist()
            area = MIN_PATCHES + (most - MIN_PATCHES) * area_number
            aspect = math.exp(math.log(MIN_ASPECT) * (1 - 2 * aspect_number))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            top = int((self.height - height + 1) * down)
            left = int((self.width - width + 1) * right)
            block = mask[top : top + height, left : left + width]
            added = block.size - int(np.count_nonzero(block))
            if 0 < added <= most:
                block[:] = True
                return added
        return 0


def masks_of_batches(config: Config) -> Callable[[np.random.Generator], np.ndarray]:
    """What draws the masks of a batch of the run, as `make_masks` returns them: the two global crops of each image,
    at the run's largest resolution.

    With `distillation.patches=all` they choose every patch.
    """
    size, patch = config.crops.largest().global_size, config.student.patch_size
    if config.compares_all_patches():
        return lambda rng: np.ones((2 * config.train.batch_size_per_gpu, (size // patch) ** 2), dtype=bool)
    return partial(
        make_masks,
        2 * config.train.batch_size_per_gpu,
        MaskingGenerator(size // patch, size // patch, max_block_patches(size, patch)),
        sample_probability=config.ibot.mask_sample_probability if config.ibot.loss_weight else 0.0,
        ratio_range=config.ibot.mask_ratio_min_max,
    )


def max_block_patches(image_size: int, patch_size: int) -> int:
    """Largest block for a square image, by the reference's arithmetic (98 for 224/16, 128 for 224/14)."""
    return int(0.5 * image_size // patch_size * image_size // patch_size)


def make_masks(
    count: int,
    generator: MaskingGenerator,
    rng: np.random.Generator,
    *,
    sample_probability: float = 0.5,
    ratio_range: tuple[float, float] = (0.1, 0.5),
) -> np.ndarray:
    """Masks for `count` images, bool [count, height * width], in random order.

    int(count * sample_probability) images are masked, and the ratios are spread: the i-th of n masked images masks
    int(N * U(p_i, p_i+1)) of its N patches with p = linspace(*ratio_range, n + 1). The others have no masked patch.
    """
    patches = generator.height * generator.width
    masked_images = int(count * sample_probability)
    steps = np.linspace(*ratio_range, masked_images + 1).tolist()
    masks = np.zeros((count, patches), dtype=bool)
    for i, number in enumerate(rng.random(masked_images).tolist()):
        wanted = int(patches * (steps[i] + (steps[i + 1] - steps[i]) * number))
        masks[i] = generator(wanted, rng).ravel()
    return rng.permutation(masks)
