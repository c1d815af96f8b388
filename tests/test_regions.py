"""Large TIFFs by region: the pixels of the whole, of any layout, without the memory for the whole."""

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import ready
import tifffile

from dinov2cli.config.images import RGB
from dinov2cli.data import regions
from dinov2cli.data.augmentations import render_crops, render_regions
from dinov2cli.data.crop_parameters import Box, CropRecipe, draw_crops
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.datasets.tiles import TiledDataset, starts
from dinov2cli.data.decoding import USUAL, Reading, UnreadableImage, read_image
from dinov2cli.data.look import look_at
from dinov2cli.data.statistics import usual_channels

COLORS = np.random.default_rng(0).integers(0, 256, (700, 513, 3), dtype=np.uint8)
GRAY = COLORS[..., 0]
WHOLE_TYPE = Reading(RGB.model_copy(update={"value_range": "dtype"}))
RGB_TILES: dict[str, Any] = {"photometric": "rgb", "tile": (128, 64)}
KINDS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "tiles": (COLORS, RGB_TILES),
    "compressed tiles": (COLORS, {**RGB_TILES, "compression": "zlib", "predictor": True}),
    "plain": (COLORS, {"photometric": "rgb"}),
    "strips": (COLORS, {"photometric": "rgb", "rowsperstrip": 100, "compression": "zlib"}),
    "planes": (COLORS.transpose(2, 0, 1), {"photometric": "rgb", "tile": (128, 128), "planarconfig": "separate"}),
    "16 bits": (GRAY.astype(np.uint16) * 200, {"photometric": "minisblack", "tile": (128, 128)}),
    "big-endian": (GRAY.astype(">u2") * 200, {"photometric": "minisblack", "tile": (128, 128), "byteorder": ">"}),
    "big-endian plain": (GRAY.astype(">u2") * 200, {"photometric": "minisblack", "byteorder": ">"}),
    "white is zero": (GRAY, {"photometric": "miniswhite", "tile": (128, 128)}),
    "floats": (GRAY.astype(np.float32) / 255, {"photometric": "minisblack", "tile": (128, 128)}),
}


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "LARGE_FILE", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_parts_of_the_whole(tmp_path: Path, kind: str) -> None:
    array, options = KINDS[kind]
    tifffile.imwrite(path := tmp_path / "a.tif", array, **options)
    whole = read_image(path, WHOLE_TYPE)
    image = regions.open_image(str(path), WHOLE_TYPE)
    assert image is not None and image.size == (700, 513) and image.can_shrink
    for top, left, height, width in ((0, 0, 700, 513), (5, 7, 300, 200), (650, 500, 50, 13), (127, 63, 2, 2)):
        found = image.region(Box(top, left, height, width))
        np.testing.assert_array_equal(found, whole[top : top + height, left : left + width])
    smaller = image.region(Box(4, 0, 696, 512), 8)
    expected = whole[4:, :512].reshape(87, 8, 64, 8, 3).mean((1, 3))
    assert smaller.shape == (87, 64, 3) and np.abs(smaller - expected).max() <= 1
    assert image.region(Box(0, 0, 700, 513), 8).shape == (88, 65, 3)


