"""Images of any number of channels, from the file to what a network is given."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import load_file
from tiny_run import TINY

import dinov2cli
from dinov2cli.config import load_config
from dinov2cli.config.images import RGB, Images
from dinov2cli.data.decoding import Reading, read_image
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.errors import DataError, WeightsError
from dinov2cli.eval.embed import run as embed
from dinov2cli.eval.protocol import load_subject
from dinov2cli.models.load import load_model
from dinov2cli.requests.eval import EmbedRequest, KnnRequest, LinearRequest, LogregRequest
from dinov2cli.requests.export import ExportRequest
from dinov2cli.requests.pictures import AttentionRequest, PcaImageRequest, PcaVideoRequest
from dinov2cli.requests.train import TrainRequest
from dinov2cli.visualize.rendering import shown

FIVE = np.random.default_rng(0).integers(0, 65536, (5, 21, 30), dtype=np.uint16)
NAMES = ["DAPI", "GFP", "RFP", "Cy5", "BF"]


def read(path: Path, in_chans: int, *channels: str) -> np.ndarray:
    return read_image(path, Reading(Images(in_chans=in_chans, channels=channels)))


def written(path: Path, kind: str) -> Path:
    """The five channels as people have them: planes that OME names, that ImageJ names, samples, bare pages, arrays."""
    if kind == "ome":
        tifffile.imwrite(path := path / "x.ome.tif", FIVE, metadata={"axes": "CYX", "Channel": {"Name": NAMES}},
                         photometric="minisblack")  # fmt: skip
    elif kind == "imagej":
        tifffile.imwrite(path := path / "x.tif", FIVE, imagej=True, metadata={"axes": "CYX", "Labels": NAMES})
    elif kind == "samples":
        tifffile.imwrite(path := path / "x.tif", FIVE.transpose(1, 2, 0), photometric="minisblack",
                         planarconfig="contig")  # fmt: skip
    elif kind == "pages":
        tifffile.imwrite(path := path / "x.tif", FIVE, photometric="minisblack")
    else:
        np.save(path := path / "x.npy", FIVE)
    return path


@pytest.mark.parametrize("kind", ["ome", "imagej", "samples", "pages", "npy"])
def test_channels_of_sixteen_bits_by_value(tmp_path: Path, kind: str) -> None:
    path, values = written(tmp_path, kind), (FIVE.transpose(1, 2, 0) / 65535).astype(np.float32)
    found = read(path, 5)
    assert found.dtype == np.float32 and np.array_equal(found, values)
    assert np.array_equal(read(path, 2, "3", "0"), values[..., [3, 0]])
    with pytest.raises(DataError, match="has no channel 5: it has 5, the first is 0"):
        read(path, 2, "5", "0")
    with pytest.raises(DataError, match=r"has 5 channels.*and the model takes 2; say which with data.channels"):
        read(path, 2)
    if kind in ("ome", "imagej"):
        assert np.array_equal(read(path, 3, "BF", "DAPI", "1"), values[..., [4, 0, 1]])
        with pytest.raises(DataError, match=r"no channel named 'Cy3' \(data.channels\); its names: DAPI, GFP"):
            read(path, 1, "Cy3")


def test_eight_bits_stay_bytes_and_colours_become_one_channel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 13, 4), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "four.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    four = read(tmp_path / "four.tif", 4)
    assert four.dtype == np.uint8 and np.array_equal(four, pixels)
    assert np.array_equal(read(tmp_path / "four.tif", 2, "alpha", "green"), pixels[..., [3, 1]])
    tifffile.imwrite(tmp_path / "rgb.tif", pixels[..., :3], photometric="rgb")
    luma = pixels[..., :3] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read(tmp_path / "rgb.tif", 1)[..., 0] - luma).max() <= 0.5 + 1e-4
    tifffile.imwrite(tmp_path / "gray.tif", pixels[..., 0], photometric="minisblack")
    assert np.array_equal(read(tmp_path / "gray.tif", 1), pixels[..., :1])
    # What is transparent shows the mean of each channel.
    seen = read(tmp_path / "four.tif", 1)
    opacity = pixels[..., 3] / 255
    assert np.abs(seen[..., 0] - (luma * opacity + 0.449 * 255 * (1 - opacity))).max() <= 1.01


def test_channels_are_drawn_as_colours() -> None:
    values = np.zeros((20, 30, 5), np.float32)
    for channel in range(5):
        values[channel * 4 : channel * 4 + 4, :, channel] = 0.1 * (channel + 1)
    images = Images(in_chans=5, channels=tuple(NAMES))
    picture = shown(values, images, "BF,GFP,DAPI")
    assert picture.shape == (20, 30, 3) and picture.dtype == np.uint8
    assert picture[17, 0].tolist() == [255, 0, 0] and picture[5, 0].tolist() == [0, 255, 0]
    assert shown(values, images, "RFP")[9, 0].tolist() == [255] * 3
    assert shown(values[..., :2], Images(in_chans=2))[5, 0].tolist() == [0, 255, 0]
    assert np.array_equal(shown(picture, RGB), picture)
    with pytest.raises(DataError, match="--show-channels 9: must be one to three of DAPI, GFP"):
        shown(values, images, "9")
    with pytest.raises(DataError, match="the model takes red, green and blue"):
        dinov2cli.visualize.rendering.places_shown(RGB, "0,1,2")


@pytest.fixture(scope="module")
def five_channel_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in which channel is bright: a quarter of the range, twelve images each."""
    folder, rng = tmp_path_factory.mktemp("five"), np.random.default_rng(0)
    for number in range(2):
        (folder / f"class{number}").mkdir()
        for image in range(12):
            values = rng.normal(0.2, 0.05, (5, 40, 40))
            values[2 * number] += 0.25 * rng.random((40, 40))
            samples = (np.clip(values, 0, 1) * 65535).astype(np.uint16)
            tifffile.imwrite(folder / f"class{number}" / f"{image}.tif", samples, photometric="minisblack")
    return folder


