"""Colour operations batched on the device give the workers' pixels."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import GRAM, MIXED, TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2cli.config import load_config
from dinov2cli.config.images import IMAGENET_STD
from dinov2cli.data import device_augment, pixels
from dinov2cli.data.augmentations import COLOR_STEPS
from dinov2cli.data.crop_parameters import CropRecipe, draw_crops
from dinov2cli.data.datasets.sample_photos import photo_files
from dinov2cli.data.decoding import decode_image
from dinov2cli.data.device_augment import ColorDecisions, color_crops
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.data.randomness import sample_rng


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    colours = [
        decode_image(file.read_bytes(), file.name) for file in photo_files("chelsea.png", "coffee.png", "rocket.jpg")
    ]
    return np.stack([colours[i % 3][4 * i : 4 * i + 64, 5 * i : 5 * i + 64] for i in range(60)])


@pytest.mark.parametrize(
    ("operation", "name", "values"),
    [
        (0, "brightness", (0.6, 1.4)),
        (1, "contrast", (0.6, 1.4)),
        (2, "saturation", (0.8, 1.2)),
        (3, "hue", (-0.1, 0.1)),
    ],
)
def test_each_operation(photos: np.ndarray, operation: int, name: str, values: tuple[float, float]) -> None:
    factors = np.linspace(*values, len(photos), dtype=np.float32)
    workers = np.stack([getattr(pixels, f"adjust_{name}")(p, float(f)) for p, f in zip(photos, factors, strict=True)])
    levels = torch.from_numpy(photos).permute(0, 3, 1, 2).float()
    operations = torch.full((len(photos), 1, 1, 1), float(operation))
    device = device_augment.jitter(levels, operations, torch.from_numpy(factors)[:, None, None, None])
    assert np.abs(device.permute(0, 2, 3, 1).numpy() - workers).mean() < (0.5 if name == "hue" else 0.1)


def five_channels(photos: np.ndarray, dtype: str) -> np.ndarray:
    crops = np.concatenate([photos, photos[::-1, ..., :2]], axis=-1)
    return crops if dtype == "uint8" else (crops / np.float32(255))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_channels_that_are_no_colours(photos: np.ndarray, channels: int, dtype: str) -> None:
    """Brightness, contrast of each channel, blur, solarization and dropout: the workers' pixels on the device."""
    crops = five_channels(photos, dtype)[..., :channels]
    means = tuple(np.linspace(0.2, 0.6, channels).tolist())
    recipe = CropRecipe(64, (0.3, 1.0), 0.5, 0.2, colors=False, channel_dropout=0.3, means=means)
    parameters = [draw_crops((recipe,), 64, 64, sample_rng(0, k))[0] for k in range(len(crops))]
    assert not any(p.grayscale for p in parameters)
    assert {i for p in parameters if p.jitter for i in p.jitter.order} == {0, 4}
    assert all(len(p.dropped) < channels for p in parameters) and any(p.dropped for p in parameters) == (channels > 1)
    workers = list(crops)
    for step in COLOR_STEPS.values():
        workers = [step(crop, p) for crop, p in zip(workers, parameters, strict=True)]
    assert workers[0].dtype == crops.dtype and workers[0].shape == crops[0].shape
    device = color_crops(torch.from_numpy(crops.copy()), ColorDecisions.of(parameters)).permute(0, 2, 3, 1).numpy()
    levels = np.stack(workers).astype(np.float64) * (1 if dtype == "uint8" else 255)
    assert np.abs(device - levels).mean() < (0.2 if dtype == "uint8" else 1e-3)
    for crop, drawn in zip(device, parameters, strict=True):
        for channel, mean in drawn.dropped:
            assert mean == means[channel] and np.abs(crop[..., channel] - 255 * mean).max() <= 0.5


def test_float_colours_are_those_of_bytes(photos: np.ndarray) -> None:
    """16 bits of an RGB photo: all operations, on both paths, within what whole levels round."""
    floats = photos / np.float32(255)
    recipes = (CropRecipe(64, (0.3, 1.0), blur=0.5, solarize=0.2),)
    parameters = [draw_crops(recipes, 64, 64, sample_rng(0, k))[0] for k in range(len(photos))]
    of_bytes, of_floats = list(photos), list(floats)
    for step in COLOR_STEPS.values():
        of_bytes = [step(crop, p) for crop, p in zip(of_bytes, parameters, strict=True)]
        of_floats = [step(crop, p) for crop, p in zip(of_floats, parameters, strict=True)]
    device = color_crops(torch.from_numpy(floats), ColorDecisions.of(parameters)).permute(0, 2, 3, 1).numpy()
    worker_levels = 255 * np.stack(of_floats)
    assert worker_levels.min() >= 0 and worker_levels.max() <= 255.001
    solarized = np.array([p.solarize for p in parameters])  # near the middle, half a level decides
    assert np.abs(worker_levels - device).mean() < 0.05
    assert np.abs(worker_levels - np.stack(of_bytes))[~solarized].mean() < 1.5