def test_the_level_of_a_pyramid_that_fits_is_read(tmp_path: Path) -> None:
    levels = [np.full((1024 >> i, 768 >> i, 3), 10 + i, np.uint8) for i in range(4)]
    with tifffile.TiffWriter(path := tmp_path / "pyramid.tif") as tif:
        tif.write(levels[0], subifds=3, photometric="rgb", tile=(128, 128))
        for level in levels[1:]:
            tif.write(level, subfiletype=1, photometric="rgb", tile=(128, 128))
    image = regions.open_image(str(path))
    assert image is not None
    for shrink, level in ((1, 10), (2, 11), (4, 12), (8, 13), (32, 13)):
        region = image.region(Box(128, 64, 512, 640), shrink)
        assert (region == level).all() and region.shape == (512 // shrink, 640 // shrink, 3)


@pytest.mark.parametrize("scale", [(0.002, 0.01), (0.3, 1.0)])
def test_crops_are_those_of_the_whole_image(tmp_path: Path, scale: tuple[float, float]) -> None:
    smooth = cv2.resize(COLORS[:5, :4], (900, 1200), interpolation=cv2.INTER_CUBIC)
    tifffile.imwrite(tmp_path / "a.tif", smooth, photometric="rgb", tile=(128, 128))
    image = make_dataset(str(tmp_path)).open(0)
    assert isinstance(image, regions.LargeImage)
    recipes = tuple(CropRecipe(size, scale, 0, jitter=0, grayscale=0) for size in (32, 32, 16, 16, 16))
    drawn = draw_crops(recipes, 1200, 900, np.random.default_rng(1))
    expected, found = render_crops(smooth, drawn), render_regions(image, drawn)
    assert [len(views) for views in found[:2]] == [2, 3]
    for ours, whole in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert ours.shape == whole.shape and np.abs(ours.astype(int) - whole).mean() < 3


def test_of_a_large_image_the_header_tells_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((700, 513, 5), np.float32), tile=(128, 64), photometric="minisblack",
                     planarconfig="contig")  # fmt: skip
    dataset = make_dataset(str(tmp_path))
    monkeypatch.setattr(type(dataset), "encoded", None)  # the file as a whole
    assert str(look_at(dataset, USUAL)) == "all: TIFF; floating point 32 bits; 5 channels; 513 x 700"
    assert usual_channels(dataset, USUAL) == 5


def test_half_floats_are_averaged(tmp_path: Path) -> None:
    tifffile.imwrite(path := tmp_path / "a.tif", (GRAY / 255).astype(np.float16), tile=(128, 128),
                     photometric="minisblack")  # fmt: skip
    image = regions.open_image(str(path), WHOLE_TYPE)
    assert image is not None
    expected = GRAY[:696, :512].reshape(87, 8, 64, 8).mean((1, 3))
    assert np.abs(255 * image.region(Box(0, 0, 696, 512), 8)[..., 0] - expected).max() <= 1


def test_what_has_no_regions_is_read_at_once(tmp_path: Path) -> None:
    for name, array, options in (
        ("stack", np.zeros((3, 40, 50), np.uint8), {"photometric": "minisblack"}),
        ("one strip", COLORS, {"photometric": "rgb", "compression": "zlib", "rowsperstrip": 700}),
    ):
        tifffile.imwrite(tmp_path / f"{name}.tif", array, **options)
        assert regions.open_image(str(tmp_path / f"{name}.tif")) is None
    assert regions.open_image(str(tmp_path / "none.tif")) is None and regions.open_image("a.zip:b.tif") is None


def test_damage_and_values_that_a_part_does_not_tell(tmp_path: Path) -> None:
    tifffile.imwrite(path := tmp_path / "a.tif", GRAY.astype(np.float32), tile=(128, 128), photometric="minisblack")
    image = regions.open_image(str(path))
    assert image is not None
    with pytest.raises(UnreadableImage, match=r"float32 samples in a large image.*data\.value_range"):
        image.region(Box(0, 0, 9, 9))
    tifffile.imwrite(path, COLORS, **RGB_TILES, compression="zlib")
    content = bytearray(path.read_bytes())
    content[-2000:] = bytes(2000)
    path.write_bytes(content)
    image = regions.open_image(str(path))
    assert image is not None
    with pytest.raises(UnreadableImage, match=r"a\.tif: damaged TIFF"):
        image.region(Box(0, 0, 700, 513))
    path.write_bytes(b"II*\0" + bytes(3))
    with pytest.raises(UnreadableImage, match="damaged TIFF"):
        regions.open_image(str(path))


