"""`dino2 datasets stats`: what it measures is what training normalises by."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

import dinov2cli
from dinov2cli.config import load_config
from dinov2cli.data import statistics
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.decoding import USUAL
from dinov2cli.data.statistics import with_settings
from dinov2cli.data.tallies import Levels
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.requests.datasets import DatasetStatsRequest


@pytest.fixture
def images(tmp_path: Path) -> list[np.ndarray]:
    """Sixteen-bit images of three channels, of different sizes; their values in 0..1."""
    rng, found = np.random.default_rng(0), []
    (tmp_path / "set").mkdir()
    for number in range(300):
        size = rng.integers(5, 12, 2)
        values = rng.beta([1, 2, 3], [3, 2, 1], (*size, 3)) * rng.random(3)
        samples = (values * 4095).astype(np.uint16)
        tifffile.imwrite(tmp_path / "set" / f"{number:03}.tif", samples, photometric="minisblack",
                         planarconfig="contig")  # fmt: skip
        found.append(samples / 4095)
    return found


def asked(folder: Path, **options: object) -> DatasetStatsRequest:
    options = {"value_range": "[0, 4095]", "channels": ("2", "0"), "num_workers": 0, **options}
    return DatasetStatsRequest(dataset=str(folder / "set"), **options)


def test_each_image_counts_the_same(tmp_path: Path, images: list[np.ndarray]) -> None:
    found = dinov2cli.run(asked(tmp_path, write=tmp_path / "cells.yaml"))
    mean = np.mean([values.mean((0, 1)) for values in images], axis=0)
    square = np.mean([(values**2).mean((0, 1)) for values in images], axis=0)
    std = np.sqrt(square - mean**2)
    assert found.images == 300 and found.unreadable == 0
    np.testing.assert_allclose(found.mean, mean[[2, 0]], atol=6e-5)
    np.testing.assert_allclose(found.std, std[[2, 0]], atol=6e-5)
    assert found.max == [round(max(v[..., c].max() for v in images), 4) for c in (2, 0)]
    config = load_config(config_file=tmp_path / "cells.yaml")
    expected = config.images()
    assert expected.in_chans == 2 and expected.channels == ("2", "0") and expected.value_range == "[0, 4095]"
    assert list(expected.statistics.mean) == found.mean and list(expected.statistics.std) == found.std


def test_percentiles_of_the_set_are_its_black_and_white(tmp_path: Path, images: list[np.ndarray]) -> None:
    """Each image counts the same, channels that are not read do not; what is written is read by a training."""
    found = dinov2cli.run(asked(tmp_path, value_range=None, percentiles=(1, 99), write=tmp_path / "cells.yaml"))
    levels = np.concatenate([np.rint(values[..., [2, 0]] * 4095).reshape(-1) for values in images])
    shares = np.concatenate([np.full(values[..., :2].size, 1 / values[..., :2].size) for values in images])
    order = np.argsort(levels)
    black, white = (levels[order][np.searchsorted(shares[order].cumsum(), p / 100 * 300)] for p in (1, 99))
    assert load_config(config_file=tmp_path / "cells.yaml").images().value_range == f"[{black:.0f}, {white:.0f}]"
    assert 0 < black < white < 4095 and found.min == [0, 0] and found.max == [1, 1]


def test_percentiles_of_any_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for values in (rng.normal(0, 1000, 20_000), rng.integers(-3000, 4000, 20_000), rng.lognormal(0, 5, 20_000)):
        np.save(tmp_path / "x.npy", values.astype(np.float32).reshape(100, 200))
        sums = Levels.of(make_dataset(str(tmp_path)), 0, USUAL)
        for p in (0, 0.1003, 25.003, 50.003, 99.9003, 100):  # between two ranks
            right = np.percentile(values, p, method="inverted_cdf")
            found = sums.percentile(p)
            assert abs(found) <= abs(right) and abs(found - right) <= 5e-4 * abs(right), (p, found, right)
            assert values.dtype.kind != "i" or found == right


def test_workers_and_a_restart_change_nothing(
    tmp_path: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO2_CACHE", str(tmp_path / "cache"))
    whole = dinov2cli.run(asked(tmp_path, max_images=290))
    assert not list((tmp_path / "cache").rglob("*.json"))
    assert dinov2cli.run(asked(tmp_path, max_images=290, num_workers=2)) == whole
    measured, read = [], statistics.Sums.join

    def interrupted(self: statistics.Sums, other: statistics.Sums) -> None:
        read(self, other)
        measured.extend([other.images] * other.batches)
        if len(measured) == 20 and other.batches:
            raise KeyboardInterrupt

    monkeypatch.setattr(statistics.Sums, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dinov2cli.run(asked(tmp_path, max_images=290))
    before = sum(measured)
    assert dinov2cli.run(asked(tmp_path, max_images=290)) == whole
    assert sum(measured) == 290 and before == 160, "what was added up is not read again"


def test_another_archive_is_another_set(tmp_path: Path) -> None:
    seen = set()
    for color in (3, 200):
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            archive.writestr("a.png", cv2.imencode(".png", np.full((4, 4, 3), color, np.uint8))[1].tobytes())
        dataset = make_dataset(str(tmp_path / "set.zip"))
        seen.add(json.dumps(statistics._fingerprint(dataset)))
    assert len(seen) == 2


def test_colours_and_grey_are_rgb_and_damage_is_counted(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    rng = np.random.default_rng(1)
    for number in range(12):
        pixels = rng.integers(0, 256, (8, 8, 3) if number % 3 else (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / f"{number}.png")
    request = {"value_range": None, "channels": ()}
    found = dinov2cli.run(asked(tmp_path, **request))
    assert found.channels == ["red", "green", "blue"] and found.settings["student"] == {"in_chans": 3}
    (tmp_path / "set" / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of 12 images are unreadable"):
        dinov2cli.run(asked(tmp_path, **request))
    assert dinov2cli.run(asked(tmp_path, **request, max_bad_fraction=0.1)).unreadable == 1
    np.save(tmp_path / "set" / "five.npy", np.ones((8, 8, 5), np.uint8))
    with pytest.raises(
        DataError, match=r"images have different numbers of channels \(\d with 1, \d with 3, 1 with 5\)"
    ):
        dinov2cli.run(asked(tmp_path, **request, max_bad_fraction=0.1))


def test_a_channel_without_contrast_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    values = np.random.default_rng(0).integers(0, 255, (6, 6, 5), dtype=np.uint8)
    values[..., 3] = 7
    np.save(tmp_path / "set" / "a.npy", values)
    with pytest.raises(DataError, match="every sample of channel 3 is the same"):
        dinov2cli.run(asked(tmp_path, value_range=None, channels=()))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# mine\noptim:\n  epochs: 3  # few\n",
        "student:\n  arch: vit_small\n  in_chans: 3\n\ndata:\n  mean: [0.5, 0.5, 0.5]\n  scaled_decode: true\n",
        "student: {in_chans: 3}\n",
        "student:  # to be told\n",
        "data:  # images\n  # a comment\n  scaled_decode: true\noptim:\n  epochs: 3\n",
    ],
)
def test_a_configuration_keeps_what_else_it_holds(text: str) -> None:
    settings = {"student": {"in_chans": 2}, "data": {"mean": [0.1, 0.2], "std": [0.3, 0.4], "channels": ["2", "BF"]}}
    edited = with_settings(text, settings, Path("cells.yaml"))
    before, after = yaml.safe_load(text) or {}, yaml.safe_load(edited)
    for group, keys in settings.items():
        assert after[group] == {**(before.get(group) or {}), **keys}
    assert {key: value for key, value in after.items() if key not in settings} == {
        key: value for key, value in before.items() if key not in settings
    }
    for line in text.splitlines():
        if "in_chans" not in line and "mean" not in line:
            assert line in edited.splitlines()
    assert with_settings(edited, settings, Path("cells.yaml")) == edited


def test_a_configuration_in_another_form_is_refused() -> None:
    settings: dict[str, dict[str, object]] = {"student": {"in_chans": 2}}
    refused: Callable[[], str] = lambda: with_settings("student: {in_chans: 3}  # cells\n", settings, Path("c.yaml"))  # noqa: E731
    with pytest.raises(ConfigError, match=r"c.yaml: is not written as one key a line; write these keys into it"):
        refused()
