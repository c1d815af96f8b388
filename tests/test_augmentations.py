"""The augmentation's random decisions follow the published distributions."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from dinov2cli.config import load_config
from dinov2cli.data import pixels
from dinov2cli.data.augmentations import COLOR_STEPS, MultiCropAugmentation, render_crops, shrink_for, shrunk
from dinov2cli.data.collate import CropBuffers
from dinov2cli.data.crop_parameters import Box, CropParameters, CropRecipe, draw_crops, random_box
from dinov2cli.data.datasets.sample_photos import SamplePhotos, photo_files
from dinov2cli.data.decoding import read_image
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.data.randomness import sample_rng

DRAWS = 8000
HEIGHT, WIDTH = 375, 500
SIGNIFICANCE = 1e-4  # of each test below; the draws are seeded, so a pass stays a pass


@pytest.fixture(scope="module")
def drawn() -> list[list[CropParameters]]:
    """[views][DRAWS] parameters of the default recipe."""
    augmentation = MultiCropAugmentation.from_config(load_config())
    per_image = [augmentation.draw(HEIGHT, WIDTH, sample_rng(0, k)) for k in range(DRAWS)]
    return [list(view) for view in zip(*per_image, strict=True)]


def same_distribution(a: list[float], b: list[float]) -> None:
    assert stats.ks_2samp(a, b).pvalue > SIGNIFICANCE


def has_probability(flags: list[bool], probability: float) -> None:
    assert stats.binomtest(sum(flags), len(flags), probability).pvalue > SIGNIFICANCE


def usual_random_resized_crop(scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """Written from the definition of the usual random resized crop."""
    for _ in range(10):
        area = HEIGHT * WIDTH * rng.uniform(*scale)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if w <= WIDTH and h <= HEIGHT:
            return Box(int(rng.integers(0, HEIGHT - h + 1)), int(rng.integers(0, WIDTH - w + 1)), h, w)
    return Box(0, 0, HEIGHT, WIDTH)


@pytest.mark.parametrize(("view", "scale"), [(0, (0.32, 1.0)), (1, (0.32, 1.0)), (2, (0.05, 0.32)), (9, (0.05, 0.32))])
def test_boxes(drawn: list[list[CropParameters]], view: int, scale: tuple[float, float]) -> None:
    rng = np.random.default_rng(view)
    expected = [usual_random_resized_crop(scale, rng) for _ in range(DRAWS)]
    boxes = [p.box for p in drawn[view]]
    for side in range(4):
        same_distribution([b[side] for b in boxes], [b[side] for b in expected])
    same_distribution([b.height * b.width for b in boxes], [b.height * b.width for b in expected])
    same_distribution([b.width / b.height for b in boxes], [b.width / b.height for b in expected])
    assert all(b.top + b.height <= HEIGHT and b.left + b.width <= WIDTH and min(b) >= 0 for b in boxes)


@pytest.mark.parametrize(("view", "blur", "solarize"), [(0, 0.0, 0.0), (1, 0.9, 0.2), (2, 0.5, 0.0), (9, 0.5, 0.0)])
def test_probabilities(drawn: list[list[CropParameters]], view: int, blur: float, solarize: float) -> None:
    crops = drawn[view]
    has_probability([p.flip for p in crops], 0.5)
    has_probability([p.jitter is not None for p in crops], 0.8)
    has_probability([p.grayscale for p in crops], 0.2)
    has_probability([p.blur_sigma > 0 for p in crops], blur)
    has_probability([p.solarize for p in crops], solarize)


def test_jitter_factors_and_sigma(drawn: list[list[CropParameters]]) -> None:
    rng = np.random.default_rng(7)
    jitters = [p.jitter for p in drawn[3] if p.jitter is not None]
    for i, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        same_distribution([j.factors[i] for j in jitters], rng.uniform(low, high, DRAWS).tolist())
    counts = np.unique([j.order for j in jitters], axis=0, return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE
    same_distribution([p.blur_sigma for p in drawn[1] if p.blur_sigma > 0], rng.uniform(0.1, 2.0, DRAWS).tolist())


def test_views_and_decisions_are_independent(drawn: list[list[CropParameters]]) -> None:
    columns = np.array(
        [
            [view[k].box.top for view in drawn[:3]]
            + [float(view[k].flip) for view in drawn[:3]]
            + [view[k].blur_sigma for view in drawn[1:3]]
            + [float(view[k].jitter is None) for view in drawn[:3]]
            for k in range(DRAWS)
        ]
    )
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 5 / math.sqrt(DRAWS)


def test_decisions_depend_on_seed_and_sample_alone() -> None:
    recipes = (CropRecipe(56, (0.3, 1.0), 0.5),)
    assert draw_crops(recipes, 80, 90, sample_rng(3, 8)) == draw_crops(recipes, 80, 90, sample_rng(3, 8))
    assert draw_crops(recipes, 80, 90, sample_rng(3, 8)) != draw_crops(recipes, 80, 90, sample_rng(3, 9))
    assert draw_crops(recipes, 80, 90, sample_rng(3, 8)) != draw_crops(recipes, 80, 90, sample_rng(4, 8))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 300), (300, 2), (7, 5)])
def test_images_of_awkward_shapes(height: int, width: int, dtype: type) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = image if dtype == np.uint8 else image / np.float32(255)
    crops = MultiCropAugmentation.from_config(load_config())(image, sample_rng(0, 1))
    assert [c.shape for c in crops.global_crops] == [(224, 224, 3)] * 2
    assert [c.shape for c in crops.local_crops] == [(96, 96, 3)] * 8
    assert all(c.dtype == dtype for c in crops.global_crops + crops.local_crops)


def test_gray_of_floats_is_worked_on_once() -> None:
    """Its crops are what they are where the image is all but gray."""
    gray = np.random.default_rng(0).random((70, 90, 1), dtype=np.float32)
    image, nearly = np.repeat(gray, 3, 2), np.repeat(gray, 3, 2)
    nearly[5, 5, 2] += 1e-7
    config = load_config(
        overrides=["crops.global_crops_size=32", "crops.local_crops_size=16", "crops.blur_prob=[0.5,0.5,0.5]"]
    )
    augmentation = MultiCropAugmentation.from_config(config)
    for k in range(20):
        found, expected = (augmentation(each, sample_rng(0, k)) for each in (image, nearly))
        for ours, theirs in zip(
            [*found.global_crops, *found.local_crops], [*expected.global_crops, *expected.local_crops], strict=True
        ):
            assert ours.strides[2] == 0 and theirs.strides[2] == 4, "one channel, seen three times"
            np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=0)
    buffers = CropBuffers(augmentation.recipes, 2)
    buffers.put(1, found)
    assert np.array_equal(buffers.local_crops[1].numpy(), found.local_crops[0])
    dropping = [p._replace(dropped=((0, 0.5),)) for p in augmentation.draw(70, 90, sample_rng(0, 0))]
    assert render_crops(image, dropping).local_crops[0].strides[2] == 4


def test_a_box_that_cannot_fit_becomes_the_largest_allowed_one_in_the_centre() -> None:
    assert random_box((1.0, 1.0), 10, 1000, [0.5] * 20, 0.9, 0.9) == Box(0, 493, 10, 13)
    assert random_box((1.0, 1.0), 1000, 10, [0.5] * 20, 0.9, 0.9) == Box(493, 0, 13, 10)


def crop_of(*box: int, size: int = 98) -> CropParameters:
    return CropParameters(Box(*box), size, False, None, False, 0.0, False)


def test_shrunk_boxes_stay_inside() -> None:
    assert shrunk(crop_of(100, 50, 200, 100), 2, 187, 250).box == Box(50, 25, 100, 50)
    box = shrunk(crop_of(374, 499, 1, 1), 8, 47, 63).box
    assert box.top + box.height <= 47 and box.left + box.width <= 63 and box.height == box.width == 1


def test_no_crop_is_decoded_smaller_than_it_is_wanted() -> None:
    assert shrink_for([crop_of(0, 0, 400, 800), crop_of(0, 0, 200, 800)]) == 2
    assert shrink_for([crop_of(0, 0, 195, 800), crop_of(0, 0, 2000, 2000)]) == 1
    assert shrink_for([crop_of(0, 0, 8000, 8000)]) == 8


def test_scaled_decoding_changes_crops_little(tmp_path: Path) -> None:
    photo = cv2.resize(read_image(photo_files("astronaut.png")[0]), (1600, 1200), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(photo).save(tmp_path / "photo.jpg", quality=90)
    overrides = [f"train.dataset_path={tmp_path}", "train.batch_size_per_gpu=8", "train.num_workers=0"]
    plain, scaled = (
        next(iter(make_train_loader(load_config(overrides=[*overrides, f"data.scaled_decode={on}"]), start=0, stop=1)))
        for on in ("false", "true")
    )
    for a, b in ((plain.global_crops, scaled.global_crops), (plain.local_crops, scaled.local_crops)):
        assert not torch.equal(a, b)
        assert (a.float() - b.float()).abs().mean() < 3


def test_blur_probabilities_come_from_the_config() -> None:
    config = load_config(overrides=["crops.blur_prob=[1.0,0.1,0.5]", "crops.local_crops_number=3"])
    recipes = MultiCropAugmentation.from_config(config).recipes
    assert [r.blur for r in recipes] == [1.0, 0.1, 0.5, 0.5, 0.5]


def test_colour_probabilities_come_from_the_config() -> None:
    config = load_config(overrides=["crops.color_jitter_prob=0", "crops.grayscale_prob=1", "crops.solarize_prob=0.5"])
    first, second, *local = MultiCropAugmentation.from_config(config).recipes
    assert (first.solarize, second.solarize, local[0].solarize) == (0.0, 0.5, 0.0)
    assert all((recipe.jitter, recipe.grayscale) == (0, 1) for recipe in (first, second, *local))
    crop = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    drawn = MultiCropAugmentation.from_config(config)(crop, sample_rng(0, 0))
    assert all((view == view[..., :1]).all() for view in [*drawn.global_crops, *drawn.local_crops])


@pytest.mark.parametrize("plain", [True, False])
def test_a_gram_teacher_sees_the_students_crops_larger(plain: bool) -> None:
    """The same box and flip; with the same colours, or with none and the student's distorted in their own size."""
    image = SamplePhotos("TRAIN").image(3)
    words = [
        "gram.use_loss=true", "gram.it_load_ema_teacher=0", "crops.gram_teacher_crops_size=96", "crops.solarize_prob=1",
        "crops.global_crops_size=48", "crops.local_crops_size=24", "student.patch_size=8", "crops.local_crops_number=2",
        f"crops.gram_teacher_no_distortions={str(plain).lower()}",
    ]  # fmt: skip
    augmentation = MultiCropAugmentation.from_config(load_config(overrides=words))
    for k in range(4):
        drawn = augmentation.draw(*image.shape[:2], sample_rng(0, k))
        crops = render_crops(image, drawn)
        assert [len(views) for views in crops] == [2, 2, 2]
        assert [view.shape[0] for views in crops for view in views] == [48, 48, 24, 24, 96, 96]
        for view, larger, decisions in zip(crops.global_crops, crops.gram_teacher_crops, drawn[:2], strict=True):
            untouched = pixels.resized_crop(image, *decisions.box, 96)
            untouched = pixels.flip(untouched) if decisions.flip else untouched
            kept, expected = untouched, pixels.resize(untouched, 48, 48)
            for step in COLOR_STEPS.values():
                kept, expected = step(kept, decisions), step(expected, decisions)
            assert np.array_equal(larger, untouched if plain else kept)
            assert np.array_equal(view, expected if plain else pixels.resize(kept, 48, 48))
        # Without colours, as they go to a device that augments.
        uncoloured = render_crops(image, drawn, color=False)
        assert np.array_equal(uncoloured.gram_teacher_crops[1], crops.gram_teacher_crops[1]) == plain
        smaller = [decisions._replace(larger=0, larger_is_plain=False) for decisions in drawn]
        assert np.array_equal(render_crops(image, smaller).local_crops[0], crops.local_crops[0])
