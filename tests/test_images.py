"""The Python door: a model with its preprocessing, features of whatever people hold, and what is refused in words."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from tiny_run import write_images, write_weights

import dinov2cli
from dinov2cli.cli.main import REQUESTS
from dinov2cli.config.images import Images
from dinov2cli.data.datasets import make_dataset
from dinov2cli.errors import DataError, Dino2Error, EnvironmentProblem
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.images import GivenImages, PictureTransform, dataset_of_words
from dinov2cli.models.vision_transformer import VisionTransformer


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def model(weights: Path) -> VisionTransformer:
    return dinov2cli.load_model(weights, config_file=weights.with_name("config.yaml"), device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos"), size=50)


def test_the_same_features_from_a_path_a_picture_an_array_a_tensor_and_the_transform(
    model: VisionTransformer, photos: Path
) -> None:
    file = photos / "class0/0.png"
    picture = Image.open(file)
    array = np.asarray(picture)
    expected = Extractor(model, num_workers=0, device="cpu")(make_dataset(str(photos))).cls
    forms = [file, str(file), picture, array, torch.as_tensor(array.copy()).permute(2, 0, 1)]
    for form in forms:
        features = dinov2cli.embed(form, model)
        assert features.shape == (24,) and features.dtype == torch.float32
        torch.testing.assert_close(features, expected[0], rtol=0, atol=1e-6)
    finer = dinov2cli.embed(array / 255.0, model)  # floats are not rounded to levels when they are resized
    torch.testing.assert_close(finer, expected[0], rtol=0, atol=2e-2)
    several = dinov2cli.embed(forms, model, batch_size=4)
    torch.testing.assert_close(several, expected[:1].expand(len(forms), -1), rtol=0, atol=1e-6)
    normalised = model.transform(picture)
    assert normalised.shape == (3, 32, 32)
    torch.testing.assert_close(dinov2cli.embed(normalised, model), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(dinov2cli.embed(normalised[None], model), expected[:1], rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(normalised[None]), expected[:1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["rgba.png", "gray16.png", "palette.png", "cmyk.jpg", "turned.jpg"])
def test_a_picture_in_memory_is_what_its_file_is(model: VisionTransformer, kind: str, tmp_path: Path) -> None:
    y, x = np.mgrid[:48, :40]
    rgb, exif = np.stack([x * 6, y * 5, (x + y) * 2], -1).astype(np.uint8), Image.Exif()
    exif[0x0112] = 6
    pictures = {
        "rgba.png": (Image.fromarray(np.dstack([rgb, rgb[..., 0]])), {}),
        "gray16.png": (Image.fromarray((x * 1600).astype(np.uint16)), {}),
        "palette.png": (Image.fromarray(rgb).quantize(16), {"transparency": 0}),
        "cmyk.jpg": (Image.fromarray(rgb).convert("CMYK"), {}),
        "turned.jpg": (Image.fromarray(rgb), {"exif": exif}),
    }
    picture, options = pictures[kind]
    picture.save(tmp_path / kind, **options)
    opened = Image.open(tmp_path / kind)
    torch.testing.assert_close(
        dinov2cli.embed(opened, model), dinov2cli.embed(tmp_path / kind, model), rtol=0, atol=1e-6
    )
    assert torch.equal(model.transform(opened), model.transform(tmp_path / kind))


def test_a_large_file_given_by_name_is_read_by_region_as_one_in_a_folder_is(
    model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2cli.data.regions.LARGE_FILE", 0)
    monkeypatch.setattr("dinov2cli.data.regions.SHOWN_SIDE", 64)
    levels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "slide.tif", levels, photometric="rgb", tile=(64, 64))
    assert GivenImages([str(tmp_path / "slide.tif")]).image(0).shape == (64, 64, 3)
    assert torch.equal(dinov2cli.embed(tmp_path / "slide.tif", model), dinov2cli.embed(tmp_path, model)[0])


def test_a_model_of_five_channels_takes_arrays_of_five(photos: Path) -> None:
    five = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, in_chans=5).eval()
    five.images = Images(in_chans=5)
    array = np.random.default_rng(0).integers(0, 256, (40, 40, 5), dtype=np.uint8)
    assert dinov2cli.embed(array, five).shape == (24,)
    assert PictureTransform(five)(array).shape == (5, 32, 32)
    with pytest.raises(DataError, match="has 3 channels, and the model takes 5"):
        dinov2cli.embed(photos / "class0/0.png", five)


def test_a_folder_a_stack_and_a_name_of_a_model(model: VisionTransformer, weights: Path, photos: Path) -> None:
    all_of_them = dinov2cli.embed(photos, model, image_size=24)
    expected = Extractor(model, num_workers=0, device="cpu", image_size=24)(make_dataset(str(photos))).cls
    assert all_of_them.shape == (16, 24) and torch.equal(all_of_them, expected)
    stack = np.stack([np.asarray(Image.open(file)) for file in sorted(photos.rglob("*.png"))])
    assert dinov2cli.embed(stack, model).shape == (16, 24)
    assert dinov2cli.embed(torch.as_tensor(stack).permute(0, 3, 1, 2), model).shape == (16, 24)


def test_an_archive_is_a_dataset_and_not_an_image(model: VisionTransformer, photos: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", photos))
    features, expected = dinov2cli.embed(archive, model), dinov2cli.embed(photos, model)
    assert features.shape == (16, 24) and torch.cdist(features, expected).min(1).values.max() < 1e-4  # in any order
    (photo,) = photos.glob("class0/0.png")
    with pytest.raises(DataError, match=r"photos\.zip is no image; give image files, or one folder or dataset"):
        dataset_of_words([str(photo), str(archive)])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((8, 8, 3), 200.0), "floats from 200 to 200.*divide by 255"),
        (np.zeros((8, 8, 3), np.int64), "int64 values; give uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"\[3, 8, 8\] is no picture's shape; give \[H, W, 3\]"),
        (torch.full((2, 3, 32, 32), 128.0), "float32 images with values up to 128 are not normalised"),
        (torch.zeros(32, 32), r"\[32, 32\] is no batch of images; give \[N, 3, H, W\], or \[3, H, W\] of one"),
        (torch.zeros(2, 1, 3, 32, 32), "is no batch of images"),
        ([], "no images"),
        ([torch.zeros(3, 32, 32)], "image 0: a float tensor is taken for one that is normalised"),
        ("nowhere.jpg", "^nowhere.jpg: there is no such file$"),
        (["nowhere.jpg"], "^1 of 1 image cannot be read: nowhere.jpg: cannot be read [(]No such file or directory[)]$"),
        (None, "image 0: NoneType is no picture; give a path"),
        (b"GIF89a", "image 0: bytes is no picture; give a path"),
        (3, "image 0: int is no picture"),
    ],
)
def test_what_is_no_image_is_said(images: object, message: str, model: VisionTransformer) -> None:
    with pytest.raises(Dino2Error, match=f"(?s){message}"):
        dinov2cli.embed(images, model)


def test_wrong_models_and_batches_are_said(model: VisionTransformer) -> None:
    for wrong in (None, 3):
        with pytest.raises(Dino2Error, match=f"{wrong} is no model: give what load_model returns"):
            dinov2cli.embed(torch.zeros(3, 32, 32), wrong)  # type: ignore[arg-type]
    for size in (0, -1):
        with pytest.raises(Dino2Error, match=f"batch_size={size}: must be a whole number, at least 1"):
            dinov2cli.embed(torch.zeros(3, 32, 32), model, batch_size=size)
    half = torch.zeros(2, 3, 32, 32, dtype=torch.half)
    assert torch.equal(dinov2cli.embed(half, model), dinov2cli.embed(half.float(), model))


def test_an_unknown_device_is_named_before_weights_are_sought() -> None:
    with pytest.raises(EnvironmentProblem, match="--device tpu: unknown"):
        dinov2cli.load_model("nowhere.pth", device="tpu")


def test_dir_shows_the_public_names() -> None:
    names = dir(dinov2cli)
    assert {"load_model", "embed", "run", "__version__", *(each.__name__ for each in REQUESTS)} <= set(names)
    assert "import_module" not in names and all(getattr(dinov2cli, name) for name in names)


def test_the_model_says_what_it_takes(model: VisionTransformer) -> None:
    with pytest.raises(ValueError, match=r"these are float32 \[3, 32, 32\]; for one image give images\[None\]"):
        model(torch.zeros(3, 32, 32))
    with pytest.raises(DataError, match="values up to 255 are not normalised"):
        model(torch.full((1, 3, 32, 32), 255.0))
    with pytest.raises(DataError, match="uint8 images with values up to 255 are not normalised"):
        model(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
