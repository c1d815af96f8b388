"""Pixel operations agree with what torchvision makes of Pillow images."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov2cli.config.images import IMAGENET, IMAGENET_STD, Images
from dinov2cli.data import pixels
from dinov2cli.data.augmentations import color_jitter, normalize_pixels
from dinov2cli.data.crop_parameters import Jitter
from dinov2cli.data.transforms import EvalTransform

GOLDEN = np.load(Path(__file__).parent / "golden" / "augment_ops.npz")
BASE = GOLDEN["base"]
KEYS = GOLDEN.files


def mean_error(actual: np.ndarray, key: str) -> float:
    assert actual.shape == GOLDEN[key].shape and actual.dtype == np.uint8
    return float(np.abs(actual.astype(int) - GOLDEN[key]).mean())


@pytest.mark.parametrize("i", range(4))
def test_resized_crop(i: int) -> None:
    box_and_size = GOLDEN[f"crop{i}/params_top_left_h_w_size"].tolist()
    assert mean_error(pixels.resized_crop(GOLDEN["image"], *box_and_size), f"crop{i}/out") < 0.05


@pytest.mark.parametrize("key", [k for k in KEYS if k.startswith(("brightness", "contrast", "saturation", "hue"))])
def test_color_adjustments(key: str) -> None:
    name, factor = key.split("/")
    assert mean_error(getattr(pixels, f"adjust_{name}")(BASE, float(factor)), key) < 0.5


@pytest.mark.parametrize("i", range(6))
def test_whole_jitters(i: int) -> None:
    jitter = Jitter(tuple(GOLDEN[f"jitter{i}/order"].tolist()), tuple(GOLDEN[f"jitter{i}/factors_bcsh"].tolist()))
    assert mean_error(color_jitter(BASE, jitter), f"jitter{i}/out") < 1.0


@pytest.mark.parametrize("key", [k for k in KEYS if k.startswith("blur9")])
def test_blur(key: str) -> None:
    assert mean_error(pixels.gaussian_blur(BASE, float(key.split("/")[1])), key) < 0.05


@pytest.mark.parametrize("sigma", [0.3, 0.6, 0.85, 1.5])
def test_a_narrower_kernel_changes_no_pixel_noticeably(sigma: float) -> None:
    assert pixels.blur_radius(2.0) == 4 and pixels.blur_radius(0.1) == 1
    offsets = np.arange(-4, 5)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(BASE.astype(float), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    rows = sum(w * padded[i : i + 64] for i, w in enumerate(kernel))
    full = sum(w * rows[:, i : i + 64] for i, w in enumerate(kernel))
    assert np.abs(pixels.gaussian_blur(BASE, sigma) - full).mean() < 0.5


@pytest.mark.parametrize(("operation", "key"), [("grayscale", "gray"), ("flip", "flip"), ("solarize", "solarize128")])
def test_exact_operations(operation: str, key: str) -> None:
    np.testing.assert_array_equal(getattr(pixels, operation)(BASE), GOLDEN[key])


def test_normalization_on_either_side() -> None:
    golden = torch.from_numpy(GOLDEN["normalized"])
    torch.testing.assert_close(pixels.normalize_image(BASE), golden, atol=1e-6, rtol=0)
    torch.testing.assert_close(normalize_pixels(torch.from_numpy(BASE)[None], IMAGENET)[0], golden, atol=1e-6, rtol=0)


@pytest.mark.parametrize("i", range(2))
def test_eval_transform(i: int) -> None:
    out = EvalTransform(resize=256, crop=224)(GOLDEN[f"eval{i}/image"])
    expected = GOLDEN[f"eval{i}/resize256_center224"].astype(np.float32)
    grey_levels = np.abs(out.numpy() - expected) * np.array(IMAGENET_STD).reshape(3, 1, 1) * 255
    assert grey_levels.mean() < 0.1


def test_eval_transform_pads_what_is_too_small() -> None:
    out = EvalTransform(resize=20, crop=32)(np.full((40, 50, 3), 255, np.uint8))
    assert out.shape == (3, 32, 32)
    assert out[0, 16, 16] > 2 and out[0, 0, 0] < -2


@pytest.mark.parametrize("image", [BASE, BASE / np.float32(255)], ids=["bytes", "floats"])
def test_operations_leave_their_input_alone(image: np.ndarray) -> None:
    before = image.copy()
    for i in range(6):
        jitter = Jitter(tuple(GOLDEN[f"jitter{i}/order"].tolist()), tuple(GOLDEN[f"jitter{i}/factors_bcsh"].tolist()))
        color_jitter(image, jitter)
    for step in (pixels.flip, pixels.solarize, pixels.grayscale, lambda x: pixels.adjust_channel_contrast(x, 1.4)):
        step(image)
    pixels.resize(image, 64, 64)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(48, 32), (150, 9), (61, 47)])
def test_floats_are_resized_as_torch_resizes_them(channels: int, height: int, width: int) -> None:
    part = np.random.default_rng(0).random((90, 80, channels), dtype=np.float32)[11:72, 20:67]
    planes = torch.from_numpy(part).double().permute(2, 0, 1)[None]
    expected = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).clamp(0, 1)
    np.testing.assert_allclose(pixels.resize(part, height, width), expected.numpy(), atol=2e-6, rtol=0)


def test_colours_of_floats_by_their_definitions() -> None:
    """Blended with black, the mean grey or the grey version, or turned around the colour circle; between 0 and 1."""
    image = np.random.default_rng(0).random((20, 30, 3), dtype=np.float32)
    wide, gray = image.astype(np.float64), image.astype(np.float64) @ [[0.299], [0.587], [0.114]]
    for factor in (0.6, 1.4):
        for name, behind in (("brightness", 0), ("contrast", gray.mean()), ("saturation", gray)):
            expected = (factor * wide + (1 - factor) * behind).clip(0, 1)
            found = getattr(pixels, f"adjust_{name}")(image, factor)
            np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0, err_msg=f"{name} {factor}")
    for shift in (-0.5, -0.07, 0.0, 0.1):
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in wide.reshape(-1, 3)]
        turned = np.reshape([colorsys.hsv_to_rgb((h + shift) % 1, s, v) for h, s, v in hsv], image.shape)
        np.testing.assert_allclose(pixels.adjust_hue(image, shift), turned, atol=1e-5, rtol=0, err_msg=f"hue {shift}")


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
def test_any_number_of_channels(channels: int) -> None:
    """Each channel becomes what it would become as red, green or blue, as bytes to the last bit."""
    image = np.random.default_rng(0).integers(0, 256, (61, 47, channels), dtype=np.uint8)
    steps = {
        "resize": lambda x: pixels.resize(x, 32, 40),
        "flip": pixels.flip,
        "brightness": lambda x: pixels.adjust_brightness(x, 1.3),
        "contrast": lambda x: pixels.adjust_channel_contrast(x, 0.7),
        "blur": lambda x: pixels.gaussian_blur(x, 1.2),
        "solarize": pixels.solarize,
    }
    assert np.array_equal(pixels.flip(image), image[:, ::-1])
    for name, step in steps.items():
        found = step(image)
        alone = np.stack([step(np.repeat(image[..., c, None], 3, 2))[..., 0] for c in range(channels)], axis=2)
        assert found.dtype == np.uint8 and np.array_equal(found, alone), name
        floats = step(image / np.float32(255))
        assert floats.dtype == np.float32 and floats.shape == found.shape
        assert floats.min() >= 0 and floats.max() <= 1 and np.abs(255 * floats - found).mean() < 1, name


def test_statistics_of_the_channels_normalise() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 5), dtype=np.uint8)
    images = Images(mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4, 0.5, 0.6), in_chans=5)
    statistics = images.statistics
    expected = (image / 255 - statistics.mean) / statistics.std
    for values in (image, image / np.float32(255)):
        found = EvalTransform(30, 30, images)(values)
        assert found.shape == (5, 30, 30) and found.dtype == torch.float32
        torch.testing.assert_close(found, torch.from_numpy(expected[:, 5:35].transpose(2, 0, 1)).float())
        batch = normalize_pixels(torch.from_numpy(values)[None], statistics)
        torch.testing.assert_close(batch[0], torch.from_numpy(expected.transpose(2, 0, 1)).float())
