"""The one decoder: the right value of each kind of file, the fast ways against Pillow's pixels, damage told of."""

import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, PngImagePlugin
from tiny_run import TINY

from dinov2cli.config import load_config
from dinov2cli.config.images import Images
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.decoding import Reading, UnreadableImage, decode_image, read_image
from dinov2cli.data.formats.fast import read_png
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.eval.protocol import load_subject
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.requests.eval import EmbedRequest, KnnRequest
from dinov2cli.requests.pictures import PcaImageRequest
from dinov2cli.visualize.pictures import load_picture_model

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 29, 3), dtype=np.uint8)


def png_of(pixels: np.ndarray, mode: str | None = None, **how: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, "PNG", **how)
    return file.getvalue()


def with_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "taken in spring")
    return info


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (png_of(RGB), True),
        (png_of(RGB, "L"), True),
        (png_of(RGB, compress_level=0), True),
        (png_of(RGB, pnginfo=with_text(), dpi=(72, 72)), True),
        (png_of(np.tile(RGB, (60, 60, 1))), True),  # several data chunks
        (png_of(RGB, "P"), False),
        (png_of(RGB, "RGBA"), False),
        (png_of(RGB, "LA"), False),
        (png_of(RGB, "1"), False),
        (png_of(RGB, transparency=(0, 0, 0)), False),
        (png_of(RGB[:, :, 0].astype(np.uint16) * 257), True),
    ],
)
def test_pixels_are_those_of_pillow(data: bytes, plain: bool) -> None:
    for given in (data, memoryview(data)):
        assert (read_png(given, "x.png", 1.0) is not None) == plain
    image = Image.open(io.BytesIO(data))
    if not image.mode.startswith("I;16"):
        hidden = Reading(Images(background="drop"))
        np.testing.assert_array_equal(decode_image(data, "x", hidden), np.asarray(image.convert("RGB")))


def test_damage_is_told_and_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    whole = png_of(RGB)
    damaged = [whole[:20], whole[: len(whole) // 2], whole[:-60], bytes([*whole[:60], whole[60] ^ 1, *whole[61:]])]
    for data in damaged:
        with pytest.raises(UnreadableImage, match="x: "):
            decode_image(data, "x")
    assert not capfd.readouterr().err


def test_a_checksum_that_fits_does_not_make_data_good() -> None:
    whole = png_of(RGB)
    start = whole.index(b"IDAT")
    size = int.from_bytes(whole[start - 4 : start], "big")
    body = b"IDAT" + bytes(size)
    data = whole[:start] + body + zlib.crc32(body).to_bytes(4, "big") + whole[start + size + 8 :]
    with pytest.raises(UnreadableImage, match="x: "):
        decode_image(data, "x")


def test_paths_of_a_folder_are_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinov2cli.data.datasets import make_dataset

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png_of(RGB))
    monkeypatch.chdir(tmp_path)
    for root in (str(tmp_path), f"{tmp_path}/", "../" + tmp_path.name):
        images = make_dataset(root)
        assert Path(images.path(0)) == Path(root) / "a" / "1.png"
        np.testing.assert_array_equal(images.image(0), RGB)


def test_images_are_turned_as_exif_says_unless_that_is_off() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    data = png_of(RGB, exif=exif)
    np.testing.assert_array_equal(decode_image(data, "a.png"), np.rot90(RGB, -1))
    np.testing.assert_array_equal(decode_image(data, "a.png", Reading(Images(exif_orientation=False))), RGB)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("background", ["mean", "drop", "[255, 0, 0]"])
def test_transparency_shows_one_background(tmp_path: Path, grey: bool, background: str) -> None:
    alpha = RNG.integers(0, 256, (13, 29, 1), dtype=np.uint8)
    colors = np.repeat(RGB[..., :1], 3, axis=2) if grey else RGB
    path = tmp_path / "a.png"
    path.write_bytes(png_of(np.concatenate([colors[..., :1] if grey else colors, alpha], axis=2)))
    read = read_image(path, Reading(Images(background=background)))
    if background == "drop":
        np.testing.assert_array_equal(read, colors)
        return
    below = np.array([124, 116, 104] if background == "mean" else [255, 0, 0])
    np.testing.assert_array_equal(read, np.floor((colors * alpha.astype(float) + below * (255.0 - alpha)) / 255 + 0.5))


@pytest.mark.parametrize("content", [None, b"", png_of(RGB)[:-40]])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"a\.png: (cannot be read|the file is empty|damaged image)"):
        read_image(path)


