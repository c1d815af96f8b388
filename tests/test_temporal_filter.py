"""Noise goes, motion stays: still patches are averaged, moving ones follow at once."""

from functools import partial

import numpy as np
import pytest
import torch
from skimage import data
from sklearn.decomposition import PCA

from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.visualize.basis import fit_color_basis
from dinov2cli.visualize.features import PatchFeatures, resize
from dinov2cli.visualize.rendering import render
from dinov2cli.visualize.temporal_filter import LONGEST_MEMORY, TemporalFilter

GRID = (8, 12)


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=56, patch_size=8, embed_dim=96, depth=2, num_heads=3).eval()


def photo(size: tuple[int, int] = (128, 192)) -> np.ndarray:
    return resize(data.astronaut()[:340], size)


def noisy(picture: np.ndarray, seed: int, sigma: float = 5.0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def patch_means(picture: np.ndarray, seed: int | None = None) -> np.ndarray:
    """Stand-ins for features [8, 12, 3]: means of patches, with noise of their own."""
    means = resize(picture, GRID).astype(np.float64)
    return means if seed is None else means + np.random.default_rng(seed).normal(0, 4, means.shape)


def test_a_still_noisy_picture_converges_to_its_mean() -> None:
    steady, clean = TemporalFilter(), patch_means(photo())
    errors = []
    for seed in range(60):
        filtered = steady(noisy(photo(), seed), patch_means(photo(), seed))
        errors.append(np.abs(filtered - clean).mean())
    assert errors[-1] < 0.25 * errors[0]


@pytest.mark.parametrize("shift", [2, 5])
def test_nothing_is_averaged_while_the_camera_moves(shift: int) -> None:
    steady, wide = TemporalFilter(), photo((128, 400))
    for frame in range(20):
        picture = noisy(wide[:, frame * shift : frame * shift + 192], frame)
        values = patch_means(picture, frame)
        np.testing.assert_allclose(steady(picture, values), values, atol=1e-9)


def test_an_object_that_moves_leaves_no_trail() -> None:
    steady = TemporalFilter()
    for frame in range(40):
        picture = photo().copy()
        left = 16 * (frame // 4)  # 16 pixels are a patch
        picture[32:64, left : left + 32] = (255, 0, 255)
        picture = noisy(picture, frame)
        values = patch_means(picture)
        filtered = steady(picture, values)
        if frame % 4 == 0:  # just jumped: where it is, and where it was
            changed = (slice(2, 4), slice(max(left // 16 - 1, 0), left // 16 + 2))
            np.testing.assert_allclose(filtered[changed], values[changed], atol=6)


def test_a_slow_fade_is_followed() -> None:
    steady, plain = TemporalFilter(), photo()
    for frame in range(120):
        picture = (plain * (1 - frame / 160)).astype(np.uint8)
        filtered = steady(noisy(picture, frame), patch_means(picture))
    lag = np.abs(filtered - patch_means(picture)).mean()
    assert lag < LONGEST_MEMORY * plain.mean() / 160


def test_a_cut_starts_anew() -> None:
    steady = TemporalFilter()
    for frame in range(10):
        steady(noisy(photo(), frame), patch_means(photo()))
    after = photo()[::-1].copy()
    np.testing.assert_allclose(steady(noisy(after, 11), patch_means(after)), patch_means(after), atol=1e-9)


@pytest.mark.parametrize("foreground", ["auto", "none"])
def test_noise_moves_colours_a_tenth_of_what_it_does_under_a_basis_for_each_frame(
    model: VisionTransformer, foreground: str
) -> None:
    """The other side fits scikit-learn's PCA to every frame and stretches it to the full range, as is commonly done;
    its signs are scikit-learn's own deterministic choice."""
    frames = [noisy(photo((96, 144)), seed) for seed in range(50)]
    maps = [features for _, features in PatchFeatures(model, 12).maps((None, frame) for frame in frames)]

    def for_each_frame(features: np.ndarray) -> np.ndarray:
        values = PCA(3).fit_transform(features.reshape(-1, features.shape[-1]))
        values = (values - values.min(0)) / np.ptp(values, axis=0)
        return resize((255 * values).reshape(*features.shape[:2], 3).astype(np.uint8), (96, 144))

    def mean_change(pictures: list[np.ndarray]) -> float:
        return float(np.abs(np.diff(np.stack(pictures).astype(np.float64), axis=0)).mean())

    steady, basis = TemporalFilter(), fit_color_basis(lambda: maps, foreground)
    ours = [
        render(frame, features, basis, smoothing=partial(steady, frame))
        for frame, features in zip(frames, maps, strict=True)
    ]
    assert np.std(ours[-1]) > 20  # a picture, not the grey that would be steady too
    assert mean_change(ours) <= 0.1 * mean_change([for_each_frame(features) for features in maps])