@pytest.fixture(scope="module")
def five_channel_run(five_channel_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    levels = ["data.mean=[0.25,0.2,0.25,0.2,0.2]", "data.std=[0.1,0.05,0.1,0.05,0.05]", "student.in_chans=5"]
    overrides = (*TINY, *levels, "crops.channel_dropout_prob=0.2")
    dinov2cli.run(TrainRequest(overrides=overrides, data=str(five_channel_set), output_dir=run, cpu=True))
    return run


def test_batches_of_sixteen_bits(five_channel_set: Path) -> None:
    """Normalised by the set's statistics, the same on the device as in the workers, and without what is left out."""
    mean, std = (0.25, 0.2, 0.25, 0.2, 0.2), (0.1, 0.05, 0.1, 0.05, 0.05)
    keys = [f"data.mean={list(mean)}", f"data.std={list(std)}", "student.in_chans=5", "crops.channel_dropout_prob=0.3",
            f"train.dataset_path={five_channel_set}"]  # fmt: skip
    batches = {}
    for device in ("false", "true"):
        config = load_config(overrides=[*TINY, *keys, f"data.device_augment={device}"])
        (batch,) = make_train_loader(config, start=1, stop=2)
        batches[device] = batch.to("cpu").normalized()
    ours, theirs = batches["false"], batches["true"]
    assert ours.global_crops.shape == (16, 5, 32, 32) and ours.local_crops.shape == (16, 5, 16, 16)
    assert ours.global_crops.dtype == theirs.global_crops.dtype == torch.float32
    for name in ("global_crops", "local_crops"):
        difference = (getattr(ours, name) - getattr(theirs, name)).abs()
        assert difference.mean() < 1e-3 and difference.max() < 0.05, name
    left_out = (ours.global_crops.abs().amax((2, 3)) < 1e-5).sum(1)
    assert 5 < left_out.sum() < 45 and left_out.max() <= 4
    kept = ours.global_crops[ours.global_crops.abs().amax((2, 3)) >= 1e-5]
    assert kept.mean().abs() < 1 and 0.3 < kept.std() < 3


@pytest.mark.parametrize("format_name", ["safetensors", "official", "hf", "onnx", "torch-export"])
def test_exports_of_five_channels(five_channel_run: Path, tmp_path: Path, format_name: str) -> None:
    """Equal features, in their own ecosystem; and read back, the same statistics and the same features of files."""
    suffix = {"safetensors": ".safetensors", "official": ".pth", "hf": "", "onnx": ".onnx", "torch-export": ".pt2"}
    output = tmp_path / f"weights{suffix[format_name]}"
    result = dinov2cli.run(ExportRequest(checkpoint=str(five_channel_run), format=format_name, output=output))
    assert result.comparisons[0].shape[1] == 5 and result.comparisons[0].difference < 1e-4
    images = load_subject(str(five_channel_run)).model.images
    assert images.statistics.mean == (0.25, 0.2, 0.25, 0.2, 0.2) and images.in_chans == 5
    if format_name in ("safetensors", "official", "hf"):
        assert load_model(output).images == images
    if format_name == "hf":
        processor = json.loads((output / "preprocessor_config.json").read_text())
        assert processor["image_mean"] == [0.25, 0.2, 0.25, 0.2, 0.2] and not processor["do_convert_rgb"]
        assert json.loads((output / "config.json").read_text())["num_channels"] == 5


def test_every_command_takes_a_model_of_five_channels(
    five_channel_run: Path, five_channel_set: Path, tmp_path: Path
) -> None:
    sets = {"train_dataset": str(five_channel_set), "val_dataset": str(five_channel_set)}
    scores = dinov2cli.run(KnnRequest(checkpoint=str(five_channel_run), nb_knn=(3,), no_cache=True, **sets))
    assert scores.rows[0].images == 24
    dinov2cli.run(LogregRequest(checkpoint=str(five_channel_run), no_cache=True, **sets))
    short = {"epochs": 1, "epoch_length": 2, "batch_size": 4, "num_workers": 0}
    dinov2cli.run(LinearRequest(checkpoint=str(five_channel_run), no_cache=True, **short, **sets))
    embed(EmbedRequest(checkpoint=str(five_channel_run), data=str(five_channel_set), output=tmp_path / "f.safetensors"))
    features = load_file(tmp_path / "f.safetensors")["cls"]
    model = load_model(five_channel_run)
    first = tifffile.imread(five_channel_set / "class0" / "0.tif")  # resized to 37 and cut to 32 by embed
    assert features.shape == (24, 24) and features.isfinite().all() and first.shape == (5, 40, 40)
    picture = str(five_channel_set / "class0" / "0.tif")
    drawn = PcaImageRequest(paths=(picture, tmp_path / "p.png"), model=str(five_channel_run), show_channels="4,2,0")
    dinov2cli.run(drawn)
    dinov2cli.run(AttentionRequest(paths=(picture, tmp_path / "a.png"), model=str(five_channel_run)))
    assert (tmp_path / "p.png").is_file() and (tmp_path / "a.png").is_file()
    video = PcaVideoRequest(paths=(five_channel_set / "class0", tmp_path / "v.gif"), model=str(five_channel_run))
    with pytest.raises(DataError, match="a video has red, green and blue, and this model takes 5 channels"):
        dinov2cli.run(video)
    with torch.no_grad():
        assert model(torch.zeros(1, 5, 32, 32)).shape == (1, 24)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_weights_of_other_channels_say_what_they_cannot_be_shown(tmp_path: Path, in_chans: int) -> None:
    """One channel takes photos as grey; four have no such photos, and the message says what would do."""
    from weight_samples import PLAIN, sample_state, save

    weights = save(sample_state(PLAIN.changed(in_chans=in_chans)), tmp_path / "weights.pth")
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    for name in "ab":
        tifffile.imwrite(photos / f"{name}.tif", pixels, photometric="rgb")
    requests = [
        EmbedRequest(checkpoint=str(weights), data=str(photos), output=tmp_path / "f.safetensors", no_cache=True),
        PcaImageRequest(paths=(photos, tmp_path / "p.png"), model=str(weights), resolution=4),
        AttentionRequest(paths=(photos, tmp_path / "a.png"), model=str(weights), resolution=4),
    ]
    for request in requests:
        if in_chans == 1:
            dinov2cli.run(request)
        else:
            with pytest.raises((DataError, WeightsError), match="has 3 channels, and the model takes 4; say which"):
                dinov2cli.run(request)
