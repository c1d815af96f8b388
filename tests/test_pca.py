"""Streaming PCA equals full PCA, and colours do not depend on what they should not depend on."""

import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from sklearn.decomposition import PCA
from tiny_run import write_images

from dinov2cli.cli.main import main
from dinov2cli.errors import DataError, EnvironmentProblem
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.visualize.basis import ColorBasis, fit_color_basis, parse_foreground
from dinov2cli.visualize.features import PatchFeatures
from dinov2cli.visualize.pca import StreamingCovariance, StreamingHistogram
from dinov2cli.visualize.pictures import expand_inputs, save_picture


def features_with_spectrum(n: int = 3000, dim: int = 48, offset: float = 50.0) -> np.ndarray:
    """float32 [n, dim] with falling variances along random directions, far from the origin."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return ((rng.normal(size=(n, dim)) * 0.8 ** np.arange(dim)) @ directions + offset).astype(np.float32)


def streamed(vectors: np.ndarray, batch: int) -> StreamingCovariance:
    moments = StreamingCovariance(vectors.shape[1])
    for start in range(0, len(vectors), batch):
        moments.update(vectors[start : start + batch])
    return moments


@pytest.mark.parametrize("batch", [1, 7, 1000, 5000])
def test_incremental_components_equal_scikit_learn_up_to_sign(batch: int) -> None:
    vectors = features_with_spectrum()
    ours = streamed(vectors, batch).principal_components(5)
    theirs = PCA(5, svd_solver="full").fit(vectors.astype(np.float64))
    signs = np.sign((ours.components * theirs.components_).sum(1))
    np.testing.assert_allclose(ours.components * signs[:, None], theirs.components_, atol=1e-8)
    np.testing.assert_allclose(ours.variance, theirs.explained_variance_, rtol=1e-8)
    np.testing.assert_allclose(ours.project(vectors) * signs, theirs.transform(vectors.astype(np.float64)), atol=1e-6)


def photo_features() -> list[np.ndarray]:
    """Patch features float32 [h, w, 64] of three photos."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=56, patch_size=8, embed_dim=64, depth=2, num_heads=2).eval()
    photos = [data.astronaut(), data.chelsea(), data.coffee()]
    return [features for _, features in PatchFeatures(model, 14).maps((None, photo) for photo in photos)]


def test_patch_features_have_scikit_learns_components() -> None:
    maps = photo_features()
    vectors = np.concatenate([features.reshape(-1, 64) for features in maps])
    full = PCA(3, svd_solver="full").fit(vectors.astype(np.float64))
    incremental = StreamingCovariance(64)
    for features in maps:
        for row in features:
            incremental.update(row)
    ours = incremental.principal_components(3)
    signs = np.sign((ours.components * full.components_).sum(1))[:, None]
    np.testing.assert_allclose(ours.components * signs, full.components_, atol=1e-6)  # 1e-4 is what is promised

    colors = fit_color_basis(lambda: maps, "none").colors
    np.testing.assert_allclose(colors.components * signs, full.components_, atol=1e-6)
    np.testing.assert_allclose(colors.project(vectors) * signs.T, full.transform(vectors.astype(np.float64)), atol=1e-5)


def test_colours_of_the_foreground_are_scikit_learns_components_of_it() -> None:
    maps = photo_features()
    basis = fit_color_basis(lambda: maps, 0.5)
    vectors = np.concatenate([features.reshape(-1, 64) for features in maps]).astype(np.float64)
    first = PCA(1, svd_solver="full").fit_transform(vectors)[:, 0]
    low, high = np.percentile(first, (1, 99))
    kept = basis.foreground.score(vectors) > 0.5
    both = [(values > 0.5) for values in ((first - low) / (high - low), (high - first) / (high - low))]
    assert max((kept == one).mean() for one in both) > 0.995  # percentiles come from bins
    theirs = PCA(3, svd_solver="full").fit(vectors[kept])
    products = np.abs((basis.colors.components * theirs.components_).sum(1))
    np.testing.assert_allclose(products, 1, atol=1e-8)


