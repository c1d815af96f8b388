"""Block masks: exact counts, spread ratios, and the distribution of the published algorithm."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from dinov2cli.data.masking import MaskingGenerator, make_masks, max_block_patches
from dinov2cli.data.randomness import mask_rng


def test_largest_block() -> None:
    assert max_block_patches(224, 16) == 98
    assert max_block_patches(224, 14) == 128


@pytest.mark.parametrize("count", [2, 3, 7, 64])
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_number_of_masked_images_and_their_ratios(count: int, probability: float) -> None:
    generator = MaskingGenerator(16, 16, 128)
    masks = make_masks(count, generator, mask_rng(0, 1, 0), sample_probability=probability)
    assert masks.shape == (count, 256) and masks.dtype == bool
    masked = np.sort(masks.sum(axis=1))
    n = int(count * probability)
    assert (masked[: count - n] == 0).all()
    edges = np.linspace(0.1, 0.5, n + 1)
    assert (masked[count - n :] <= 256 * edges[1:]).all(), "an image masks at most its share"
    assert (masked[count - n :] >= 256 * edges[:-1] * 0.75).all(), "a mask falls only a little short"


def test_masked_images_are_shuffled_over_the_batch() -> None:
    generator = MaskingGenerator(8, 8, 32)
    where = np.mean([make_masks(8, generator, mask_rng(0, s, 0)).any(axis=1) for s in range(400)], axis=0)
    assert np.abs(where - 0.5).max() < 0.1


def test_masks_depend_on_seed_step_and_rank_alone() -> None:
    def masks(seed: int, step: int, rank: int) -> bytes:
        return make_masks(4, MaskingGenerator(16, 16, 128), mask_rng(seed, step, rank)).tobytes()

    assert masks(0, 5, 1) == masks(0, 5, 1)
    assert len({masks(0, 5, 1), masks(1, 5, 1), masks(0, 6, 1), masks(0, 5, 2)}) == 4


def published_mask(height: int, width: int, most: int, wanted: int, rng: random.Random) -> np.ndarray:
    """Written from the description of BEiT's block masking."""
    mask = np.zeros((height, width), bool)
    while mask.sum() < wanted:
        limit = min(wanted - mask.sum(), most)
        for _ in range(10):
            area = rng.uniform(4, limit)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                new = h * w - mask[top : top + h, left : left + w].sum()
                if 0 < new <= limit:
                    mask[top : top + h, left : left + w] = True
                    break
        else:
            break
    return mask


def boundary(mask: np.ndarray) -> int:
    """Sides between a masked and an unmasked patch: what tells blocks from scattered patches."""
    return int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())


@pytest.mark.parametrize(("wanted", "side", "most"), [(20, 14, 98), (60, 14, 98), (120, 16, 128)])
def test_distribution_of_masks(wanted: int, side: int, most: int) -> None:
    generator, ours_rng, theirs_rng = MaskingGenerator(side, side, most), mask_rng(0, 0, 0), random.Random(0)
    ours = [generator(wanted, ours_rng) for _ in range(1500)]
    theirs = [published_mask(side, side, most, wanted, theirs_rng) for _ in range(1500)]
    for statistic in (np.sum, boundary, lambda m: m[0].sum(), lambda m: m[:, side // 2].sum()):
        assert stats.ks_2samp([statistic(m) for m in ours], [statistic(m) for m in theirs]).pvalue > 1e-3
