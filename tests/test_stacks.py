"""Arrays in HDF5 and Zarr by their path inside: what is an image, which is the k-th, by value."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import TINY

import dinov2cli
from dinov2cli.config import load_config
from dinov2cli.config.images import Images
from dinov2cli.data.datasets import check_dataset, make_dataset
from dinov2cli.data.decoding import Reading, UnreadableImage, read_image
from dinov2cli.data.loaders import make_eval_loader, make_train_loader
from dinov2cli.data.spelling import absolute
from dinov2cli.errors import DataError, EnvironmentProblem
from dinov2cli.eval.images import embed
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.requests.datasets import DatasetStatsRequest

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (12, 40, 36, 3), dtype=np.uint8)
FIVE = RNG.integers(0, 65536, (12, 5, 40, 36), dtype=np.uint16)
SLICES = RNG.random((7, 20, 24), dtype=np.float32)
LABELS = np.arange(12) % 3


@pytest.fixture(scope="module", params=["h5", "zarr"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arrays") / f"cells.{request.param}"
    held = {"images": COLORS, "group/five": FIVE, "slices": SLICES, "label": LABELS.reshape(-1, 1, 1)}
    if request.param == "h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as root:
            for name, values in held.items():
                root.create_dataset(name, data=values, chunks=values.shape, compression="gzip")
    else:
        zarr = pytest.importorskip("zarr")
        group = zarr.open_group(str(path), mode="w")
        for name, values in held.items():
            group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=(1, *values.shape[1:]))[:] = values
    return path


def test_stacks_and_single_images_by_value(file: Path) -> None:
    colors = make_dataset(f"{file}::/images")
    assert len(colors) == 12 and all(np.array_equal(colors.image(i), COLORS[i]) for i in (0, 5, 11))
    assert colors.path(5) == f"{file}::/images[5]" and "no labels" in colors.describe()
    assert np.array_equal(read_image(Path(colors.path(5))), COLORS[5])
    of_five = Reading(Images(in_chans=5))
    five = make_dataset(f"{file}::group/five")
    assert np.array_equal(five.image(3, of_five), (FIVE[3].transpose(1, 2, 0) / 65535).astype(np.float32))
    one = make_dataset(f"{file}::/slices")  # [7, 20, 24] could be seven channels, and is
    assert len(one) == 1 and "(CHW)" in one.describe()
    assert np.array_equal(one.image(0, Reading(Images(in_chans=7))), SLICES.transpose(1, 2, 0))
    slices = make_dataset(f"Arrays:file={file}:path=/slices:axes=NHW")
    assert len(slices) == 7 and np.array_equal(slices.image(6, Reading(Images(in_chans=1)))[..., 0], SLICES[6])
    named = make_dataset(f"Arrays:file={file}:path=images:label=label")
    assert named.class_names == ("0", "1", "2") and np.array_equal(named.targets(), LABELS)
    assert len(make_dataset(f"{file}::/images + 2*{file}::/images")) == 24


def test_what_is_wrong_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, message in {
        str(
            file
        ): r"which array holds the images cannot be told; it holds /group/five \[12, 5, 40, 36\] uint16, /images",
        f"{file}::/imgaes": r"holds no /imgaes; it holds /group/five",
        f"{file.parent / 'other.h5'}::/images": "other.h5 does not exist",
        f"Arrays:file={file}:path=images:axes=NHWW": r"the axes of \[12, 40, 36, 3\] uint8 are not 'NHWW'",
        f"Arrays:file={file}:path=group/five:label=slices": "5040|3360 labels for the 12 images",
    }.items():
        with pytest.raises(DataError, match=message):
            make_dataset(text)
    with pytest.raises(UnreadableImage, match="there are 12 images, the first is 0"):
        read_image(Path(f"{file}::/images[12]"))
    with pytest.raises(UnreadableImage, match="more than data"):
        make_dataset(f"{file}::/images").open(0, Reading(max_image_gb=1e-5))
    check_dataset(f"{file}::/images")
    with pytest.raises(DataError, match="there is no"):
        check_dataset(f"{file.parent}/none.h5::/images")
    monkeypatch.chdir(file.parent)
    assert absolute(f"{file.name}::/images") == f"{file}::/images"
    library = "h5py" if file.suffix == ".h5" else "zarr"
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(EnvironmentProblem, match=f"needs {library}") as missing:
        make_dataset(f"{file}::/images")
    assert "dinov2cli[arrays]" in str(missing.value.hint)


def test_statistics_training_and_features(file: Path) -> None:
    """In worker processes, too, forked after the file was opened here."""
    found = dinov2cli.run(DatasetStatsRequest(dataset=f"{file}::/group/five"))
    np.testing.assert_allclose(found.mean, FIVE.mean((0, 2, 3)) / 65535, atol=1e-4)
    levels = [f"data.mean={found.mean}", f"data.std={found.std}", "student.in_chans=5"]
    config = load_config(overrides=[*TINY, *levels, f"train.dataset_path={file}::/group/five", "train.num_workers=2"])
    batches = [batch.normalized() for batch in make_train_loader(config, start=0, stop=2)]
    assert batches[1].global_crops.shape == (16, 5, 32, 32) and not batches[0].bad + batches[1].bad
    dataset = make_dataset(f"{file}::/images")
    assert np.array_equal(dataset.image(0), COLORS[0])
    for batch in make_eval_loader(dataset, torch.from_numpy, 6, num_workers=2):
        assert np.array_equal(batch.images.numpy(), COLORS[batch.indices.numpy()])
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    features = embed(f"{file}::/images", model.eval())
    assert np.allclose(features.numpy(), embed(list(COLORS), model).numpy(), atol=1e-6)


def test_ome_zarr(tmp_path: Path) -> None:
    """Its full resolution, with the axes that it names: images over time and depth, of channels."""
    zarr = pytest.importorskip("zarr")
    levels = RNG.integers(0, 65536, (2, 5, 3, 20, 24), dtype=np.uint16)
    group = zarr.open_group(str(tmp_path / "x.ome.zarr"), mode="w", zarr_format=2)
    for name, values in {"0": levels, "1": levels[..., ::2, ::2]}.items():
        group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=(1, 1, 1, *values.shape[3:]))[:] = (
            values
        )
    axes = [{"name": name} for name in "tczyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [{"path": "0"}, {"path": "1"}]}]
    dataset = make_dataset(str(tmp_path / "x.ome.zarr"))
    assert len(dataset) == 6 and "(NCNHW)" in dataset.describe()
    right = (levels[1, :, 2].transpose(1, 2, 0) / 65535).astype(np.float32)
    assert np.array_equal(dataset.image(5, Reading(Images(in_chans=5))), right)