def test_no_digits_are_lost_far_from_the_origin() -> None:
    near, far = features_with_spectrum(offset=0).astype(np.float64), features_with_spectrum(offset=0) + 1e6
    np.testing.assert_allclose(
        streamed(far.astype(np.float64), 100).covariance(), np.cov(far.astype(np.float64).T), rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(streamed(near, 100).covariance(), np.cov(near.T), rtol=1e-9, atol=1e-12)


def test_sign_does_not_depend_on_the_order_of_the_data() -> None:
    vectors = features_with_spectrum()
    shuffled = np.random.default_rng(1).permutation(vectors)
    first, second = streamed(vectors, 100).principal_components(5), streamed(shuffled, 333).principal_components(5)
    np.testing.assert_allclose(first.components, second.components, atol=1e-8)
    assert (first.components[np.arange(5), np.abs(first.components).argmax(1)] > 0).all()


def test_more_components_than_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="4 components of 3"):
        StreamingCovariance(3).principal_components(4)


def test_streamed_percentiles_are_near_numpys() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=20000)
    histogram = StreamingHistogram(-5, 30)
    for part in np.array_split(values, 9):
        histogram.update(part)
    for percent in (1, 25, 50, 99):
        assert histogram.percentile(percent) == pytest.approx(np.percentile(values, percent), abs=0.02)


def test_otsu_cuts_between_two_groups_and_says_how_well() -> None:
    rng = np.random.default_rng(0)
    apart, one = StreamingHistogram(-10, 10), StreamingHistogram(-10, 10)
    apart.update(np.concatenate([rng.normal(-4, 0.5, 5000), rng.normal(3, 0.5, 1000)]))
    one.update(rng.uniform(-1, 1, 5000))
    threshold, explained = apart.otsu()
    assert -2.5 < threshold < 1.5
    assert explained > 0.95
    assert one.otsu()[1] < 0.8
    constant = StreamingHistogram(-1, 1)
    constant.update(np.full(100, 0.3))
    assert constant.otsu()[1] == 0.0


def scene(seed: int, shift: int = 0, dim: int = 16) -> np.ndarray:
    """A feature map [12, 20, dim]: a background, and an object in the middle with a gradient of parts."""
    rng = np.random.default_rng(7)
    background, thing, part = rng.normal(size=(3, dim))
    features = np.tile(background, (12, 20, 1)).astype(np.float64)
    columns = np.arange(8)
    features[3:9, 6 + shift : 14 + shift] = 3 * thing + np.outer(columns / 8, part)
    return (features + np.random.default_rng(seed).normal(size=features.shape) * 0.02).astype(np.float32)


def scenes() -> Iterator[np.ndarray]:
    for seed in range(6):
        yield scene(seed, shift=seed - 3)


def test_foreground_is_what_the_border_shows_least() -> None:
    for flip in (1, -1):  # whichever way the first component points
        basis = fit_color_basis(lambda flip=flip: (flip * features for features in scenes()))
        chosen = basis.foreground.opacity(flip * scene(0)) > 0.5
        expected = np.zeros((12, 20), dtype=bool)
        expected[3:9, 6:14] = True
        np.testing.assert_array_equal(chosen, expected)


def test_nothing_is_cut_where_the_first_component_has_no_two_groups() -> None:
    for draw in ("normal", "uniform"):
        features = getattr(np.random.default_rng(0), draw)(size=(90, 90, 4)) * [1, 0.1, 0.1, 0.1]
        assert fit_color_basis(lambda features=features: [features]).foreground.threshold is None


def test_nothing_is_cut_where_the_first_component_tells_photo_from_photo() -> None:
    bright = [scene(seed) + 9 * (seed % 2) for seed in range(6)]
    assert fit_color_basis(lambda: bright).foreground.threshold is None


def test_colours_follow_an_object_that_moves() -> None:
    basis = fit_color_basis(scenes)
    here, there = basis.rgb(scene(10, shift=-3))[3:9, 3:11], basis.rgb(scene(11, shift=2))[3:9, 8:16]
    spread = np.ptp(here[..., 0])
    assert np.abs(here - there)[..., 0].mean() < 0.1 * spread


