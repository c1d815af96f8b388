"""Baselines beside k-NN: classes that a kind of features tells apart score 100 %, those that it cannot see chance."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.feature import hog as skimage_hog
from test_cli_eval import own_cache  # noqa: F401  (a fixture)
from tiny_run import write_images, write_weights

from dinov2cli.cli.main import main
from dinov2cli.config import load_config
from dinov2cli.config.images import Images
from dinov2cli.config.vit import ViTConfig
from dinov2cli.data.datasets import make_dataset
from dinov2cli.eval import baselines
from dinov2cli.eval.baselines import Sampled, Unlearned, colour_histogram, compared, hog, names
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.knn import KnnSettings, evaluate_knn
from dinov2cli.models.vision_transformer import VisionTransformer

SIDE = 32


def coloured(label: int, rng: np.random.Generator) -> np.ndarray:
    """Red or green dots of equal luma anywhere: colours tell all, greys and places nothing."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[rng.random((SIDE, SIDE)) < 0.5] = [(200, 0, 0), (0, 102, 0)][label]  # luma 59.8 and 59.9
    return image


def placed(label: int, rng: np.random.Generator) -> np.ndarray:
    """Half of the pixels white, above or below: pixels tell all, histograms nothing, nor gradients without a sign."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[: SIDE // 2] = 255
    return image if label else image[::-1]


def striped(label: int, rng: np.random.Generator) -> np.ndarray:
    """Stripes across or down in one of many shifts: gradients tell all, histograms nothing."""
    wave = (np.arange(SIDE) + rng.integers(8)) // 4 % 2 * 255
    image = np.repeat(np.broadcast_to(wave, (SIDE, SIDE))[..., None], 3, axis=2).astype(np.uint8)
    return image if label else image.swapaxes(0, 1)


def write_classes(folder: Path, draw: object, per_class: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for label in (0, 1):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(per_class):
            Image.fromarray(np.ascontiguousarray(draw(label, rng))).save(folder / f"class{label}" / f"{number}.png")  # type: ignore[operator]
    return folder


def extractor(in_chans: int = 3) -> Extractor:
    torch.manual_seed(1)
    model = VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=24, depth=2, num_heads=2, in_chans=in_chans)
    # Without the resize of 256/224, dots would mix.
    return Extractor(model.eval(), num_workers=0, device="cpu", resize_ratio=1.0)


@pytest.mark.parametrize(
    ("draw", "seen", "unseen"),
    [
        (coloured, {"colour histogram"}, {"grey histogram"}),
        (placed, {"raw pixels"}, {"colour histogram", "grey histogram", "HOG"}),
        (striped, {"HOG"}, {"colour histogram", "grey histogram"}),
    ],
)
def test_each_sees_what_it_can_see(tmp_path: Path, draw: object, seen: set[str], unseen: set[str]) -> None:
    images = make_dataset(str(write_classes(tmp_path / "images", draw)))
    found = {
        name: evaluate_knn(train, val, KnnSettings((5,)), leave_one_out=True)["full", 5].top1
        for name, train, val in compared(extractor(), images, None, None)
    }
    assert tuple(found) == names(3)
    assert {name for name in seen if found[name] == 100} == seen, found
    assert all(found[name] < 75 for name in unseen), found  # leave-one-out of even classes is below chance


def test_hog_is_that_of_scikit_image() -> None:
    photo = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0)).cumsum(1).cumsum(2)
    photo = photo / photo.max() + 0.1 * torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(1))
    theirs = [skimage_hog(each.numpy(), 9, (8, 8), (2, 2), block_norm="L2-Hys") for each in photo]
    np.testing.assert_allclose(hog(photo).numpy(), np.stack(theirs), atol=1e-4)


def test_colour_histogram_counts_each_colour() -> None:
    image = torch.zeros(1, 3, 4, 4)
    image[:, :, 0] = torch.tensor([1.0, 0.0, 0.5])[:, None]  # a row of four: levels 7, 0 and 4 of 8
    counts = colour_histogram(image)[0].square().round()
    assert {int(place): int(counts[place]) for place in counts.nonzero()[:, 0]} == {0: 12, 7 + 8 * 0 + 64 * 4: 4}
    of_five = colour_histogram(torch.rand(2, 5, 8, 8)).square()
    torch.testing.assert_close(of_five.reshape(2, 5, 32).sum(-1), torch.full((2, 5), 64.0))


@pytest.mark.parametrize("in_chans", [1, 2, 3, 5])
def test_any_number_of_channels_and_undoes_the_normalisation(in_chans: int) -> None:
    images = Images(in_chans=in_chans)
    config = ViTConfig(img_size=SIDE, patch_size=8, embed_dim=24, depth=1, num_heads=2, in_chans=in_chans)
    network = Unlearned(config, images)
    levels = torch.rand(2, in_chans, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(each)[:, None, None] for each in images.statistics)
    with torch.no_grad():
        parts = network.parts((levels - mean) / std)
    assert tuple(parts) == names(in_chans) and "colour histogram" not in names(1)
    torch.testing.assert_close(parts["raw pixels"], levels.flatten(1), atol=1e-5, rtol=0)
    assert all(part.isfinite().all() and len(part) == 2 for part in parts.values())


def test_the_random_network_has_the_shape_and_no_layerscale_and_is_always_the_same() -> None:
    config = ViTConfig(img_size=SIDE, patch_size=8, embed_dim=24, depth=2, num_heads=2, layerscale=1e-5)
    first, state = Unlearned(config, Images()), torch.random.get_rng_state()
    torch.manual_seed(5)
    second = Unlearned(config, Images())
    assert first.network.config == config.changed(layerscale=None)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    Unlearned(config, Images())
    assert torch.equal(before, torch.random.get_rng_state()) and not torch.equal(before, state)


def test_of_many_images_some_are_drawn_and_the_model_beside_them_has_the_same(tmp_path: Path) -> None:
    images = make_dataset(str(write_images(tmp_path / "images", per_class=20)))
    extract = extractor()
    own = extract(images)
    bytes_each = 4 * sum(part.cls.shape[1] for _, part, _ in compared(extract, images, None, None))
    found = list(compared(extract, images, None, None, (own, own), largest=10 * bytes_each))
    assert [each.name for each in found] == [*names(3), baselines.THIS_MODEL]
    chosen = torch.from_numpy(Sampled(images, 10).rows)
    for each in found:
        assert each.train is each.val or torch.equal(each.train.targets, each.val.targets)
        assert each.train.size == 10 and torch.equal(each.train.targets, own.targets[chosen])
    assert torch.equal(found[-1].train.cls, own.cls[chosen])


def dino2(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert not stop.value.code


def test_the_command_prints_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, weights = write_images(tmp_path / "images", per_class=12), write_weights(tmp_path)
    words = ["eval", "knn", str(weights), "--config-file", str(tmp_path / "config.yaml"), "--device", "cpu",
             "--data", str(data), "--val-dataset", str(data), "--nb-knn", "3", "5", "--baselines"]  # fmt: skip
    dino2(*words, "--dry-run")
    assert "beside it    raw pixels, colour histogram, grey" in capsys.readouterr().out
    dino2(*words, "--output-dir", str(tmp_path / "out"), "--json")
    result = json.loads(capsys.readouterr().out)
    found = result["extra"]["baselines"]
    assert found["train_images"] == 24 and set(found["top1"]) == {"full, k=3", "full, k=5"}
    for row in result["rows"]:
        assert tuple(found["top1"][row["name"]]) == (*names(3), "this model")
        assert found["top1"][row["name"]]["this model"] == row["top1"]
        assert found["top1"][row["name"]]["colour histogram"] == 100  # each class has its colours
    assert json.loads((tmp_path / "out/results.json").read_text())["evaluations"][0]["extra"]["baselines"] == found
    dino2(*words, "--output-dir", str(tmp_path / "out"))
    shown = capsys.readouterr()
    assert shown.err.count("from the cache") == 2  # the model's features, and the baselines'
    assert "beside what takes no training" in shown.out and max(map(len, shown.out.splitlines())) <= 80


def test_the_demos_photos_are_not_told_by_colours_brightness_pixels_or_gradients() -> None:
    """At the demo's size, shrunk from 96. Much smaller ones would tell: shrinking greys fine texture."""
    config = load_config(preset="demo")
    train, val = (make_dataset(f"SamplePhotos:split={split}") for split in ("TRAIN", "VAL"))
    extract = Extractor(VisionTransformer(config.vit().changed(depth=1)).eval(), num_workers=0, device="cpu")
    scores = {}
    for name, *features in compared(extract, train, val, None):
        scores[name] = evaluate_knn(*features, KnnSettings(ks=(20,)), device=torch.device("cpu"))["full", 20].top1
    assert max(scores[name] for name in ("raw pixels", "colour histogram", "grey histogram", "HOG")) < 35, scores