PEAK = """
import resource, sys
import numpy as np
from dinov2cli.data.augmentations import render_regions
from dinov2cli.data.crop_parameters import CropRecipe, draw_crops
from dinov2cli.data.datasets import make_dataset
dataset = make_dataset(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for scale in ((0.001, 0.01), (0.3, 1.0)):
    drawn = draw_crops((CropRecipe(32, scale, 0),) * 4, *dataset.open(0).size, np.random.default_rng(0))
    render_regions(dataset.open(0), drawn)
assert dataset.image(0).shape == (1024, 1024, 3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_is_that_of_some_rows(tmp_path: Path) -> None:
    tile = np.zeros((256, 256, 3), np.uint8)
    options: dict[str, Any] = {"shape": (8192, 8192, 3), "dtype": np.uint8, "tile": (256, 256), "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "a.tif", iter([tile] * 1024), **options)  # 200 MB
    grown = int(ready.server().run(tmp_path, code=PEAK).stdout)
    assert grown < 100, f"{grown} MB"


def test_tiles_of_images_large_and_small(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tifffile.imwrite(tmp_path / "a" / "large.tif", COLORS, **RGB_TILES)
    cv2.imwrite(str(tmp_path / "b" / "small.png"), COLORS[:150, :300, ::-1])
    (tmp_path / "b" / "torn.png").write_bytes(b"\x89PNG")
    tiles = TiledDataset(make_dataset(str(tmp_path)), 200, 20)
    assert starts(700, 200, 20) == [0, 180, 360, 500] and starts(150, 200, 20) == [0] and starts(200, 200, 0) == [0]
    assert len(tiles) == 4 * 3 + 2 + 1 and tiles.targets().tolist() == [0] * 12 + [1] * 3
    for i in range(14):
        top, left, height, width = tiles.boxes[i]
        np.testing.assert_array_equal(tiles.image(i), COLORS[top : top + height, left : left + width])
    assert tiles.boxes[11].tolist() == [500, 313, 200, 200] and tiles.boxes[13].tolist() == [0, 100, 150, 200]
    assert tiles.boxes[14].tolist() == [0, 0, 0, 0] and tiles.path(14).endswith("torn.png")
    with pytest.raises(UnreadableImage, match="torn"):
        tiles.image(14)
    assert "15 tiles of 200 pixels that share 20: folder" in tiles.describe()


def pyramid(path: Path) -> np.ndarray:
    """A slide of random colours, coarse enough that its levels look alike; returns its full resolution."""
    coarse = np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    base = coarse.repeat(32, 0).repeat(32, 1)
    with tifffile.TiffWriter(path) as tif:
        for factor in (1, 4, 16):
            small = {"subfiletype": 1} if factor > 1 else {}
            tif.write(base[::factor, ::factor], photometric="rgb", tile=(128, 128), compression="zlib", metadata=None,
                      **small)  # fmt: skip
    return base


@pytest.mark.parametrize("suffix", [".svs", ".mrxs"])
def test_slides_in_a_folder_are_read_by_region(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "LARGE_FILE", 64 << 20)
    if suffix == ".mrxs":
        pytest.importorskip("openslide", reason="openslide is not installed: pip install 'dinov2cli[slides]'")
    base = pyramid(tmp_path / f"slide{suffix}")
    dataset = make_dataset(str(tmp_path))
    image = dataset.open(0)
    assert isinstance(image, regions.LargeImage) and image.size == (1280, 1600)
    np.testing.assert_array_equal(image.region(Box(100, 203, 130, 70)), base[100:230, 203:273])
    # A quarter and a sixteenth are levels: of one colour each, as a mean over borders would not be.
    np.testing.assert_array_equal(image.region(Box(64, 128, 256, 512), 4), base[64:320:4, 128:640:4])
    np.testing.assert_array_equal(image.region(Box(0, 0, 1280, 1600), 16), base[::16, ::16])
    halves = base[:, :, :].reshape(640, 2, 800, 2, 3).mean((1, 3))
    assert np.abs(image.region(Box(0, 0, 1280, 1600), 2) - halves).max() <= 1
    assert len(TiledDataset(dataset, 400, 0)) == 16
    assert "RGB; 1600 x 1280" in str(look_at(dataset, USUAL))


def test_a_slide_without_its_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "a.mrxs").write_bytes(b"MIRAX")
    with pytest.raises(UnreadableImage, match=r"needs openslide: pip install 'dinov2cli\[slides\]'"):
        make_dataset(str(tmp_path)).open(0)