def test_every_command_reads_a_file_alike(tmp_path: Path) -> None:
    config = load_config(overrides=[*TINY, "data.value_range=[0, 4000]", "data.background=[9, 8, 7]",
                                    "data.exif_orientation=false", "data.max_image_gb=1.5"])  # fmt: skip
    config.save(tmp_path / "run" / "config.yaml")
    weights = tmp_path / "run" / "eval" / "training_9" / "teacher_checkpoint.pth"
    weights.parent.mkdir(parents=True)
    model = VisionTransformer(config.vit())
    torch.save({"teacher": {f"backbone.{name}": value for name, value in model.state_dict().items()}}, weights)
    (tmp_path / "images").mkdir()
    for number in range(8):
        Image.fromarray(RGB).save(tmp_path / "images" / f"{number}.png")
    run, images = str(tmp_path / "run"), str(tmp_path / "images")

    def readings(**options: object) -> list[Reading]:
        """Of features, of an evaluation, and of pictures."""
        embed = EmbedRequest(checkpoint=run, data=images, output=tmp_path / "a.safetensors", device="cpu", **options)
        knn = KnnRequest(checkpoint=run, device="cpu", **options)
        picture = PcaImageRequest(paths=(tmp_path / "a.png", tmp_path / "b.png"), model=run, device="cpu", **options)
        subject = load_subject(run)
        of_subject = [subject.extractor(request).reading for request in (embed, knn)]
        return [*of_subject, load_picture_model(picture)[2]]

    of_training = make_train_loader(config, start=0, stop=1, dataset=make_dataset(images))
    trained = of_training._loader.dataset.batch.__self__.reading
    assert trained == Reading(config.images(), 1.5) and set(map(str, readings())) == {str(trained)}
    assert [reading.max_image_gb for reading in readings()] == [1.5] * 3
    options = {"value_range": "percentile [1, 99]", "background": "drop", "max_image_gb": 0.5}
    for reading in readings(**options):
        assert (reading.images.value_range, reading.images.background, reading.max_image_gb) == tuple(options.values())
        assert not reading.images.exif_orientation
    with pytest.raises(ValueError, match=r"must be auto, dtype, \[LOW, HIGH\] or percentile \[P, Q\]"):
        readings(value_range="[3, 1]")


PEAKS = """
import gc, json, re, sys
import cv2, numpy as np
from pathlib import Path
from dinov2cli.config.images import Images
from dinov2cli.data.decoding import Reading, UnreadableImage, read_image
cv2.setNumThreads(0)
found = {}
for name, options in json.loads(sys.argv[1]).items():
    def read(path, limit=9.0):
        return read_image(Path(path), Reading(Images(**options), limit))
    read(Path("small") / name)  # libraries loaded, tables made
    try:
        read(name, 0.001)
    except UnreadableImage as error:
        expected = 1e9 * float(re.search("need (.*?) GB", str(error))[1])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    read(name)
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    found[name] = expected, peak - before - Path(name).stat().st_size
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="tells no peaks of memory")
def test_the_limit_holds_for_the_most_that_decoding_needs(tmp_path: Path) -> None:
    """As its header tells, samples, their floats, and what the decoder holds; the file itself apart."""
    rng = np.random.default_rng(0)
    for folder, height, width in ((tmp_path, 1024, 1024), (tmp_path / "small", 16, 24)):
        folder.mkdir(exist_ok=True)
        wide = rng.integers(0, 65536, (height // 8, width // 8, 4), np.uint16).repeat(8, 0).repeat(8, 1)
        narrow = (wide >> 8).astype(np.uint8)
        for name, array in (("deep", wide[..., :3]), ("deep_alpha", wide), ("gray", wide[..., 0]), ("alpha", narrow)):
            cv2.imwrite(str(folder / f"{name}.png"), array)
        Image.fromarray(narrow[..., :3]).save(folder / "a.webp")
        for name, array, how in (
            ("deep", wide[..., :3], {"photometric": "rgb"}),
            ("alpha", wide, {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
            ("float", wide[..., :3] / np.float32(65535), {"photometric": "rgb"}),
            ("whole", wide[..., :3].astype(np.int32), {"photometric": "rgb"}),
            ("inks", narrow, {"photometric": "separated"}),
            ("bands", np.concatenate([wide, wide, wide, wide[..., :1]], 2).transpose(2, 0, 1), {}),
        ):
            tifffile.imwrite(folder / f"{name}.tif", array, **{"photometric": "minisblack", **how})
    asked = {path.name: {} for path in sorted(tmp_path.iterdir()) if path.is_file()}
    asked["bands.tif"], asked["whole.tif"] = {"in_chans": 13}, {"value_range": "[0, 65535]"}
    giving_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else what one image left serves the next
    command = [sys.executable, "-c", PEAKS, json.dumps(asked)]
    child = subprocess.run(command, cwd=tmp_path, env=giving_back, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    for name, (expected, peak) in json.loads(child.stdout).items():
        assert 0.4 * expected < peak + 2e6 and peak < 1.1 * expected + 3e6, (name, expected, peak)