def test_blur_with_a_sigma_a_crop(photos: np.ndarray) -> None:
    sigmas = np.linspace(0.1, 2.0, len(photos), dtype=np.float32)
    workers = np.stack([pixels.gaussian_blur(p, float(s)) for p, s in zip(photos, sigmas, strict=True)])
    levels = torch.from_numpy(photos).permute(0, 3, 1, 2).float()
    device = device_augment.gaussian_blur(levels, torch.from_numpy(sigmas))
    assert np.abs(device.permute(0, 2, 3, 1).numpy() - workers).mean() < 0.05


def test_whole_chains_within_a_grey_level(photos: np.ndarray) -> None:
    recipes = (CropRecipe(64, (0.3, 1.0), blur=0.5, solarize=0.2),)
    parameters = [draw_crops(recipes, 64, 64, sample_rng(0, k))[0] for k in range(len(photos))]
    workers = photos
    for step in COLOR_STEPS.values():
        workers = np.stack([step(crop, p) for crop, p in zip(workers, parameters, strict=True)])
    device = color_crops(torch.from_numpy(photos), ColorDecisions.of(parameters)).permute(0, 2, 3, 1).numpy()
    error = np.abs(device - workers).mean(axis=(1, 2, 3))
    assert error.mean() < 0.5
    # Solarization turns a level of error around 127/128 into one of the same size: no crop is far off.
    assert error.max() < 1.5


def test_batches_are_those_of_the_worker_path() -> None:
    overrides = ["train.dataset_path=SamplePhotos:split=TRAIN", "train.batch_size_per_gpu=8", "train.num_workers=0"]
    plain, deferred = (
        next(iter(make_train_loader(load_config(overrides=[*overrides, f"data.device_augment={on}"]), start=2, stop=3)))
        for on in ("false", "true")
    )
    assert deferred.global_crops.dtype == torch.uint8 and deferred.pending is not None
    done = deferred.to("cpu")
    assert done.pending is None and done.global_crops.dtype == torch.float32
    assert torch.equal(done.masks, plain.masks) and torch.equal(done.samples, plain.samples)
    levels = torch.tensor(IMAGENET_STD)[:, None, None] * 255
    assert done.normalized().global_crops is done.global_crops, "normalised crops pass through"
    plain = plain.normalized()
    for ours, theirs in ((done.global_crops, plain.global_crops), (done.local_crops, plain.local_crops)):
        assert ((ours - theirs).abs() * levels).mean() < 0.5


def test_one_copy_takes_the_decisions_to_a_device_and_nothing_waits_for_it() -> None:
    """On meta tensors, which have no numbers: whatever asked for one would raise."""
    overrides = ["train.dataset_path=SamplePhotos:split=TRAIN", "train.batch_size_per_gpu=8", "train.num_workers=0"]
    config = load_config(overrides=[*overrides, "data.device_augment=true"])
    batch = next(iter(make_train_loader(config, start=0, stop=1)))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    with CopiesToDevice() as copies:
        done = batch.to("meta", non_blocking=True)
    assert done.global_crops.dtype == torch.float32 and done.global_crops.device.type == "meta"
    assert copies.count <= len(tensors) + 2  # tables of the global and of the local crops


class CopiesToDevice(TorchDispatchMode):
    """Counts operations that read main memory and write to a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, written = (
            {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
            for values in ((args, kwargs), result)
        )
        self.count += "cpu" in read and "meta" in written
        return result


def test_nothing_to_do_changes_nothing(photos: np.ndarray) -> None:
    parameters = draw_crops((CropRecipe(64, (1.0, 1.0), blur=0.0),) * 40, 64, 64, sample_rng(0, 0))
    idle = [p._replace(jitter=None, grayscale=False) for p in parameters]
    levels = color_crops(torch.from_numpy(photos[:40]), ColorDecisions.of(idle))
    np.testing.assert_array_equal(levels.permute(0, 2, 3, 1).numpy(), photos[:40])


def test_a_gram_teachers_crops_are_the_same_whoever_augments() -> None:
    """They have no colours to change; the student's, resized before their colours, differ by a fraction of a level."""
    words = [*GRAM, *MIXED, "crops.gram_teacher_no_distortions=true", "train.dataset_path=SamplePhotos:split=TRAIN"]
    batches = []
    for on_device in ("true", "false"):
        config = load_config(overrides=[*TINY, *words, f"data.device_augment={on_device}"])
        batches.append(next(iter(make_train_loader(config, start=2, stop=3))).to("cpu").normalized())
    one, other = batches
    assert torch.equal(one.gram_teacher_crops, other.gram_teacher_crops)
    assert (one.global_crops - other.global_crops).abs().mean() < 0.01