def test_foreground_none_and_thresholds() -> None:
    everything = fit_color_basis(scenes, "none")
    assert (everything.foreground.opacity(scene(0)) == 1).all()
    shares = [
        (fit_color_basis(scenes, threshold).foreground.opacity(scene(0)) > 0.5).mean() for threshold in (0.0, 0.5, 0.9)
    ]
    assert shares[0] > shares[1] >= shares[2]
    with pytest.raises(DataError, match="no patch lies above"):
        fit_color_basis(lambda: [scene(0)[2:4, 5:7]], 1.0)


def test_range_holds_98_percent_of_the_foreground() -> None:
    def noise() -> Iterator[np.ndarray]:
        for seed in range(40):
            yield np.random.default_rng(seed).normal(size=(9, 9, 6)).astype(np.float32)

    basis = fit_color_basis(noise, "none")
    values = basis.rgb(np.random.default_rng(99).normal(size=(200, 200, 6)))
    inside = ((values >= 0) & (values <= 1)).mean()
    assert 0.96 < inside < 0.99


def test_uniform_features_give_grey_not_noise() -> None:
    flat = np.ones((4, 4, 8), dtype=np.float32)
    basis = fit_color_basis(lambda: [flat, flat])
    np.testing.assert_allclose(basis.rgb(flat), 0.5)
    assert (basis.foreground.opacity(flat) == 1).all()


def test_nothing_to_fit_is_an_error() -> None:
    with pytest.raises(DataError, match="no picture"):
        fit_color_basis(list)


@pytest.mark.parametrize("foreground", ["auto", "none"])
def test_a_saved_basis_gives_the_same_colours(tmp_path, foreground: str) -> None:
    basis = fit_color_basis(scenes, foreground)
    basis.save(tmp_path / "basis.npz")
    loaded = ColorBasis.load(tmp_path / "basis.npz")
    np.testing.assert_array_equal(loaded.rgb(scene(3)), basis.rgb(scene(3)))
    np.testing.assert_array_equal(loaded.foreground.opacity(scene(3)), basis.foreground.opacity(scene(3)))
    assert [path.name for path in tmp_path.iterdir()] == ["basis.npz"]


def test_a_file_that_is_no_basis_is_refused(tmp_path) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, a=np.zeros(3))
    (tmp_path / "text.npz").write_text("not an archive")
    for path in (other, tmp_path / "text.npz"):
        with pytest.raises(DataError, match="not a basis"):
            ColorBasis.load(path)
    with pytest.raises(DataError, match="no such file"):
        ColorBasis.load(tmp_path / "missing.npz")


def test_foreground_option() -> None:
    assert parse_foreground("auto") == "auto"
    assert parse_foreground("0.25") == 0.25
    for wrong in ("some", "1.5", "-1", "nan"):
        with pytest.raises(DataError, match="auto, none or a number from 0 to 1"):
            parse_foreground(wrong)


def test_a_picture_that_is_not_from_here_is_never_replaced(tmp_path) -> None:
    photos = sorted((write_images(tmp_path / "photos", classes=1, per_class=2) / "class0").iterdir())
    before = photos[1].read_bytes()
    for words in (["pca-image", *photos], ["attention", *photos], ["pca-image", photos[0], tmp_path / "o.png"]):
        if words[-1] == tmp_path / "o.png":
            words += ["--save-basis", photos[1]]
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, words)))
        assert stop.value.code == 2
    with pytest.raises(EnvironmentProblem, match=r"1\.png: is there, and dino2 has not drawn it"):
        save_picture(photos[1], np.zeros((4, 4, 3), np.uint8))
    assert photos[1].read_bytes() == before
    for level in (0, 9):  # its own are
        save_picture(tmp_path / "drawn.png", np.full((4, 4, 3), level, np.uint8))
    assert np.asarray(Image.open(tmp_path / "drawn.png")).max() == 9


def test_the_output_in_an_input_folder_is_not_read_the_next_time(tmp_path) -> None:
    folder = write_images(tmp_path / "photos", classes=1) / "class0"
    names = [name for name, _ in expand_inputs([folder], folder / "out.png")]
    shutil.copy(folder / "0.png", folder / "out.png")
    assert [name for name, _ in expand_inputs([folder], folder / "out.png")] == names and "out" not in names
    for file in folder.glob("[0-9].png"):
        file.unlink()
    with pytest.raises(DataError, match="no image but the output itself"):
        expand_inputs([folder], folder / "out.png")
